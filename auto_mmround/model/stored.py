"""The tensors of a checkpoint's files as floating point: what is stored in FP8 is decoded while it is read.

Beside a weight in FP8 lies its scale, a multiplier a tensor, a row or a block: `weight_scale_inv` in the files of
DeepSeek and Transformers, `weight_scale` in those of compressed-tensors. W = q s, rounded to bfloat16.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.untrusted import one_line, read_object, weight_map

FP8 = ("F8_E4M3", "F8_E5M2")
PACKED = ("U8", "I8", "I16", "I32")  # integers of another quantization
METHODS = ("fp8", "compressed-tensors")
SCALES = ("_scale_inv", "_scale")  # behind the key of a weight
# Of what runs in FP8 besides weights: nothing that is quantized anew has a use for them.
LEFT_OUT = (".input_scale", ".activation_scale", ".k_scale", ".v_scale")


@dataclass(frozen=True)
class Stored:
    """files: the file of every tensor, scales left out. scales: key of an FP8 tensor -> (key, file) of its scale.
    block: rows and columns that share a scale, where the configuration says."""

    files: Mapping[str, Path]
    scales: Mapping[str, tuple[str, Path]] = field(default_factory=dict)
    block: tuple[int, int] | None = None

    def nbytes(self) -> int:
        """Bytes of all tensors, decoded."""
        with Reader(self) as reader:
            count = sum(torch.Size(reader.plain(key).get_shape()).numel() for key in self.scales)
        return sum(path.stat().st_size for path in set(self.files.values())) + count


class Reader:
    """Reads tensors while it is open; each file is opened once."""

    def __init__(self, stored: Stored):
        self._stored, self._stack = stored, ExitStack()
        self._opened: dict[Path, Any] = {}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def plain(self, key: str, path: Path | None = None) -> Any:
        """What the file holds, as safetensors' slice."""
        path = path or self._stored.files[key]
        if path not in self._opened:
            self._opened[path] = self._stack.enter_context(safe_open(path, "pt"))
        return self._opened[path].get_slice(key)

    def slice(self, key: str) -> Any:
        """Something that gives the tensor when it is asked for ``[...]``."""
        if key not in self._stored.scales:
            return self.plain(key)
        return _Encoded(key, self.plain(key), self.plain(*self._stored.scales[key]), self._stored.block)

    def tensor(self, key: str) -> Tensor:
        """The tensor."""
        found: Tensor = self.slice(key)[...]
        return found


@dataclass(frozen=True)
class _Encoded:
    key: str
    q: Any
    scale: Any
    block: tuple[int, int] | None

    def __getitem__(self, _: Any) -> Tensor:
        return decoded(self.key, self.q[...], self.scale[...], self.block)


def stored_tensors(folder: Path) -> Stored:
    """What lies in a checkpoint folder. Raises UserError for files that can't be read, and where
    it is quantized in another way than FP8."""
    files: dict[str, Path] = {}
    kinds: dict[str, str] = {}
    given = read_object(folder / "config.json").get("quantization_config")
    try:
        for path in weight_files(folder):
            with safe_open(path, "pt") as file:
                files |= dict.fromkeys(file.keys(), path)
                if given is not None:
                    kinds |= {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"model {folder} can't be loaded: {path.name}: {one_line(str(error))[:300]}") from None
    if given is None:
        return Stored(files)
    method = given.get("quant_method") if isinstance(given, dict) else None
    if method not in METHODS or any(kind in PACKED for kind in kinds.values()):
        raise UserError(f"model {folder} is quantized already ({method}); give the original weights, or FP8")
    scales = {}
    for key in (key for key, kind in kinds.items() if kind in FP8):
        name = next((key + end for end in SCALES if key + end in files), None)
        if name is None:
            raise UserError(f"model {folder}: {key} is stored in FP8, but the files hold no scale for it")
        scales[key] = name, files[name]
    left_out = {name for name, _ in scales.values()} | {key for key in files if key.endswith(LEFT_OUT)}
    block = given.get("weight_block_size")
    if block and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise UserError(f"model {folder}: weight_block_size {str(block)[:80]} is no pair of numbers")
    kept = {key: path for key, path in files.items() if key not in left_out}
    return Stored(kept, scales, (block[0], block[1]) if block else None)


def decoded(key: str, q: Tensor, scale: Tensor, block: tuple[int, int] | None = None) -> Tensor:
    """bfloat16 (.., O, I) of FP8 values and a scale: one, (O,), (O, 1) or one a block, (.., O / rows, I / columns).

    The last block of a row or column may be cut off, if ``block`` says how large the others are. Raises UserError.
    """
    s = scale.float()
    if s.numel() > 1:
        s = s[:, None] if s.ndim == 1 and q.ndim == 2 else s
        for dim in (-2, -1):
            size, count = q.shape[dim], s.shape[dim] if s.ndim == q.ndim else 0
            step = block[dim] if block and -(-size // block[dim]) == count else size // max(count, 1)
            if not count or -(-size // step) != count:
                raise UserError(f"{key}: its scale, {tuple(scale.shape)}, does not fit its shape, {tuple(q.shape)}")
            s = s.repeat_interleave(step, dim).narrow(dim, 0, size)
    else:
        s = s.reshape(())
    return (q.float() * s).to(torch.bfloat16)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint folder: those that its index names, or the one file, or all."""
    index, single = weight_map(folder), folder / "model.safetensors"
    if index is not None:
        return [folder / name for name in sorted(set(index.values()))]
    return [single] if single.is_file() else sorted(folder.glob("*.safetensors"))
