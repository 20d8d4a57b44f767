"""Tensors out of GGUF files, one by one, under the names of the checkpoint that they came from."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from auto_mmround.errors import UserError
from auto_mmround.export.gguf.models import Part, Rule, extra_tensors, text_part
from auto_mmround.export.gguf.towers import ROW_END, tower_part
from auto_mmround.lazy import Lazy
from auto_mmround.untrusted import TooLong, readable, time_limit

# a head that claims one long list makes the reader walk through the whole file, byte by byte
HEAD_SECONDS = 30.0
DAMAGED = (
    ValueError, LookupError, TypeError, RuntimeError, ArithmeticError, OSError, MemoryError,
)  # fmt: skip


def _files(raw: Mapping[str, Any], folder: Path) -> list[str]:
    if "files" not in raw["quantization_config"]:
        raise UserError(f"{folder}: quantization_config names no GGUF files")
    files = raw["quantization_config"]["files"]
    if not isinstance(files, list) or not all(
        isinstance(f, str) and Path(f).name == f for f in files
    ):
        raise UserError(
            f"{folder}: quantization_config names files that are not in the folder:"
            f" {str(files)[:200]}"
        )
    return files


def read(folder: Path) -> Mapping[str, Tensor]:
    """Checkpoint key -> tensor of all files of a folder, names as `tower_part` and `text_part`
    spell them; 16-bit tensors as they are, the rest in float32. UserError for unknown tensors or a
    missing file.
    """
    import gguf

    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = config_of(raw)
    parts, extra = parts_of(config), extra_tensors(config.get_text_config())
    makers: dict[str, Callable[[], Tensor]] = {}
    for file in _files(raw, folder):
        if not (folder / file).is_file():
            raise UserError(
                f"{folder} lacks {file}, which its config.json names: copy the folder again"
            )
        with _readable(folder / file), time_limit(HEAD_SECONDS):
            reader = gguf.GGUFReader(folder / file)
            if reader.endianess != gguf.GGUFEndian.LITTLE:  # blocks would decode to other values
                raise ValueError("it is big-endian")
            field = reader.get_field("general.architecture")
            part = parts["tower" if field is not None and field.contents() == "clip" else "text"]
            stored = {tensor.name: tensor for tensor in reader.tensors}
        for key, rule in part.sources(
            [name for name in stored if name not in (*extra, ROW_END)]
        ).items():
            absent = [target for target in rule.targets if target not in stored]
            if absent:
                raise UserError(
                    f"{folder / file} lacks the tensor {absent[0]}: the file is damaged"
                )
            if key in makers:
                raise UserError(f"{folder / file} holds {key}, which another file holds, too")
            made = [stored[target] for target in rule.targets]
            makers[key] = partial(_tensor, folder / file, rule, made)
    return Lazy(makers, lambda make: make())


def _tensor(path: Path, rule: Rule, stored: Sequence[Any]) -> Tensor:
    with _readable(path):
        return rule.step.inverse([_decode(part) for part in stored])


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What the reader and the decoders raise for a damaged file, as a UserError."""
    try:
        with readable(path, DAMAGED):
            yield
    except TooLong:
        raise UserError(
            f"{path} cannot be read: its head alone takes more than {HEAD_SECONDS:.0f} seconds"
        ) from None


def _decode(stored: Any) -> Tensor:
    import gguf

    plain = {"F16": torch.float16, "BF16": torch.bfloat16}
    values = gguf.quants.dequantize(stored.data, stored.tensor_type)
    return torch.from_numpy(np.array(values, dtype=np.float32)).to(
        plain.get(stored.tensor_type.name, torch.float32)
    )


def config_of(config: Mapping[str, Any]) -> Any:
    """The configuration with all defaults filled in; UserError for a model type transformers does
    not know."""
    model_type = str(config.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise UserError(f"GGUF export: no table for {model_type}")
    return CONFIG_MAPPING[model_type].from_dict(
        {k: v for k, v in config.items() if k != "quantization_config"}
    )


def parts_of(config: Any) -> dict[str, Part]:
    """The files of a model; the tower first: its names are the more special ones."""
    tower = tower_part(config.model_type, config)
    text = text_part(config.model_type, config.get_text_config())
    return ({"tower": tower} if tower else {}) | {"text": text}
