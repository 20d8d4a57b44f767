"""Experts of every family: in the plan, the same model when they are separated, exports that
Transformers reads, and a line before anything is tuned where it does not."""

import json
import re
from pathlib import Path

import mixtures
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_tokenizer
from torch import nn
from transformers import Mxfp4Config

from auto_mmround import AutoRoundMLLM, UserError, cli
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.checkpoint.reading import Decoded
from auto_mmround.model.experts import separable, separated
from auto_mmround.model.loading import NONSENSE, load
from auto_mmround.model.structure import LINEAR
from auto_mmround.numerics.activations import rounded_inputs
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.plan import make_plan
from auto_mmround.verify import static

# Each stacks its experts in a way of its own, or computes something else with them.
KINDS = (
    "qwen3_moe", "mixtral", "qwen3_vl_moe", "llama4", "granitemoehybrid", "aria", "inkling_text",
    "gpt_oss", "nemotron_h", "jetmoe", "muse_spark", "hy_v4", "minimax_m3_vl_text", "glm5_next",
    "step3p7", "ernie4_5_vl_moe", "lfm2_moe", "zaya", "mistral4",
)  # fmt: skip
KEPT = ("dbrx", "longcat_flash")  # their experts stay
IDS = torch.randint(3, 110, (1, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda handle: None)


def saved(kind: str, folder: Path) -> Path:
    mixtures.build(kind).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def command(model: Path, out: Path, fmt: str, *more: str) -> list[str]:
    words = ["--model", str(model), "--output_dir", str(out), "--iters", "0", "--format", fmt]
    return [*words, "--group_size", "32", "--device", "cpu", *more]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def missing_from_plan(model, plan) -> list[str]:
    """Matrices that are neither in the plan nor in an embedding or convolution."""
    known = {weight.name for weight in plan.weights}
    stacked = {expert.parameter for expert in separable(model).values()}
    found = []
    for path, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd)):
            continue
        for name, weight in module.named_parameters(path, recurse=False):
            names = {path} if isinstance(module, LINEAR) else {name, name.removesuffix(".weight")}
            if weight.ndim > 1 and not names & known and name not in stacked:
                found.append(name)
    return found


@pytest.mark.parametrize("kind", [*KINDS, *KEPT])
def test_experts_are_separable_and_every_matrix_is_in_the_plan(kind):
    model = mixtures.build(kind)
    plan = make_plan(model, Recipe(group_size=32, format="fake"))
    assert missing_from_plan(model, plan) == []
    assert set(separable(model)) <= {weight.name for weight in plan.weights}
    assert any("experts" in name for name in plan.kept) == (kind in KEPT) or kind not in KEPT
    before = logits(model)
    with separated(model):
        after = logits(model)
    assert torch.allclose(before, after, atol=1e-5)
    quantized = {name for name in separable(model) if name in plan.quantized}
    assert bool(quantized) == (kind not in KEPT)


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_moe_text", "qwen2_moe"])
def test_what_gates_the_shared_expert_stays(kind):
    """vLLM builds it without a quantization; one output is no multiple of anything."""
    plan = make_plan(mixtures.build(kind), Recipe(group_size=32, format="compressed_tensors"))
    gates = {name for name in plan.kept if name.endswith("shared_expert_gate")}
    assert gates and all("router" in plan.kept[name] for name in gates)
    assert not any("expert_gate" in name for name in plan.quantized)


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
def test_what_chooses_the_tokens_of_attention_stays(kind):
    """vLLM has `indexer.wk` and `indexer.weights_proj` as one matrix without a quantization."""
    plan = make_plan(mixtures.build(kind), Recipe(group_size=32, format="compressed_tensors"))
    found = {name for name in plan.kept if ".indexer." in name}
    assert {name.rpartition(".")[2] for name in found} == {"wk", "wq_b", "weights_proj"}
    assert not any(".indexer." in name for name in plan.quantized)


@pytest.mark.slow
@pytest.mark.parametrize("kind", mixtures.families())
def test_every_matrix_of_every_class_is_in_the_plan(kind):
    try:
        with torch.device("meta"):
            empty = mixtures.class_of(kind)(mixtures.config_of(kind))
        if sum(p.numel() for p in empty.parameters()) > 5e7:
            pytest.skip("large")
        model = mixtures.build(kind)
    except NONSENSE as error:  # a configuration that needs a row of its own
        pytest.skip(str(error)[:80])
    plan = make_plan(model, Recipe(group_size=32, format="fake"))
    assert missing_from_plan(model, plan) == []


@pytest.mark.parametrize("kind", [*KINDS, *KEPT])
@pytest.mark.parametrize("stream", ["--stream", "--no_stream"])
def test_transformers_reads_the_dequantized_checkpoint(kind, stream, tmp_path):
    """No parameter is made up, and each holds what was tuned: streamed or not, the logits are those
    of the decoded codes."""
    source = saved(kind, tmp_path / "model")
    assert cli.main(command(source, tmp_path / "out", "fake", stream)) == 0
    cls = mixtures.class_of(kind)
    folder = tmp_path / "out" / "model-w4g32-fake"
    loaded, info = cls.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    original = cls.from_pretrained(source, dtype=torch.float32)
    experts = separable(original)
    states = loaded.state_dict(), original.state_dict()
    for name, expert in experts.items():
        new, old = (expert.of(state[expert.parameter]) for state in states)
        error = float((new - old).norm() / old.norm())
        assert 0.01 < error < 0.2, name  # rounded to 4 bits, not made up and not untouched
    assert torch.isfinite(logits(loaded.eval())).all()


def published(folder: Path) -> Path:
    """A gpt-oss as it is published, with experts in MXFP4."""
    mixtures.build("gpt_oss").bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    draw = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        shape = (experts, rows, columns // 32)
        tensors[f"{name}_blocks"] = torch.randint(
            256, (*shape, 16), generator=draw, dtype=torch.uint8
        )
        tensors[f"{name}_scales"] = torch.randint(
            118, 123, shape, generator=draw, dtype=torch.uint8
        )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = (folder / "config.json").read_text()
    method = '"quantization_config": {"quant_method": "mxfp4"},'
    (folder / "config.json").write_text(config.replace("{", "{" + method, 1))
    return folder


@pytest.mark.parametrize("stream", ["--no_stream", "--stream"])
def test_gpt_oss_is_read_in_mxfp4(stream, tmp_path):
    """The values are those of Transformers, and an export holds them; streamed too."""
    folder = published(tmp_path / "model")
    model = mixtures.class_of("gpt_oss")
    theirs = model.from_pretrained(folder, quantization_config=Mxfp4Config(dequantize=True))
    loaded = load(str(folder), stream=stream == "--stream")
    layers = [f"model.layers.{i}" for i in range(theirs.config.num_hidden_layers)]
    with loaded.holder.resident(layers):
        for name, value in theirs.state_dict().items():
            if name.endswith("_proj"):
                assert torch.equal(value.float(), loaded.model.state_dict()[name].float()), name
    more = [stream, "--ignore", "re:.*experts.*"]
    assert cli.main(command(folder, tmp_path / "out", "fake", *more)) == 0
    again = model.from_pretrained(tmp_path / "out" / "model-w4g32-fake")
    for name, value in again.state_dict().items():
        if name.endswith("experts.down_proj"):
            assert torch.equal(value.float(), theirs.state_dict()[name].float())


def test_mxfp4_is_tuned_alike_whole_and_streamed(tmp_path):
    folder = published(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(
        "\n".join(json.dumps({"text": "w5 w9 " * 8 + f"w{i}"}) for i in range(4, 8))
    )
    made = []
    for stream in ("--no_stream", "--stream"):
        more = ["--dataset", str(tmp_path / "rows.jsonl"), "--nsamples", "4", "--disable_amp"]
        words = command(folder, tmp_path / stream, "fake", stream, "--seqlen", "17", *more)
        words[words.index("--iters") + 1] = "1"
        assert cli.main(words) == 0
        made.append(load_file(tmp_path / stream / "model-w4g32-fake" / "model.safetensors"))
    experts = [name for name in made[0] if ".experts." in name and name.endswith("_proj")]
    assert experts and all(made[0][name].is_floating_point() for name in experts)
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])


@pytest.mark.parametrize("stream", ["--no_stream", "--stream"])
def test_gpt_oss_is_packed_with_its_biases(stream, tmp_path):
    """Out of MXFP4 into single experts, as AutoRound takes them apart: the model is that of the
    same codes as `fake`."""
    folder = published(tmp_path / "model")
    assert cli.main(command(folder, tmp_path / "out", "auto_round,fake", stream)) == 0
    packed, plain = (tmp_path / "out" / f"model-w4g32-{fmt}" for fmt in ("auto_round", "fake"))
    keys = load_file(packed / "model.safetensors").keys()
    ends = ("gate_proj.qweight", "up_proj.qweight", "down_proj.bias", "gate_proj.bias")
    assert all(f"model.layers.1.mlp.experts.3.{end}" in keys for end in ends)
    assert not any(key.endswith(("_proj_bias", "_blocks", "gate_up_proj")) for key in keys)
    found = [logits(from_quantized(f, dtype="float32").model) for f in (packed, plain)]
    assert torch.allclose(*found, atol=2e-2 * found[0].std().item())  # fake is in bfloat16
    assert [f for f in static.check(packed, folder) if "no chat template" not in f.message] == []


def test_experts_with_biases_that_stay_are_one_stack(tmp_path):
    """So vLLM's gpt-oss reads them; it drops single ones in silence, and is refused those."""
    words = command(published(tmp_path / "model"), tmp_path / "out", "auto_round")
    assert cli.main([*words, "--engines", "vllm", "--ignore", "re:.*experts.*"]) == 0
    folder = tmp_path / "out" / "model-w4g32-auto_round"
    keys = load_file(folder / "model.safetensors").keys()
    assert {f"model.layers.0.mlp.experts.{end}" for end in ("down_proj", "down_proj_bias")} <= keys
    assert not any(".experts.0." in key for key in keys)
    from_quantized(folder)
    assert cli.main(["plan", *words, "--engines", "vllm"]) == 2


def test_single_experts_out_of_stacks_keep_the_dtype_of_the_source(tmp_path):
    """float16, which a processor loads as float32."""
    stays = ["--engines", "vllm", "--ignore", "re:.*experts.2.*"]
    rows = [("gpt_oss", "down_proj.bias", []), ("qwen3_vl_moe", "down_proj.weight", stays)]
    for kind, wanted, more in rows:
        mixtures.build(kind).half().save_pretrained(tmp_path / kind)
        tiny_tokenizer().save_pretrained(tmp_path / kind)
        assert cli.main(command(tmp_path / kind, tmp_path / "out", "auto_round", *more)) == 0
        folder = tmp_path / "out" / f"{kind}-w4g32-auto_round"
        tensors = load_file(folder / "model.safetensors")
        found = {t.dtype for key, t in tensors.items() if key.endswith(f"experts.2.{wanted}")}
        assert found == {torch.float16}


@pytest.mark.parametrize("kind", ["qwen3_vl_moe", "granitemoehybrid"])
def test_verify_knows_single_experts_of_stacks_in_the_source(kind, tmp_path):
    source = saved(kind, tmp_path / "model")
    assert cli.main(command(source, tmp_path / "out", "auto_round")) == 0
    folder = tmp_path / "out" / "model-w4g32-auto_round"
    assert [f for f in static.check(folder, source) if f.severity == "error"] == []
    tensors = load_file(folder / "model.safetensors")
    gone = next(key for key in tensors if ".1.down_proj." in key)
    del tensors[gone]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    assert [f for f in static.check(folder, source) if f.severity == "error"]


NVFP4 = ("--data_type", "nvfp4", "--group_size", "16")  # the last word wins
REFUSED = [
    ("qwen3_moe", "auto_gptq", (), "takes no auto_gptq with quantized experts"),
    ("mixtral", "auto_round", (), "names w1, w2, w3"),
    ("lfm2_moe", "auto_round", (), "names w1, w2, w3"),
    ("llama4_text", "auto_round", (), "with Llama 4's experts"),
    ("gpt_oss", "auto_round", ("--ignore", "re:.*experts.*"), "with experts that stay"),
    ("bailing_hybrid", "auto_round", (), "merges while loading"),
    ("longcat_flash", "auto_round", (), "merges while loading"),
    ("kimi_linear", "compressed_tensors", (), "merges while loading"),
    ("qwen3_moe", "compressed_tensors", ("--ignore", "re:.*experts.*"), "merges while loading"),
    ("qwen3_moe", "compressed_tensors", ("--ignore", "re:.*experts.2.*"), "merges while loading"),
    ("qwen3_vl_moe", "compressed_tensors", (), "that the source stacks"),
    ("granitemoehybrid", "compressed_tensors", (), "that the source stacks"),
    ("qwen3_moe", "compressed_tensors", ("--asym",), "asymmetric experts"),
    ("qwen3_moe", "compressed_tensors", NVFP4, "experts in NVFP4"),
]


@pytest.mark.parametrize("kind, fmt, more, said", REFUSED)
def test_what_transformers_would_load_otherwise_is_refused(kind, fmt, more, said, tmp_path, capfd):
    words = command(saved(kind, tmp_path / "model"), tmp_path / "out", fmt, *more)
    assert cli.main(words) == 2
    lines = capfd.readouterr().err.splitlines()
    assert any(said in line and "--engines vllm" in line for line in lines), lines
    assert not list((tmp_path / "out").glob("model*"))
    assert cli.main(["plan", *words]) == 2
    assert cli.main(["plan", *words, "--engines", "vllm"]) == 0


@pytest.mark.parametrize("fmt", ["auto_round", "compressed_tensors"])
@pytest.mark.parametrize("kind", ["step3p7", "jetmoe", "muse_spark"])
def test_stacks_that_no_reader_takes_apart_are_refused(kind, fmt, tmp_path, capfd):
    words = command(saved(kind, tmp_path / "model"), tmp_path / "out", fmt)
    assert cli.main(words) == 2
    said = re.search(r"one by one; keep them with (--fp_layers) (\S+),", capfd.readouterr().err)
    assert cli.main([*words, *said.groups(), "--engines", "vllm"]) == 0  # as the line says
    (out,) = (tmp_path / "out").glob(f"*-{fmt}")
    tensors = load_file(out / "model.safetensors")
    packed = [key for key in tensors if key.endswith((".qweight", ".weight_packed"))]
    assert packed and not any(".input_linear." in key or ".experts." in key for key in packed)
    assert not torch.allclose(
        logits(from_quantized(out, dtype="float32").model), logits(mixtures.build(kind)), atol=1e-4
    )


@pytest.mark.parametrize("kind", ["granitemoehybrid", "aria_text", "inkling2_text"])
def test_stacks_that_checkpoints_call_otherwise_come_apart(kind, tmp_path):
    """Checkpoints say `input_linear`, `fc1` or `w13_weight`, the model `experts.gate_up_proj`: the
    latter is what engines read (`test_engine_experts.py`)."""
    source = saved(kind, tmp_path / "model")
    assert cli.main(command(source, tmp_path / "out", "auto_round,fake")) == 0
    packed, plain = (tmp_path / "out" / f"model-w4g32-{fmt}" for fmt in ("auto_round", "fake"))
    keys = load_file(packed / "model.safetensors").keys()
    assert any(key.endswith(".experts.3.down_proj.qweight") for key in keys)
    assert not any(
        word in key for key in keys for word in ("moe.input_linear", "fc1", "w13_weight")
    )
    found = [logits(from_quantized(f, dtype="float32").model) for f in (packed, plain)]
    assert torch.allclose(*found, atol=1e-5)
    assert not torch.allclose(found[0], logits(mixtures.build(kind)), atol=0.05)


@pytest.mark.parametrize(
    "kind",
    ["qwen3_moe", "mixtral", "minimax_m2", "lfm2_moe", "deepseek_v3", "nemotron_h", "glm4v_moe"],
)
def test_transformers_reads_experts_with_compressed_tensors(kind, tmp_path):
    pytest.importorskip("compressed_tensors")
    source = saved(kind, tmp_path / "model")
    for fmt in ("compressed_tensors", "fake"):
        assert cli.main(command(source, tmp_path / "out", fmt)) == 0
    cls = mixtures.class_of(kind)
    found = []
    for fmt in ("compressed_tensors", "fake"):
        loaded, info = cls.from_pretrained(
            tmp_path / "out" / f"model-w4g32-{fmt}", output_loading_info=True, dtype=torch.float32
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        found.append(logits(loaded.eval()))
    assert torch.allclose(*found, atol=5e-3)


def test_what_stays_is_named_as_the_checkpoint_has_it(tmp_path):
    """Step-3.7's `share_expert` is `mlp.shared_experts` in Transformers, MiniMax-M3's shared gate
    and up are one layer there: engines know them by either name."""
    for kind, more in (("step3p7", ("--ignore", "re:.*experts.*")), ("minimax_m3_vl", ())):
        words = command(saved(kind, tmp_path / kind), tmp_path / "out", "compressed_tensors", *more)
        assert cli.main([*words, "--engines", "vllm"]) == 0


def test_an_engine_that_there_is_not(tmp_path, capfd):
    assert cli.main(["plan", "--model", "demo", "--engines", "vlm"]) == 2
    assert "engines: no engine 'vlm'" in capfd.readouterr().err


def test_a_format_that_is_named_when_saving(tmp_path):
    job = AutoRoundMLLM(
        mixtures.build("mixtral"), tiny_tokenizer(), iters=0, group_size=32, device="cpu"
    )
    job.quantize()
    with pytest.raises(UserError, match="names w1, w2, w3"):
        job.save_quantized(tmp_path / "a", format="auto_round")
    assert not (tmp_path / "a").exists()
    assert job.save_quantized(tmp_path / "b", format="compressed_tensors")[0].is_dir()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", ["qwen3_moe", "llama4"])
def test_inputs_of_experts_are_rounded_as_engines_do(kind, stream, tmp_path):
    out = tmp_path / "out"
    words = command(saved(kind, tmp_path / "model"), out, "compressed_tensors", "--scheme", "FP8")
    at = words.index("--group_size")
    assert cli.main([*words[:at], *words[at + 2 :]]) == 0
    (folder,) = out.iterdir()
    rounded = from_quantized(folder, dtype="float32", activations=True, stream=stream)
    model = from_quantized(folder, dtype="float32").model
    plain, experts = logits(model), separable(model)
    packed = Decoded(folder).packed
    with separated(model, experts):
        for name, key in stored_names(model, experts).items():
            if key in packed:
                model.get_submodule(name).register_forward_pre_hook(rounding)
        wanted = logits(model)
    assert any(".experts." in key for key in packed)
    assert torch.allclose(logits(rounded.model), wanted, atol=1e-6)
    assert not torch.allclose(plain, wanted, atol=1e-3)


def rounding(_, given):
    x = given[0]
    return (rounded_inputs(x, "fp8", 8, -1) if x.numel() else x,)


def stored_names(model, experts) -> dict[str, str]:
    """Layer, also of experts that are separated -> its name in the checkpoint."""
    names = {name: expert.key.removesuffix(".weight") for name, expert in experts.items()}
    layers = (name for name, module in model.named_modules() if isinstance(module, LINEAR))
    return {name: names.get(name, name) for name in layers}
