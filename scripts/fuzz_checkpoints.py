"""Checkpoints for the fuzzer: tiny ones of every format, of which one file is damaged."""

import json
import shutil
import struct
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from fuzz_inputs import Target, damaged, damaged_bytes, text_files, written
from hypothesis import strategies as st
from safetensors.torch import save
from transformers import LlamaConfig, LlamaForCausalLM

from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.checkpoint.reading import dequantized_state_dict
from auto_mmround.export.gguf import read as gguf
from auto_mmround.model.loading import DEMO, read_config, skeleton
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.verify import static


def tiny_checkpoints(work: Path) -> tuple[Path, dict[str, Path]]:
    """A random Llama of two layers, and its exports by format."""
    options = {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    torch.manual_seed(0)
    source = work / "source"
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, **options)).save_pretrained(
        source
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, source)
    names = ["auto_round", "auto_gptq", "auto_awq", "compressed_tensors", "mlx"]
    recipe = Recipe(
        model=str(source),
        iters=0,
        device="cpu",
        group_size=32,
        format=",".join(names),
        output_dir=str(work / "made"),
    )
    return source, dict(
        zip(names, jobs.run(jobs.prepare(recipe, jobs.load_model(recipe))), strict=True)
    )


def header_of(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _damaged_weights(data: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with another header, or any of its bytes damaged."""
    head, body = header_of(data)
    headers = damaged(head).map(written)
    return headers.map(lambda text: struct.pack("<Q", len(text)) + text + body) | damaged_bytes(
        data
    )


def checkpoints(work: Path) -> list[Target]:
    source, made = tiny_checkpoints(work)
    small = save({"a": torch.zeros(4, 4), "b": torch.ones(3, dtype=torch.int64)})
    shard = work / "given" / "model.safetensors"

    def weights(work: Path, data: bytes) -> None:
        (work / "given" / "config.json").write_text("{}")
        shard.write_bytes(data)
        list(dequantized_state_dict(work / "given"))

    def index(work: Path, data: bytes) -> None:
        folder = _fresh(work, source)
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        (folder / "model.safetensors.index.json").write_bytes(data)
        list(dequantized_state_dict(folder))

    def config(work: Path, data: bytes) -> None:
        folder = _fresh(work, source)
        (folder / "config.json").write_bytes(data)
        skeleton(read_config(folder), folder)

    def subject(work: Path, change: tuple[str, str, bytes]) -> None:
        static.check(_broken(work, made, change))

    def load(work: Path, change: tuple[str, str, bytes]) -> None:
        from_quantized(_broken(work, made, change))

    tensors = list(header_of((source / "model.safetensors").read_bytes())[0])
    maps = {
        "metadata": {"total_size": 1},
        "weight_map": dict.fromkeys(tensors[1:], "model-1.safetensors"),
    }
    plain = json.loads((source / "config.json").read_text())
    demo = json.loads((DEMO / "config.json").read_text())
    files = st.sampled_from(sorted(made)).flatmap(lambda name: _file_of(name, made[name]))
    return [
        Target("safetensors", _damaged_weights(small), weights),
        Target("index", damaged(maps).map(written) | text_files(json.dumps(maps)), index),
        Target(
            "config.json", damaged(plain, demo).map(written) | text_files(json.dumps(plain)), config
        ),
        Target("verify", files, subject),
        Target("eval", files, load),
    ]


def gguf_files(work: Path) -> list[Target]:
    """A file of the demo model; none without the package gguf."""
    if not find_spec("gguf"):
        print("gguf: left out, the package gguf is not installed")
        return []
    recipe = Recipe(
        model="demo",
        iters=0,
        device="cpu",
        bits=8,
        group_size=32,
        format="gguf:q8_0",
        output_dir=str(work / "gguf"),
    )
    (folder,) = jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))
    # The file that is read first: a damaged one behind it might never be reached.
    file = (
        folder / json.loads((folder / "config.json").read_text())["quantization_config"]["files"][0]
    )

    def use(_: Path, data: bytes) -> None:
        file.write_bytes(data)
        list(islice(dequantized_state_dict(folder), 10))

    return [Target("gguf", damaged_bytes(file.read_bytes()), use, patience=1.5 * gguf.HEAD_SECONDS)]


def _file_of(name: str, folder: Path) -> st.SearchStrategy[tuple[str, str, bytes]]:
    """(format, file, its damaged content) for one of the files that are read; settings more often
    than weights."""
    found = []
    for file in (
        "config.json",
        "config.json",
        "quantization_config.json",
        "run.json",
        "tokenizer_config.json",
    ):
        if (folder / file).is_file():
            content = json.loads((folder / file).read_text())
            inner = content.get("quantization_config")
            seeds = damaged(content).map(written)
            if inner:
                seeds |= damaged(inner).map(
                    lambda v, whole=content: written({**whole, "quantization_config": v})
                )
            found.append(st.tuples(st.just(name), st.just(file), seeds))
    weights = (folder / "model.safetensors").read_bytes()
    found.append(st.tuples(st.just(name), st.just("model.safetensors"), _damaged_weights(weights)))
    return st.one_of(found)


def _fresh(work: Path, source: Path) -> Path:
    folder = work / "given" / "model"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(source, folder))


def _broken(work: Path, made: dict[str, Path], change: tuple[str, str, bytes]) -> Path:
    name, file, data = change
    folder = _fresh(work, made[name])
    (folder / file).write_bytes(data)
    return folder
