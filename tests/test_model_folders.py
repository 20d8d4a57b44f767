"""Model folders as people have them: quantized in ways told anywhere or nowhere, old files beside
new ones, no head."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_fp8 import in_fp8, saved
from tiny_models import FAMILIES, tiny_tokenizer
from torch import nn
from transformers import FineGrainedFP8Config, LlamaModel
from transformers.modeling_utils import _get_resolved_checkpoint_files

from auto_mmround import AutoRoundMLLM, cli
from auto_mmround.checkpoint.loader import load_any
from auto_mmround.errors import UserError
from auto_mmround.model.loading import load
from auto_mmround.model.quantized import check_floating
from auto_mmround.model.stored import Reader, decoded, stored_tensors
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run.finished import identity
from auto_mmround.untrusted import INDEX, weight_files
from auto_mmround.verify.static import check

CT = {
    "format": "float-quantized",
    "config_groups": {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}
    },
}
MODELOPT = {
    "producer": {"name": "modelopt"},
    "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"},
}
Q_PROJ = "model.layers.0.self_attn.q_proj"


def edited(folder: Path, change, tensors=None) -> Path:
    """The folder with another configuration and, if ``tensors`` is given, other tensors."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        old = load_file(folder / "model.safetensors")
        tensors(old)
        save_file(
            {key: tensor.contiguous() for key, tensor in old.items()}, folder / "model.safetensors"
        )
    return folder


def taken(config):
    return config.pop("quantization_config")


def told_in(place):
    """What moves the configuration of a quantization to another place."""

    def move(config):
        found = taken(config)
        for name in place[:-1]:
            config = config[name]
        config[place[-1]] = found if place[-1] == "quantization_config" else CT

    return move


def respelled(tensors):
    """`weight_scale_inv` -> `weight_scale`, and what else such files hold."""
    for key in [key for key in tensors if key.endswith("_scale_inv")]:
        tensors[key.removesuffix("_inv")] = tensors.pop(key)
    tensors.update({f"{Q_PROJ}.{part}": torch.tensor(0.5) for part in ("input_scale", "k_scale")})


PLACES = {
    "nested": ("qwen2_vl", told_in(["text_config", "quantization_config"]), None),
    "nested twice": (
        "qwen2_vl",
        lambda c: c["text_config"].update(deep={"quantization_config": taken(c)}),
        None,
    ),
    "compression_config": ("llama", told_in(["compression_config"]), respelled),
    "ModelOpt": ("llama", lambda c: c.update(quantization_config={"quant_algo": "FP8"}), respelled),
    "fbgemm": (
        "llama",
        lambda c: c.update(quantization_config={"quant_method": "fbgemm_fp8"}),
        respelled,
    ),
    "nowhere": ("llama", taken, None),
    "dtype float8": ("llama", lambda c: (taken(c), c.update(dtype="float8_e4m3fn")), None),
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("place", [*PLACES, "hf_quant_config.json"])
def test_fp8_is_decoded_wherever_it_is_told(place, stream, tmp_path):
    name, change, tensors = PLACES.get(place, ("llama", taken, respelled))
    folder, twin = saved(name, tmp_path / "model"), tmp_path / "twin"
    in_fp8(folder, None)
    shutil.copytree(folder, twin)  # as this was read before: told at the top
    edited(folder, change, tensors)
    if place.startswith("hf"):
        (folder / place).write_text(json.dumps(MODELOPT))
    wanted, ours = load(str(twin)).model.state_dict(), load(str(folder), stream=stream)
    blocks = [name for name in ours.model.state_dict() if "layers.0" in name]
    with ours.holder.resident(sorted({name.split("layers.0")[0] + "layers.0" for name in blocks})):
        found = {
            key: tensor for key, tensor in ours.model.state_dict().items() if not tensor.is_meta
        }
        assert any("layers.0" in key and key.endswith("q_proj.weight") for key in found)
        assert all(torch.equal(tensor, wanted[key]) for key, tensor in found.items())
        assert all(
            tensor.dtype == torch.bfloat16
            for tensor in found.values()
            if tensor.is_floating_point()
        )


def test_results_of_such_sources_are_plain_and_verified_against_them(tmp_path):
    folder = edited(in_fp8(saved("qwen2_vl", tmp_path / "model"), None), PLACES["nested"][1])
    (folder / "hf_quant_config.json").write_text(json.dumps(MODELOPT))
    recipe = Recipe(model=str(folder), output_dir=str(tmp_path), format="auto_round,fake",
        group_size=32, iters=0,
                    device="cpu")  # fmt: skip
    for made in jobs.run(jobs.prepare(recipe, jobs.load_model(recipe))):
        config = json.loads((made / "config.json").read_text())
        assert (
            "quantization_config" not in config["text_config"]
            and not (made / "hf_quant_config.json").exists()
        )
        assert not [finding for finding in check(made, folder) if finding.severity == "error"]
    assert load_any(str(folder)).model.dtype == torch.bfloat16


def at_q(**parts):
    """What replaces the tensors of a layer: its weight and what lies beside it; "as" keeps a
    tensor."""

    def change(tensors):
        for part, tensor in parts.items():
            tensors[f"{Q_PROJ}.{part}"] = (
                tensor(tensors[f"{Q_PROJ}.weight"]) if callable(tensor) else tensor
            )

    return change


def uint8(w):
    return torch.zeros(w.shape[0], w.shape[1] // 2, dtype=torch.uint8)


REFUSED = {
    "no scale": (at_q(weight=lambda w: w.to(torch.float8_e4m3fn)),
        "stored in FP8, but the files hold no scale"),
    "E5M2": (at_q(weight=lambda w: w.to(torch.float8_e5m2)),
        "stored in FP8, but the files hold no scale"),
    "other name": (at_q(weight=lambda w: w.to(torch.float8_e4m3fn), scale=torch.ones(1)),
        "hold no scale for it"),
    "E8M0": (at_q(weight=lambda w: w.abs().to(torch.float8_e8m0fnu)),
        "stored as F8_E8M0, which is not read"),
    "bitsandbytes": (at_q(weight=uint8), "weight is stored as U8, packed"),
    "int8": (at_q(weight=lambda w: w.to(torch.int8), weight_scale=torch.ones(64, 1)),
        "weight is stored as I8, packed"),
    "NVFP4": (at_q(weight=uint8, weight_scale=torch.ones(64, 4).to(torch.float8_e4m3fn)),
        "weight is stored as U8"),
    "GPTQ": (at_q(qweight=torch.zeros(8, 64, dtype=torch.int32)),
        "qweight is stored as I32, packed"),
    "packed": (at_q(weight_packed=torch.zeros(64, 8, dtype=torch.int32)),
        "weight_packed is stored as I32, packed"),
    "stacked": (at_q(gate_up_proj_blocks=torch.zeros(4, dtype=torch.uint8)),
        "gate_up_proj_blocks is stored as U8"),
    "cast": (at_q(weight_scale_inv=torch.ones(1)),
        "and has a scale beside it, .*whether it is applied is not known"),
    "two scales": (
        at_q(weight=lambda w: w.to(torch.float8_e4m3fn), weight_scale=torch.ones(1),
            weight_scale_2=torch.ones(1)),
        "stored in FP8 with .*weight_scale_2, which is not read",
    ),
    "smoothed": (at_q(pre_quant_scale=torch.ones(64)),
        "weight needs .*pre_quant_scale on its inputs"),
    "scale in FP8": (
        at_q(weight=lambda w: w.to(torch.float8_e4m3fn), weight_scale=torch.ones(64,
            2).to(torch.float8_e4m3fn)),
        "weight_scale, a scale, is stored as F8_E4M3",
    ),
    "untold blocks": (
        at_q(weight=lambda w: w.to(torch.float8_e4m3fn), weight_scale=torch.ones(5, 2)),
        "its scale, .* does not fit its shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_values_that_are_not_known_end_the_run_in_one_line(case, tmp_path, capsys):
    change, words = REFUSED[case]
    folder = edited(saved("llama", tmp_path / "model"), lambda c: None, change)
    out = tmp_path / "out"
    for stream in ("--stream", "--no_stream"):
        options = [
            "--iters",
            "0",
            "--group_size",
            "32",
            "--format",
            "fake",
            "--output_dir",
            str(out),
        ]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            assert cli.main(["--model", str(folder), stream, *options]) == 2
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.search(words, last), last
    assert not out.exists()


@pytest.mark.parametrize(
    "quantization, words",
    [
        ({"quant_method": "bitsandbytes"}, r"quantized already \(bitsandbytes\)"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"R4": {}}},
            "its inputs transformed",
        ),
        ("fp8", "is no object"),
        ({"group_size": 32, "bits": 4, "mode": "affine"}, r"quantized already \(affine\)"),
    ],
)
def test_other_quantizations_are_refused_wherever_told(quantization, words, tmp_path):
    folder = saved("qwen2_vl", tmp_path / "model")
    edited(folder, lambda config: config["text_config"].update(quantization_config=quantization))
    with pytest.raises(UserError, match=words):
        load(str(folder))


def test_a_configuration_left_over_is_no_quantization(tmp_path):
    folder = saved("llama", tmp_path / "model")
    wanted = load(str(folder)).model.state_dict()
    edited(folder, lambda config: config.update(quantization_config={"quant_method": "fp8"}))
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": None}}))
    found = load(str(folder)).model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


def test_scales_of_blocks_and_stacks():
    q = torch.randn(300, 8).to(torch.float8_e4m3fn)
    grid = torch.rand(3, 1)
    with pytest.raises(UserError, match="does not fit"):
        decoded("w", q, grid)  # 100 rows a block, or 128 and a shorter one
    cut = decoded("w", q, grid, [(128, 128)])
    assert torch.equal(cut[256:], (q.float()[256:] * grid[2]).bfloat16())
    with pytest.raises(UserError, match="does not fit"):
        decoded("w", q, grid, [(64, 64)])
    assert torch.equal(
        decoded("w", q, grid, [(64, 64), (100, 8)])[100:200],
        (q.float()[100:200] * grid[1]).bfloat16(),
    )
    stack = torch.randn(4, 6, 8).to(torch.float8_e4m3fn)
    for shape in ((4,), (4, 1, 1), (1, 6, 1), (4, 6, 1), (4, 1, 8)):
        s = torch.rand(shape)
        wide = s.reshape(-1, 1, 1) if len(shape) == 1 else s
        assert torch.equal(decoded("w", stack, s), (stack.float() * wide).bfloat16())
    for shape in ((2, 6, 1), (4, 6), (0,), (4, 12, 1)):
        with pytest.raises(UserError, match="does not fit"):
            decoded("w", stack, torch.rand(shape))
    # 2^-1 and 2^2, as MXFP8 stores them
    exponents = torch.tensor([[126], [129]], dtype=torch.uint8)
    q = torch.ones(2, 4).to(torch.float8_e4m3fn)
    wanted = torch.tensor([0.5, 4.0])[:, None].expand(2, 4).bfloat16()
    assert torch.equal(decoded("w", q, exponents), wanted)
    assert torch.equal(decoded("w", q, exponents.view(torch.float8_e8m0fnu)), wanted)


def test_a_model_that_was_loaded_quantized_is_refused(tmp_path):
    folder = in_fp8(saved("llama", tmp_path / "model"), 32)
    kwargs = {"weight_block_size": (32, 32), "dequantize": True}
    model = (
        FAMILIES["llama"]
        .build()
        .__class__.from_pretrained(folder, quantization_config=FineGrainedFP8Config(**kwargs))
    )
    check_floating(model)
    options = {"group_size": 32, "iters": 0, "device": "cpu"}
    for dtype in (torch.float8_e4m3fn, torch.int8):
        cast = FAMILIES["llama"].build()
        layer = cast.get_submodule(Q_PROJ)
        layer.weight = nn.Parameter(layer.weight.data.to(dtype), requires_grad=False)
        with pytest.raises(
            UserError, match=rf"holds {Q_PROJ}.weight as {dtype}, not as plain floating point"
        ):
            AutoRoundMLLM(cast, tiny_tokenizer(), **options).quantize()
    model.hf_quantizer = SimpleNamespace(quantization_config=FineGrainedFP8Config())  # as on a GPU
    with pytest.raises(UserError, match=r"the model was loaded quantized \(fp8\)"):
        AutoRoundMLLM(model, tiny_tokenizer(), **options).quantize()


# ---- one resolution of files


def in_shards(folder: Path, tensors) -> None:
    names = sorted(tensors)
    halves = {
        "model-00001-of-00002.safetensors": names[::2],
        "model-00002-of-00002.safetensors": names[1::2],
    }
    for file, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / file, {"format": "pt"})
    table = {key: file for file, keys in halves.items() for key in keys}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))


def beside(folder: Path, layout: str) -> None:
    """Files of other values, 2 W, in several layouts; those of W are what Transformers reads."""
    tensors = load_file(folder / "model.safetensors")
    other = {key: 2 * tensor for key, tensor in tensors.items()}
    if layout == "old index":
        in_shards(folder, other)
    elif layout == "sharded":
        in_shards(folder, tensors)
        (folder / "model.safetensors").unlink()
        save_file(other, folder / "model-00003-of-00003.safetensors")
    elif layout == "twice":  # of a tensor in two shards the later counts
        in_shards(folder, tensors)
        (folder / "model.safetensors").unlink()
        first = folder / "model-00001-of-00002.safetensors"
        twice = {key: other[key] for key in load_file(folder / "model-00002-of-00002.safetensors")}
        save_file(load_file(first) | twice, first, {"format": "pt"})
    elif layout == "named":
        (folder / "model.safetensors").rename(folder / "weights.safetensors")
        save_file(other, folder / "model.safetensors", {"format": "pt"})
        edited(folder, lambda config: config.update(transformers_weights="weights.safetensors"))
    for name in ("consolidated.safetensors", "model.fp16.safetensors", "zz.safetensors"):
        save_file(other, folder / name, {"format": "pt"})


@pytest.mark.parametrize("layout", ["old index", "sharded", "twice", "named", "plain"])
def test_every_way_of_reading_reads_what_transformers_reads(layout, tmp_path):
    folder = saved("llama", tmp_path / "model")
    wanted = load_file(folder / "model.safetensors")
    beside(folder, layout)
    explicit = json.loads((folder / "config.json").read_text()).get("transformers_weights")
    theirs, _ = _get_resolved_checkpoint_files(str(folder), None, None, True, {}, False, explicit)
    assert [str(path) for path in weight_files(folder)] == theirs
    stored = stored_tensors(folder)
    with Reader(stored) as reader:
        assert all(torch.equal(reader.tensor(key), tensor) for key, tensor in wanted.items())
    for stream in (False, True):
        loaded = load(str(folder), stream=stream)
        with loaded.holder.resident(["model.layers.0", "model.layers.1"]):
            state = loaded.model.state_dict()
            assert all(torch.equal(state[key], tensor) for key, tensor in wanted.items())
    base = Recipe(
        model=str(folder), format="fake", group_size=32, iters=0, device="cpu", fp_layers="o_proj"
    )
    for stream in (False, True):
        recipe = replace(base, stream=stream, output_dir=str(tmp_path / f"out{stream}"))
        (made,) = jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))
        result = load_file(made / "model.safetensors")
        kept = [key for key in wanted if "norm" in key or "o_proj" in key]
        assert all(torch.equal(result[key], wanted[key]) for key in kept)
        assert not [finding for finding in check(made, folder) if finding.severity == "error"]
        assert torch.equal(load(str(made)).model.state_dict()[kept[0]], wanted[kept[0]])
    known = identity(base, "", folder, [])
    assert {key for key in known if key.endswith(".safetensors")} == {
        path.name for path in weight_files(folder)
    }


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "model.fp16.safetensors", "pytorch_model.safetensors"]
)
def test_files_that_transformers_does_not_read_are_named(name, tmp_path):
    folder = saved("llama", tmp_path / "model")
    (folder / "model.safetensors").rename(folder / name)
    for stream in (False, True):
        with pytest.raises(UserError, match=rf"has no weights: .*{name} is not read, rename it"):
            load(str(folder), stream=stream)
    for wrong in (
        "../model.safetensors",
        "sub/model.safetensors",
        "model.bin",
        5,
        "gone.safetensors",
    ):
        edited(folder, lambda config, wrong=wrong: config.update(transformers_weights=wrong))
        with pytest.raises(UserError, match=r"transformers_weights|has no weights"):
            load(str(folder))


def test_a_newer_file_beside_an_old_index_is_said(tmp_path, caplog):
    folder = saved("llama", tmp_path / "model")
    beside(folder, "old index")
    load(str(folder))
    assert (
        "model.safetensors is read, as Transformers does; the files of its index are not"
        in caplog.text
    )
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        UserError, match=r"copy the folder again, or remove the index if model.safetensors is newer"
    ):
        load(str(folder))


# ---- models and tokens that don't fit


def test_a_model_without_a_head_is_one_line(tmp_path):
    folder = saved("llama", tmp_path / "model")
    edited(folder, lambda config: config.update(architectures=["LlamaModel"]))
    for architecture in ("LlamaModel", "LlamaForSequenceClassification"):
        edited(folder, lambda config, name=architecture: config.update(architectures=[name]))
        recipe = Recipe(
            model=str(folder),
            output_dir=str(tmp_path / "out"),
            iters=0,
            group_size=32,
            device="cpu",
        )
        with pytest.raises(
            UserError,
            match=r"has no head that predicts tokens.*LlamaForCausalLM|weights are missing",
        ):
            jobs.prepare(recipe, jobs.load_model(recipe))
    base = LlamaModel(FAMILIES["llama"].build().config)
    with pytest.raises(UserError, match="LlamaModel has no head that predicts tokens"):
        AutoRoundMLLM(base, tiny_tokenizer(), group_size=32, iters=0, device="cpu").quantize()


@pytest.mark.parametrize("wrong", [128, 5000])
def test_token_ids_beyond_the_vocabulary_are_named_before_their_pass(wrong, tmp_path):
    model = FAMILIES["llama"].build()
    rows = [
        {"id": f"row{i}", "input_ids": [7] * 20 + [5, wrong if i == 2 else 6] * 10}
        for i in range(4)
    ]

    def unseen(module, args, kwargs):
        assert (kwargs["input_ids"] < 128).all(), "the model ran on it"

    before = model.register_forward_pre_hook(unseen, with_kwargs=True)
    options = {
        "group_size": 32,
        "iters": 1,
        "nsamples": 4,
        "seqlen": 40,
        "device": "cpu",
        "output_dir": str(tmp_path),
    }
    with pytest.raises(
        UserError, match=rf"sample .*: its token id {wrong} is not in the model's vocabulary of 128"
    ):
        AutoRoundMLLM(model, tiny_tokenizer(), dataset=rows, **options).quantize()
    before.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_llama_4_is_tuned_in_the_dtype_it_is_stored_in(dtype, tmp_path):
    folder = saved("llama4", tmp_path / "model")
    edited(folder, lambda c: c.update(dtype=str(dtype).removeprefix("torch.")),
           lambda t: t.update({key: tensor.to(dtype) for key, tensor in t.items()}))  # fmt: skip
    recipe = Recipe(model=str(folder), output_dir=str(tmp_path), iters=1, group_size=32, nsamples=4,
        seqlen=32,
                    device="cpu")  # fmt: skip
    (made,) = jobs.run(
        jobs.prepare(
            recipe, jobs.load_model(recipe), dataset=[{"input_ids": list(range(5, 45))}] * 4
        )
    )
    assert (made / "config.json").is_file()
