"""The same ways to break a checkpoint, in the layouts of compressed-tensors, MLX and GGUF."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_mutations import (
    DOWN,
    Mutation,
    config,
    drop,
    edit,
    missing_pattern,
    nibbles,
    one,
    poke,
    pop,
    put,
    rename,
    sharded,
    tensors,
    truncate,
)
from test_mutations import SHARDS as SHARD_NAMES

from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.verify.static import check

RECIPES: dict[str, dict[str, Any]] = {
    "words": {"format": "compressed_tensors", "sym": False},
    "int8": {"format": "compressed_tensors", "bits": 8, "act_bits": 8, "group_size": -1},
    "mlx": {"format": "mlx", "group_size": 64},
    "gguf": {"format": "gguf:q4_0", "group_size": 32},
}
WORDS, INT8, MLX, GGUF = (("words",), ("int8",), ("mlx",), ("gguf",))
PACKED, ZEROS, CT_SCALE = (f"{DOWN}.weight_{part}" for part in ("packed", "zero_point", "scale"))
TEXT_FILE, TOWER_FILE = "model-Q4_0.gguf", "mmproj-model.gguf"
BLOCK_DOWN = "blk.2.ffn_down.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("base")
    found = {}
    for name, changes in RECIPES.items():
        recipe = Recipe(
            model="demo", algorithm="rtn", device="cpu", output_dir=str(out / name), **changes
        )
        (found[name],) = jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))
    return found


def group(**values: Any) -> Callable[[Path], None]:
    """A mutation of the only config group's weights."""
    return config(lambda content: content["config_groups"]["group_0"]["weights"].update(values))


def mlx_config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A mutation of both copies of MLX's configuration."""
    keys = ("quantization", "quantization_config")
    return edit(
        "config.json", lambda content: [change(content[key]) for key in keys if key in content]
    )


def blocks(
    change: Callable[[Any], None], file: str = TEXT_FILE, name: str = BLOCK_DOWN
) -> Callable[[Path], None]:
    """A mutation of one tensor: uint8 (rows, bytes), in Q4_0 blocks of a float16 scale and 16 bytes
    of codes."""

    def apply(folder: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(folder / file, "r+")
        change(next(tensor.data for tensor in reader.tensors if tensor.name == name))

    return apply


def flip_codes(data: Any) -> None:
    data[0, 2] ^= 1


def swap_nibbles(data: Any) -> None:
    data[0, 2:18] = (data[0, 2:18] << 4) | (data[0, 2:18] >> 4)


def scale_to(low: int, high: int) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        data[0, :2] = low, high

    return change


def rename_in_file(old: bytes, new: bytes) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        content = (folder / TEXT_FILE).read_bytes()
        assert content.count(old) == 1 and len(old) == len(new)
        (folder / TEXT_FILE).write_bytes(content.replace(old, new))

    return apply


def cut(file: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        with (folder / file).open("r+b") as handle:
            handle.truncate((folder / file).stat().st_size - 4096)

    return apply


# Every one is on files whose `run.json` is there; what needs it is marked in test_mutations.py.
MUTATIONS = [
    # compressed-tensors
    Mutation("nibble order swapped", one(PACKED, nibbles), PACKED, WORDS),
    Mutation("one code bit flipped", one(PACKED, lambda t: t ^ torch.eye(*t.shape,
        dtype=torch.int32)), PACKED, WORDS),
    Mutation("one code is another", one(f"{DOWN}.weight", poke(3)), f"{DOWN}.weight", INT8),
    Mutation("signs of codes swapped", one(f"{DOWN}.weight", lambda t: -t), f"{DOWN}.weight", INT8),
    Mutation("zero points off by one", one(ZEROS, lambda t: t ^ 0x11111111), ZEROS, WORDS),
    Mutation("zero points missing", tensors(pop(ZEROS)), DOWN, WORDS),
    Mutation("scale missing", tensors(pop(CT_SCALE)), DOWN, (*WORDS, *INT8)),
    Mutation("codes missing", tensors(pop(PACKED)), DOWN, WORDS),
    Mutation("shape missing", tensors(pop(f"{DOWN}.weight_shape")), DOWN, WORDS),
    Mutation("wrong shape", one(f"{DOWN}.weight_shape", lambda t: t.flip(0)), DOWN, WORDS),
    Mutation("scale is NaN", one(CT_SCALE, poke(float("nan"))), CT_SCALE, (*WORDS, *INT8)),
    Mutation("scale is zero", one(CT_SCALE, poke(0.0)), CT_SCALE, (*WORDS, *INT8)),
    Mutation("module renamed", tensors(rename(DOWN, DOWN.replace("down_proj", "down"))), DOWN,
        (*WORDS, *INT8, *MLX)),
    Mutation("wrong group size", group(group_size=64), DOWN, WORDS),
    Mutation("wrong bits", group(num_bits=8), DOWN, WORDS),
    Mutation("said to be symmetric", group(symmetric=True), DOWN, WORDS),
    Mutation("ignore pattern misses", config(missing_pattern("ignore", "visual", "vision")),
        "vision", (*WORDS, *INT8)),
    Mutation("ignore takes a packed layer", config(lambda c: c["ignore"].append("re:.*k_proj")),
        "k_proj", WORDS),
    Mutation("format missing", config(pop("format")), "quantization_config.format", (*WORDS,
        *INT8)),
    Mutation("groups missing", config(pop("config_groups")), "config_groups", WORDS),
    Mutation("shard truncated", sharded(truncate), SHARD_NAMES[1], (*WORDS, *MLX)),
    # MLX
    Mutation("nibble order swapped", one(f"{DOWN}.weight", lambda t: nibbles(t).view(t.dtype)),
        f"{DOWN}.weight", MLX),
    Mutation("scale missing", tensors(pop(f"{DOWN}.scales")), DOWN, MLX),
    Mutation("biases missing", tensors(pop(f"{DOWN}.biases")), DOWN, MLX),
    Mutation("scale is NaN", one(f"{DOWN}.scales", poke(float("nan"))), f"{DOWN}", MLX),
    Mutation("scale is another", one(f"{DOWN}.scales", poke(1.0)), DOWN, MLX),
    Mutation(
        "zero points off by one",
        tensors(lambda found: found.update({f"{DOWN}.biases": found[f"{DOWN}.biases"] * 7 / 8})),
        DOWN,
        MLX,
    ),
    Mutation("wrong group size", mlx_config(put(group_size=32)), DOWN, MLX),
    Mutation("wrong bits", mlx_config(put(bits=8)), DOWN, MLX),
    # GGUF
    Mutation("nibble order swapped", blocks(swap_nibbles), DOWN, GGUF),
    Mutation("one code bit flipped", blocks(flip_codes), DOWN, GGUF),
    Mutation("scale is NaN", blocks(scale_to(0, 0x7E)), DOWN, GGUF),
    Mutation("scale is zero", blocks(scale_to(0, 0)), DOWN, GGUF),
    Mutation("module renamed", rename_in_file(b"blk.2.ffn_down.weight", b"blk.9.ffn_down.weight"),
        DOWN, GGUF),
    Mutation("file truncated", cut(TEXT_FILE), TEXT_FILE, GGUF),
    Mutation("tower truncated", cut(TOWER_FILE), TOWER_FILE, GGUF),
    Mutation("file missing", drop(TEXT_FILE), TEXT_FILE, GGUF),
    Mutation("tower missing", drop(TOWER_FILE), TOWER_FILE, GGUF),
    # side files are the same for all
    Mutation("processor file dropped", drop("preprocessor_config.json"), "preprocessor_config.json",
        tuple(RECIPES)),
    Mutation("truncation left in", edit("tokenizer.json", put(truncation={"max_length": 512})),
        "tokenizer.json",
             tuple(RECIPES)),
    Mutation("unknown quant_method", config(put(quant_method="quip")), "quantization_config",
        (*WORDS, *INT8, *GGUF)),
]  # fmt: skip

CASES = [(mutation, name) for mutation in MUTATIONS for name in mutation.formats]


@pytest.mark.parametrize("mutation, name", CASES, ids=[f"{m.name}: {name}" for m, name in CASES])
def test_every_way_to_break_a_checkpoint_is_found_and_named(
    mutation: Mutation, name: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(checkpoints[name], folder)
    mutation.apply(folder)
    errors = [finding for finding in check(folder) if finding.severity == "error"]
    assert any(mutation.named in finding.where for finding in errors), [
        finding.line() for finding in errors
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_unbroken_checkpoints_are_right(name: str, checkpoints: dict[str, Path]) -> None:
    assert [finding.line() for finding in check(checkpoints[name])] == []
