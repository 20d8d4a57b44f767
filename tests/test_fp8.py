"""Checkpoints stored in FP8 are read as they are: as a whole or streamed, and quantized like their
decoded twins."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, FineGrainedFP8Config

from auto_mmround.checkpoint.loader import from_quantized, load_any
from auto_mmround.errors import UserError
from auto_mmround.model.loading import load
from auto_mmround.model.stored import decoded
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs

TEXT_BLOCKS = "language_model.layers.", "model.layers."


def in_fp8(
    folder: Path, block: int | None, quantized=TEXT_BLOCKS, dtype=torch.float8_e4m3fn
) -> Path:
    """The folder's linear weights of text blocks in FP8, with a scale a block of that size or a
    tensor."""
    tensors = load_file(folder / "model.safetensors")
    for key, w in list(tensors.items()):
        if (
            w.ndim != 2
            or not key.endswith("proj.weight")
            or not any(part in key for part in quantized)
        ):
            tensors[key] = w.to(torch.bfloat16)
            continue
        rows, columns = (block, block) if block else w.shape
        tiles = w.reshape(w.shape[0] // rows, rows, w.shape[1] // columns, columns)
        scale = tiles.abs().amax((1, 3)) / 448
        tensors[key] = (tiles / scale[:, None, :, None]).reshape(w.shape).to(dtype)
        tensors[f"{key}_scale_inv"] = scale if block else scale.reshape(())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
    }
    config["quantization_config"] |= {"weight_block_size": [block, block]} if block else {}
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


def saved(name: str, folder: Path) -> Path:
    FAMILIES[name].save(folder, tiny_tokenizer())
    return folder


@pytest.mark.parametrize(
    "name, cls", [("llama", AutoModelForCausalLM), ("qwen2_vl", AutoModelForImageTextToText)]
)
def test_fp8_is_decoded_as_transformers_decodes_it(name, cls, tmp_path):
    folder = in_fp8(saved(name, tmp_path / "model"), 32)
    config = FineGrainedFP8Config(weight_block_size=(32, 32), dequantize=True)
    theirs = cls.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    ).state_dict()
    for stream in (False, True):
        loaded = load(str(folder), stream=stream)
        assert loaded.streamed is stream and loaded.model.dtype == torch.bfloat16
        blocks = [
            name
            for name, module in loaded.model.named_modules()
            if name.endswith(("layers.0", "layers.1"))
        ]
        with loaded.holder.resident(
            [name for name in blocks if any(f"{part}{name[-1]}" in name for part in TEXT_BLOCKS)]
        ):
            ours = {
                key: tensor
                for key, tensor in loaded.model.state_dict().items()
                if not tensor.is_meta
            }
            assert sum("proj" in key for key in ours) >= 14 and all(
                torch.equal(ours[key], theirs[key]) for key in ours
            )


@pytest.mark.parametrize("stream", [False, True])
def test_a_run_from_fp8_is_the_run_from_its_decoded_twin(stream, tmp_path):
    folder, twin = (
        in_fp8(saved("qwen2_vl", tmp_path / "model"), 32),
        saved("qwen2_vl", tmp_path / "twin" / "model"),
    )
    load(str(folder)).model.save_pretrained(twin)
    base = Recipe(format="auto_round,fake", group_size=32, iters=2, nsamples=8, seqlen=12,
        amp=False, device="cpu",
                  fp_layers="layers.1.mlp.down_proj", stream=stream)  # fmt: skip
    made = []
    for source in (folder, twin):
        recipe = replace(base, model=str(source), output_dir=str(source.parent / "out"))
        made.append(
            jobs.run(
                jobs.prepare(
                    recipe, jobs.load_model(recipe), dataset=FAMILIES["qwen2_vl"].samples()
                )
            )
        )
    for one, two in zip(*made, strict=True):
        tensors, others = load_file(one / "model.safetensors"), load_file(two / "model.safetensors")
        assert set(tensors) == set(others) and not any("scale_inv" in key for key in tensors)
        assert all(torch.equal(tensors[key], others[key]) for key in tensors)
        method = (
            json.loads((one / "config.json").read_text())
            .get("quantization_config", {})
            .get("quant_method")
        )
        assert method == (None if one.name.endswith("fake") else "auto-round")
        from_quantized(one) if method else load(str(one))


def recipe_layers(folder: Path) -> set[str]:
    """What a run quantized."""
    return set(json.loads((folder / "run.json").read_text())["codes"])


def test_fp8_of_compressed_tensors_is_read(tmp_path):
    folder = saved("llama", tmp_path / "model")
    recipe = Recipe(model=str(folder), output_dir=str(tmp_path), format="compressed_tensors",
        data_type="fp8", bits=8,
                    group_size=-1, iters=0, act_bits=8, device="cpu")  # fmt: skip
    (made,) = jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))
    wanted, found = from_quantized(made).model.state_dict(), load(str(made)).model.state_dict()
    assert set(found) == set(wanted)
    for key in found:
        kept = key.removesuffix(".weight") not in recipe_layers(made)
        assert torch.equal(found[key], wanted[key] if kept else wanted[key].bfloat16().float()), key


def test_scales_of_all_shapes():
    q = torch.randn(6, 8).to(torch.float8_e4m3fn)
    rows = torch.rand(6)
    wanted = (q.float() * rows[:, None]).bfloat16()
    assert torch.equal(decoded("w", q, rows), wanted) and torch.equal(
        decoded("w", q, rows[:, None]), wanted
    )
    assert torch.equal(decoded("w", q, torch.tensor(2.0)), (2 * q.float()).bfloat16())
    grid = torch.rand(2, 2)
    cut = decoded("w", q, grid, [(4, 4)])  # the second block of rows has two
    assert torch.equal(cut[4:, :4], (q.float()[4:, :4] * grid[1, 0]).bfloat16())
    for shape in ((4, 2), (5,), (2, 3)):
        with pytest.raises(UserError, match=r"w: its scale, .* does not fit its shape, \(6, 8\)"):
            decoded("w", q, torch.rand(shape))


def test_other_quantized_sources_and_lost_scales_are_one_line(tmp_path):
    folder = in_fp8(saved("llama", tmp_path / "model"), None)
    assert load(str(folder)).model.dtype == load_any(str(folder)).model.dtype == torch.bfloat16
    with pytest.raises(UserError, match="not for weights in FP8"):
        load(str(folder), device_map="auto")
    config = json.loads((folder / "config.json").read_text())
    for block in ([0, 128], [32], "32", {"a": 1}):
        config["quantization_config"]["weight_block_size"] = block
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match="is no pair of numbers"):
            load(str(folder))
    del config["quantization_config"]["weight_block_size"]
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    lost = {
        key: tensor
        for key, tensor in tensors.items()
        if not key.endswith("q_proj.weight_scale_inv")
    }
    save_file(lost, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"q_proj.weight is stored in FP8, but the files hold no scale for it"
    ):
        load(str(folder))
    other = saved("gpt2", tmp_path / "gpt2")
    recipe = Recipe(
        model=str(other), output_dir=str(tmp_path), algorithm="rtn", group_size=32, device="cpu"
    )
    (made,) = jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))
    with pytest.raises(
        UserError, match=r"is quantized already \(auto-round\); give the original weights, or FP8"
    ):
        load(str(made))
