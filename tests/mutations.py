"""How a checkpoint is broken: one function for each place that holds something."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nearest import round_to_nearest
from safetensors.torch import load_file, save_file

from auto_mmround.export import auto_awq, auto_gptq
from auto_mmround.numerics.grids import Grid

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = "model.safetensors.index.json"
ATTENTION = "model.layers.1.self_attn"
DOWN = "model.layers.2.mlp.down_proj"
NORM = "model.layers.0.input_layernorm.weight"
TEXT_FILE, BLOCK_DOWN = "model-Q4_0.gguf", "blk.2.ffn_down.weight"


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """A mutation of the weight file."""

    def apply(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(
            {k: t.clone().contiguous() for k, t in found.items()},
            folder / "model.safetensors",
            {"format": "pt"},
        )

    return apply


def one(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """A mutation of one tensor."""
    return tensors(lambda found: found.update({name: change(found[name])}))


def poke(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """One element set to a value."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[5] = value
        return tensor

    return change


def config(change: Callable[[dict[str, Any]], Any], both: bool = True) -> Callable[[Path], None]:
    """A mutation of the quantization configuration, in both files that hold it."""

    def apply(folder: Path) -> None:
        path, copy = folder / "config.json", folder / "quantization_config.json"
        whole = json.loads(path.read_text())
        change(whole["quantization_config"])
        path.write_text(json.dumps(whole))
        if both and copy.is_file():
            copy.write_text(json.dumps(whole["quantization_config"]))

    return apply


def edit(name: str, change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """A mutation of any JSON file."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


def drop(name: str) -> Callable[[Path], None]:
    """A file that is gone."""
    return lambda folder: (folder / name).unlink()


def sharded(change: Callable[[Path], Any] = lambda folder: None) -> Callable[[Path], None]:
    """The weights in two shards with an index, which is what big models have; then a mutation of
    those."""

    def apply(folder: Path) -> None:
        whole = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = sorted(whole)
        halves = dict(zip(SHARDS, (names[: len(names) // 2], names[len(names) // 2 :])))
        for shard, half in halves.items():
            save_file({name: whole[name] for name in half}, folder / shard, {"format": "pt"})
        weight_map = {name: shard for shard, half in halves.items() for name in half}
        (folder / INDEX).write_text(
            json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map})
        )
        change(folder)

    return apply


def truncate(folder: Path) -> None:
    with (folder / SHARDS[1]).open("r+b") as file:
        file.truncate((folder / SHARDS[1]).stat().st_size - 1000)


def copy_tensor(folder: Path) -> None:
    """A tensor of the first shard in the second one too."""
    first, second = (load_file(folder / shard) for shard in SHARDS)
    save_file(second | {NORM: first[NORM]}, folder / SHARDS[1], {"format": "pt"})


def index_says(shard: str) -> Callable[[Path], None]:
    return edit(INDEX, lambda index: index["weight_map"].update({NORM: shard}))


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(found: dict[str, torch.Tensor]) -> None:
        for name in [name for name in found if name.startswith(old)]:
            found[new + name.removeprefix(old)] = found.pop(name)

    return change


def swap(one: str, other: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(found: dict[str, torch.Tensor]) -> None:
        found[one], found[other] = found[other], found[one]

    return change


def quantize(module: str, awq: bool = False) -> Callable[[dict[str, torch.Tensor]], None]:
    """A weight packed that the configuration does not name."""

    def change(found: dict[str, torch.Tensor]) -> None:
        codes = round_to_nearest(found.pop(f"{module}.weight"), 128, Grid(4, True))
        found |= auto_awq.pack(module, codes) if awq else auto_gptq.FORMAT.pack(module, codes)
        if not awq:
            found.pop(f"{module}.g_idx")

    return change


def nibbles(words: torch.Tensor) -> torch.Tensor:
    """High and low half of every byte exchanged."""
    as_bytes = words.contiguous().view(torch.uint8)
    return ((as_bytes << 4) | (as_bytes >> 4)).view(torch.int32)


def pop(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.pop(key)


def put(**values: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda content: content.update(values)


def missing_pattern(key: str, old: str, new: str) -> Callable[[dict[str, Any]], None]:
    """A pattern that fits nothing any more, in a list or as a key."""

    def change(content: dict[str, Any]) -> None:
        text = json.dumps(content[key])
        assert old in text
        content[key] = json.loads(text.replace(old, new))

    return change


@dataclass(frozen=True)
class Mutation:
    """name; break it; what a finding must name in `where`; the formats it is tried on."""

    name: str
    apply: Callable[[Path], Any]
    named: str
    formats: tuple[str, ...] = ("auto_round",)


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
