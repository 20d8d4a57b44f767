"""Checkpoint folders: atomic writing, side files, reading back, and loading in the real engines."""

import errno
import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from asking import run_transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from auto_mmround.atomic import held, sync_folder
from auto_mmround.checkpoint.folder import commit, underway, write_config, write_side_files
from auto_mmround.checkpoint.reading import dequantized_state_dict, read_checkpoint
from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.export.layout import Layout
from auto_mmround.export.shards import ShardWriter
from auto_mmround.numerics.grids import Codes, dequantize
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.verify.engines import EngineResult, interpreter

ROOT = Path(__file__).parent.parent
BLOCK = "model.language_model.layers"


def test_one_shard_and_several(tmp_path: Path) -> None:
    for limit, count in ((10**6, 1), (64, 3)):
        folder = tmp_path / str(limit)
        folder.mkdir()
        writer = ShardWriter(folder, limit)
        tensors = {name: torch.full((4, 4), float(i)) for i, name in enumerate("abc")}
        writer.add(tensors)
        # Memory does not grow: two shards are on disk already, under temporary names, and the
        # values of the third.
        assert [p.suffix for p in folder.iterdir()] == [".partial"] * count
        files = writer.finish()
        names = (
            ["model.safetensors"]
            if count == 1
            else [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
        )
        assert [path.name for path in files] == names and not list(folder.glob("*.partial"))
        assert all(path.stat().st_mode & 0o777 == 0o666 & ~_umask(tmp_path) for path in files)
        (folder / "config.json").write_text("{}")
        read = dict(read_checkpoint(folder).tensors())
        assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
        if count > 1:
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            assert index["metadata"]["total_size"] == 192 and index["weight_map"]["c"] == names[2]


def _umask(folder: Path) -> int:
    probe = folder / "probe"
    probe.touch()
    return 0o666 & ~probe.stat().st_mode


def test_shared_storage_is_written_apart_and_names_once(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    whole = torch.arange(8.0)
    writer.add({"a": whole, "b": whole, "c": whole[2:4]})
    with pytest.raises(ValueError, match="twice"):
        writer.add({"a": whole})
    writer.finish()
    (tmp_path / "config.json").write_text("{}")
    assert dict(read_checkpoint(tmp_path).tensors())["c"].tolist() == [2, 3]


def test_a_folder_has_another_name_until_it_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    for text in ("first", "second"):
        with underway(out, overwrite=True) as partial:
            (partial / "config.json").write_text(text)
            assert partial.name == "out.partial" and (not out.exists() or text == "second")
            with (
                pytest.raises(UserError, match="someone else is writing"),
                underway(out, overwrite=True),
            ):
                pytest.fail("two at once")
            commit(partial, out)
        assert (out / "config.json").read_text() == text and [
            p.name for p in out.parent.iterdir()
        ] == ["out"]
    with pytest.raises(UserError, match="not empty"), underway(out):
        pass
    (out / "config.json").rename(out / "notes.txt")
    with pytest.raises(UserError, match="not a checkpoint"), underway(out, overwrite=True):
        pass
    stale = tmp_path / "other.partial"
    stale.mkdir()
    (stale / "left").touch()
    with pytest.raises(RuntimeError), underway(tmp_path / "other") as partial:
        assert list(partial.iterdir()) == []
        raise RuntimeError
    assert not stale.exists()


def test_file_systems_that_neither_lock_nor_sync_folders(tmp_path, monkeypatch):
    """NFS refuses locks with EBADF; others know no fsync of a folder."""

    def refused(*_):
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refused)
    with held(tmp_path) as ours, held(tmp_path) as also:
        assert ours and also
    monkeypatch.setattr(os, "fsync", refused)
    sync_folder(tmp_path)


def test_what_a_commit_that_was_cut_off_left_behind_is_removed(tmp_path: Path) -> None:
    out, old = tmp_path / "out", tmp_path / "out.old.partial"
    for folder in (out, old):
        folder.mkdir()
        (folder / "config.json").write_text("before")
    with underway(out, overwrite=True) as partial:
        (partial / "config.json").write_text("now")
        commit(partial, out)
    assert (out / "config.json").read_text() == "now" and [*tmp_path.iterdir()] == [out]


def test_a_link_stays_a_link_and_its_folder_is_replaced(tmp_path: Path) -> None:
    disk, link = tmp_path / "disk" / "result", tmp_path / "link"
    disk.mkdir(parents=True)
    link.symlink_to(disk)
    for text in ("first", "second"):
        with underway(link, overwrite=True) as partial:
            assert partial.parent == disk.parent
            (partial / "config.json").write_text(text)
            commit(partial, link)
        assert link.is_symlink() and (disk / "config.json").read_text() == text
        assert [*disk.parent.iterdir()] == [disk] and len([*tmp_path.iterdir()]) == 2


def test_side_files_are_copied_byte_for_byte(tmp_path: Path) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    copied = (
        "tokenizer.json",
        "chat_template.jinja",
        "modeling_own.py",
        "LICENSE",
        "extra/a.jinja",
        "preprocessor_config.json",
    )
    left = (
        "config.json",
        "README.md",
        "model.safetensors",
        "pytorch_model.bin.index.json",
        ".git/HEAD",
        "x/w.gguf",
    )
    for name in (*copied, *left):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() + b"\r\n\xff")
    out.mkdir()
    assert sorted(write_side_files(source, out)) == sorted(copied)
    assert all((out / name).read_bytes() == name.encode() + b"\r\n\xff" for name in copied)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == sorted(copied)


def test_saved_tokenizer_does_not_truncate(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import GenerationConfig, PreTrainedTokenizerFast

    from auto_mmround.checkpoint.objects import write_objects

    backend = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]"
    )
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=4)
    files = write_objects(
        tmp_path, None, (), tokenizer=tokenizer, generation_config=GenerationConfig()
    )
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None
    assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= set(files)
    assert tokenizer.backend_tokenizer.truncation is not None  # the caller's object is as it was


def test_config_is_written_for_each_method(tmp_path: Path) -> None:
    write_config(
        tmp_path, {"model_type": "x", "quantization_config": {"old": 1}}, {"quant_method": "awq"}
    )
    assert not (tmp_path / "quantization_config.json").exists()
    write_config(tmp_path, {"model_type": "x"}, {"quant_method": "auto-round"})
    config = json.loads((tmp_path / "config.json").read_text())
    assert config == {"model_type": "x", "quantization_config": {"quant_method": "auto-round"}}
    assert (
        json.loads((tmp_path / "quantization_config.json").read_text())
        == config["quantization_config"]
    )


def test_reading_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="no weights"):
        read_checkpoint(tmp_path)
    save_file({"a": torch.zeros(1000)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(UserError, match="cut off"):
        read_checkpoint(tmp_path)
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="elsewhere"):
        read_checkpoint(tmp_path)


# A tiny random Qwen2-VL through every format


def tiny_qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    text = {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text |= {
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "initializer_range": 0.1,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    text |= {
        "rope_parameters": {
            "rope_type": "default",
            "mrope_section": [4, 6, 6],
            "rope_theta": 10000.0,
        }
    }
    vision = {"depth": 2, "embed_dim": 128, "hidden_size": 128, "num_heads": 4, "mlp_ratio": 2}
    ids = {
        "image_token_id": 300,
        "video_token_id": 301,
        "vision_start_token_id": 302,
        "vision_end_token_id": 303,
    }
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
    ).eval()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.bfloat16().float()
        if name.endswith("bias"):
            nn.init.constant_(parameter, 0.0625)
    return model


def model_inputs() -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    image_row = torch.randint(3, 290, (1, 24))
    image_row[0, 4:10] = torch.tensor([302, 300, 300, 300, 300, 303])
    image = {"pixel_values": torch.randn(16, 1176), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    image |= {"mm_token_type_ids": (image_row == 300).int()}
    rows = (image_row, torch.randint(3, 290, (1, 17)))
    texts = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in rows]
    return [texts[0] | image, texts[1]]


def stored(name: str) -> str:
    for prefix, new in (("model.language_model.", "model."), ("model.visual.", "visual.")):
        if name.startswith(prefix):
            return new + name.removeprefix(prefix)
    return name


def round_to_nearest(weight: Tensor, scheme: Scheme) -> Codes:
    group = weight.shape[1] if scheme.group_size == -1 else scheme.group_size
    grouped, top = weight.unflatten(1, (-1, group)), 2**scheme.bits - 1
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if scheme.sym:  # the larger side lands on -2^(b-1): half of the scales are negative
        scale = (torch.where(high < -low, -low, -high) / 2 ** (scheme.bits - 1)).half()
        zero = torch.full_like(scale, 2 ** (scheme.bits - 1))
    else:
        scale = ((high - low) / top).half()
        zero = (-low / scale.float()).round().clamp(scheme.min_zero, top)
    q = (grouped / scale.float()[..., None]).round() + zero.float()[..., None]
    codes = q.clamp(0, top).flatten(1).to(torch.uint8)
    return Codes(codes, scale, zero.to(torch.uint8), scheme.bits, group, scheme.sym)


def export(model: Any, out: Path, name: str, scheme: Scheme, keep: tuple[str, ...] = ()) -> Layout:
    """Quantizes the text blocks of ``model`` in place and writes the checkpoint with bf16 rest."""
    fmt = formats.resolve(name, [scheme])
    scheme = Scheme(scheme.bits, scheme.group_size, scheme.sym, min_zero=fmt.min_zero)
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    quantized = {n: scheme for n in linears if n.startswith(BLOCK) and n not in keep}
    tensors = {stored(n): p.data.bfloat16() for n, p in model.named_parameters()}
    with underway(out) as partial:
        writer = ShardWriter(partial, 300_000)
        for module in quantized:
            weight = model.get_submodule(module).weight
            assert fmt.check(scheme, *weight.shape) is None
            codes = round_to_nearest(weight.data, scheme)
            weight.data = dequantize(codes)
            del tensors[f"{stored(module)}.weight"]
            writer.add(fmt.pack(stored(module), codes))
        writer.add(tensors)
        writer.finish()
        layout = Layout(
            quantized,
            [n for n in linears if n not in quantized],
            [BLOCK],
            stored,
            scheme,
            {"iters": 0},
        )
        write_config(
            partial, json.loads(model.config.to_json_string(use_diff=False)), fmt.config(layout)
        )
        commit(partial, out)
    return layout


SCHEMES = [
    *(("auto_round", Scheme(bits, 32, sym)) for bits in (2, 3, 4, 8) for sym in (True, False)),
    *(("auto_gptq", Scheme(bits, 64, sym)) for bits in (2, 3, 4, 8) for sym in (True, False)),
    *(("auto_awq", Scheme(4, group, sym)) for group in (-1, 128) for sym in (True, False)),
]


def test_every_format_decodes_to_the_tuned_weights(tmp_path: Path) -> None:
    for i, (name, scheme) in enumerate(SCHEMES):
        model = tiny_qwen2_vl()
        export(model, tmp_path / str(i), name, scheme)
        decoded = dict(dequantized_state_dict(tmp_path / str(i), torch.float32))
        expected = {stored(n): p for n, p in model.named_parameters()}
        assert decoded.keys() == expected.keys(), (name, scheme)
        assert all(torch.equal(decoded[n], expected[n]) for n in expected), (name, scheme)


def test_decoding_names_a_contradicting_configuration(tmp_path: Path) -> None:
    export(tiny_qwen2_vl(), tmp_path / "out", "auto_gptq", Scheme(4, 32))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["quantization_config"]["group_size"] = 64
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.down_proj contradicts"):
        dict(dequantized_state_dict(tmp_path / "out"))


def loaded(
    tmp_path: Path, name: str, scheme: Scheme, keep: tuple[str, ...] = ()
) -> tuple[EngineResult, float, Layout]:
    """(the engine's answer, largest logit difference to the dequantized weights in plain
    Transformers, the layout)"""
    model = tiny_qwen2_vl()
    layout = export(model, tmp_path / "out", name, scheme, keep)
    python = interpreter(formats.resolve(name, [scheme]).name, ROOT)
    result = run_transformers(tmp_path / "out", model_inputs(), python=python)
    with torch.no_grad():
        wanted = [model(**kwargs).logits for kwargs in model_inputs()]
    assert result.ok, result.error
    return result, max((a - b).abs().max().item() for a, b in zip(result.logits, wanted)), layout


def test_auto_round_loads_in_transformers(tmp_path: Path) -> None:
    keep = (f"{BLOCK}.1.mlp.down_proj",)
    result, difference, layout = loaded(tmp_path, "auto_round", Scheme(4, 32), keep)
    assert (
        result.classes == {"Linear": len(layout.kept), "QuantLinear": 13} and result.quantized == 13
    )
    assert difference < 1e-4
    assert result.engine.startswith("transformers") and "auto-round" in result.engine


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "scheme", "tolerance"),
    [
        ("auto_round", Scheme(3, 32, False), 1e-4),
        ("auto_gptq", Scheme(4, 32), 1e-2),
        ("auto_gptq", Scheme(3, 32, False), 1e-2),
        ("auto_awq", Scheme(4, 32), 5e-2),  # its kernel computes in float16
        ("auto_awq", Scheme(4, 128, False), 5e-2),
        ("auto_round", Scheme(4, 32, False), 5e-2),  # AWQ's packing
    ],
)
def test_real_loaders(tmp_path: Path, name: str, scheme: Scheme, tolerance: float) -> None:
    if not interpreter("auto_gptq", ROOT).is_file():
        pytest.skip("scripts/engines.sh gptqmodel installs the engine")
    result, difference, layout = loaded(tmp_path, name, scheme, (f"{BLOCK}.0.self_attn.o_proj",))
    assert result.quantized == len(layout.quantized) and result.classes["Linear"] == len(
        layout.kept
    )
    assert difference < tolerance


def test_a_missing_engine_names_its_command(tmp_path: Path) -> None:
    result = run_transformers(tmp_path, [], python=interpreter("auto_awq", tmp_path))
    assert not result.ok and "scripts/engines.sh gptqmodel" in str(result.error)


@pytest.mark.slow
def test_a_configuration_that_misses_the_modules_is_not_ok(tmp_path: Path) -> None:
    export(tiny_qwen2_vl(), tmp_path / "out", "auto_round", Scheme(4, 32))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    # the checkpoint's spelling alone
    config["quantization_config"]["block_name_to_quantize"] = "model.layers"
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    result = run_transformers(tmp_path / "out", model_inputs(), python=interpreter("auto_round"))
    assert not result.ok and result.quantized == 0 and "made up" in str(result.error)
