"""Layers that a checkpoint has and its class does not load: named, copied, or rounded to 8 bits."""

import json
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import EXPERTS, FAMILIES, TEXT, Tiny, tiny_tokenizer

from auto_mmround import AutoRoundMLLM, cli
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.checkpoint.reading import dequantized_state_dict, read_checkpoint
from auto_mmround.export import formats
from auto_mmround.families import vllm_module
from auto_mmround.verify import static

DEEPSEEK = TEXT | EXPERTS | dict(
    num_key_value_heads=2, n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1,
    head_dim=16, kv_lora_rank=32, q_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16,
    v_head_dim=32, num_nextn_predict_layers=1,
)  # fmt: skip
GLM = TEXT | EXPERTS | dict(
    n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1, partial_rotary_factor=0.5,
)  # fmt: skip
NEXT = TEXT | EXPERTS | dict(
    num_experts=4, shared_expert_intermediate_size=32, linear_num_key_heads=2,
    linear_num_value_heads=2, linear_key_head_dim=32, linear_value_head_dim=32,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
# family -> (model, prefix of the layer that is copied, prefix of the further one)
FURTHER = {
    "deepseek_v3": (
        Tiny("deepseek_v3", "DeepseekV3ForCausalLM", DEEPSEEK),
        "model.layers.1.",
        "model.layers.2.",
    ),
    "glm4_moe": (Tiny("glm4_moe", "Glm4MoeForCausalLM", GLM), "model.layers.1.", "model.layers.2."),
    "qwen3_next": (
        Tiny("qwen3_next", "Qwen3NextForCausalLM", NEXT),
        "model.layers.1.",
        "mtp.layers.0.",
    ),
    # Its own experts lie in stacks, those of the further layer too.
    "qwen3_5_moe": (
        Tiny("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", NEXT),
        "model.layers.1.",
        "mtp.layers.0.",
    ),
    "llama": (Tiny("llama", "LlamaForCausalLM", TEXT), "model.layers.1.", "model.mtp.layers.0."),
}
FORMATS = ("auto_round", "auto_gptq", "auto_awq", "compressed_tensors", "mlx", "fake")


def saved(name: str, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A folder with a further layer, and what was added to it."""
    family, old, new = FURTHER[name]
    family.save(folder, tiny_tokenizer())
    tensors = load_file(folder / "model.safetensors")
    extra = {
        key.replace(old, new): torch.randn_like(value)
        for key, value in tensors.items()
        if key.startswith(old)
    }
    if name == "qwen3_5_moe":
        extra = stacked(extra, f"{new}mlp.experts")
    joins = "mtp.fc" if new.startswith("mtp") else f"{new}eh_proj"
    extra |= {f"{joins}.weight": torch.randn(64, 128), f"{new}enorm.weight": torch.ones(64)}
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    return folder, extra


def stacked(tensors: dict[str, torch.Tensor], experts: str) -> dict[str, torch.Tensor]:
    """With a matrix of every expert in one tensor, as Qwen3.5's files have them."""
    down, gate, up = (
        torch.stack([tensors[f"{experts}.{i}.{leaf}_proj.weight"] for i in range(4)])
        for leaf in ("down", "gate", "up")
    )
    rest = {key: value for key, value in tensors.items() if not key.startswith(experts)}
    both = torch.cat([gate, up], 1)
    return rest | {f"{experts}.gate_up_proj": both, f"{experts}.down_proj": down}


def sharded(folder: Path) -> Path:
    """The same, a tensor of a further layer in each of three files."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    place = {key: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, key in enumerate(tensors)}
    for file in set(place.values()):
        part = {key: tensors[key] for key in tensors if place[key] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": place}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def command(model: Path, out: Path, *more: str) -> int:
    words = ["--model", str(model), "--output_dir", str(out), "--iters", "0", "--group_size", "32"]
    # Transformers would load the experts of some of these formats otherwise, and they be refused
    return cli.main([*words, "--device", "cpu", "--engines", "vllm", *more])


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", FURTHER)
def test_copied_and_named(name, fmt, tmp_path, capsys):
    model, extra = saved(name, tmp_path / "model")
    assert command(model, tmp_path / "out", "--format", fmt) == 0
    said = capsys.readouterr()
    assert "does not load it" in said.out and "copied as they are" in said.err
    (folder,) = (tmp_path / "out").iterdir()
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(after[key], value) for key, value in extra.items())
    quantization = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    prefix = FURTHER[name][2].partition(".layers.0")[0].removesuffix(".")
    keys = {
        "auto_round": "extra_config", "auto_gptq": "modules_to_not_convert",
        "auto_awq": "modules_to_not_convert",
        "compressed_tensors": "ignore", "mlx": f"{prefix}.",
    }  # fmt: skip
    if fmt == "mlx":
        assert any(key.startswith(prefix) and value is False for key, value in quantization.items())
    elif fmt != "fake":
        if fmt == "auto_gptq":
            rules = [rule[2:] for rule in quantization["dynamic"] if rule.startswith("-:")]
            assert any(re.match(rule, f"{prefix}.mtp_block.self_attn.q_proj") for rule in rules)
        listed = json.dumps(quantization[keys[fmt]]).replace("\\", "")
        assert prefix in listed
    assert static.check(folder, model) == []
    from_quantized(folder)
    (folder / "run.json").unlink()  # of another tool
    assert not [f for f in static.check(folder) if f.severity == "error"]


@pytest.mark.parametrize("fmt", ["auto_round", "auto_gptq", "compressed_tensors", "mlx", "fake"])
@pytest.mark.parametrize("name", FURTHER)
def test_rounded_to_eight_bits(name, fmt, tmp_path, capsys):
    model, extra = saved(name, tmp_path / "model")
    assert command(model, tmp_path / "out", "--format", fmt, "--quant_mtp") == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert static.check(folder, model) == []

    decoded = dict(dequantized_state_dict(folder, torch.float32))
    new = FURTHER[name][2]
    changed = {key for key, value in extra.items() if not torch.equal(decoded[key], value)}
    # what joins states, and the router
    plain = ("eh_proj.weight", "fc.weight", "mlp.gate.weight", "shared_expert_gate.weight")
    linear = {key for key, v in extra.items() if v.ndim == 2 and not key.endswith(plain)}
    assert changed and changed <= linear and all(key.startswith(new) for key in changed)
    assert f"{new}self_attn.o_proj.weight" in changed
    for key in changed:
        error = (decoded[key] - extra[key]).norm() / extra[key].norm()
        assert 0 < error < 0.01, key
    if fmt != "fake":
        quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
        scheme = formats.scheme_of(quantization, f"{new}self_attn.o_proj")
        assert scheme.bits == 8
    from_quantized(folder)


@pytest.mark.parametrize("more", [[], ["--quant_mtp"]])
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe", "glm4_moe"])
def test_streamed_from_shards_is_the_same(name, more, tmp_path):
    model, _ = saved(name, tmp_path / "model")
    made = []
    for stream in ("--no_stream", "--stream"):
        words = ["--format", "auto_round", stream, *more]
        assert command(model, tmp_path / stream, *words) == 0
        (folder,) = (tmp_path / stream).iterdir()
        files = sorted(folder.glob("*.safetensors"))
        made.append({k: v for file in files for k, v in load_file(file).items()})
        sharded(model) if (model / "model.safetensors").exists() else None
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][key], made[1][key]) for key in made[0])


def test_stacked_experts_of_a_further_layer_are_named_one_by_one(tmp_path):
    """vLLM asks for `experts.0.gate_proj` of what it builds, and would take it for quantized."""
    model, _ = saved("qwen3_5_moe", tmp_path / "model")
    for fmt, says in LEFT.items():
        assert command(model, tmp_path / "out", "--format", fmt, "--quant_mtp") == 0
        folder = tmp_path / "out" / f"model-w4g32-{fmt}"
        quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            assert says(quantization, f"mtp.layers.0.mlp.experts.3.{leaf}", str), (fmt, leaf)
            assert not says(quantization, f"model.layers.1.mlp.experts.3.{leaf}", str), (fmt, leaf)


@pytest.mark.parametrize("fmt", ["auto_awq", "gguf"])
def test_formats_without_mixed_bits_are_one_line(fmt, tmp_path, capsys):
    model, _ = saved("llama", tmp_path / "model")
    assert command(model, tmp_path / "out", "--format", fmt, "--quant_mtp") == 2
    assert "quant_mtp" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_to_round_is_one_line(tmp_path, capsys):
    FURTHER["llama"][0].save(tmp_path / "model", tiny_tokenizer())
    assert command(tmp_path / "model", tmp_path / "out", "--quant_mtp") == 2
    assert "no layers that its class does not load" in " ".join(capsys.readouterr().err.split())


def test_the_plan_and_the_api_say_it(tmp_path, capsys):
    model, _ = saved("qwen3_next", tmp_path / "model")
    assert cli.main(["plan", "--model", str(model), "--group_size", "32", "--quant_mtp"]) == 0
    shown = capsys.readouterr().out
    assert "mtp.fc" in shown and "does not load it" in shown.replace("\n", " ")
    quantizer = AutoRoundMLLM(
        str(model), iters=0, group_size=32, device="cpu", quant_mtp=True, sym=False
    )
    quantizer.quantize()
    (out,) = quantizer.save_quantized(tmp_path / "out")
    assert quantizer.layer_config["mtp.layers.0.self_attn.q_proj"]["bits"] == 8
    assert quantizer.layer_config["mtp.fc"]["bits"] == 16
    assert "mtp.layers.0.self_attn.q_proj.qweight" in read_checkpoint(out).files
    assert static.check(out, model) == []


# Format -> whether a configuration says that a module is not quantized.
LEFT = {
    "auto_round": lambda q, name, turn: any(
        rule.get("bits") == 16 and (turn(key) == name or re.fullmatch(key, name))
        for key, rule in q["extra_config"].items()
    ),
    "auto_gptq": lambda q, name, turn: any(
        rule[:2] == "-:" and re.match(rule[2:], name) for rule in q["dynamic"]
    ),
    "compressed_tensors": lambda q, name, turn: any(
        re.match(key[3:], name) if key[:3] == "re:" else turn(key) == name for key in q["ignore"]
    ),
}


@pytest.mark.parametrize("fmt", LEFT)
@pytest.mark.parametrize("more", ([], ["--quant_mtp"]))
@pytest.mark.parametrize("name", ["gemma3n_text", "gemma4"])
def test_shared_keys_and_values_stay_with_their_queries(name, more, fmt, tmp_path, capsys):
    """The files have keys and values of layers that use earlier ones'; vLLM reads them with q."""
    FAMILIES[name].save(tmp_path / "model", tiny_tokenizer())
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    sharing = [
        key.removesuffix("q_proj.weight")
        for key in tensors
        if key.endswith("self_attn.q_proj.weight") and key.replace("q_pr", "k_pr") not in tensors
        and "vision" not in key
    ]  # fmt: skip
    extra = {f"{at}{leaf}_proj.weight": torch.randn(32, 64) for at in sharing for leaf in "kv"}
    assert len(extra) == 4
    save_file(tensors | extra, path, metadata={"format": "pt"})
    code = command(tmp_path / "model", tmp_path / "out", "--format", fmt, *more)
    if more:  # nothing further is there to be rounded
        assert code == 2 and "no layers that its class does not load" in capsys.readouterr().err
        return
    assert code == 0
    (folder,) = (tmp_path / "out").iterdir()
    after = load_file(folder / "model.safetensors")
    assert all(torch.equal(after[key], value) for key, value in extra.items())
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    for key in (f"{at}{leaf}_proj" for at in sharing for leaf in "qkv"):
        assert f"{key}.weight" in after
        # vLLM turns the names of a configuration as it does those of the files.
        for turn in (str, partial(vllm_module, name)):
            assert LEFT[fmt](quantization, turn(key), turn), key
    assert f"{sharing[0]}o_proj.weight" not in after
    found = static.check(folder, tmp_path / "model")
    assert not [f for f in found if "no chat template" not in f.message]
