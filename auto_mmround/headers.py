"""Safetensors files: what tensors a file says it holds, and files that stay open."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# torch's types as safetensors names them.
TYPE_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
BYTES = {name: dtype.itemsize for dtype, name in TYPE_NAMES.items()}
MAPPED = 2**26  # bytes read after which files are opened anew
# Raised while a file is read that is damaged or cut off.
DAMAGED = (SafetensorError, OSError, ValueError)


@dataclass(frozen=True)
class Header:
    """A tensor as its file's header has it: file name, safetensors dtype (`F16`), shape."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of its values."""
        return torch.Size(self.shape).numel() * BYTES[self.dtype]


def read_header(path: Path) -> dict[str, Header]:
    """Every tensor of a file. Raises what `DAMAGED` lists."""
    with safe_open(path, "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: Header(path.name, part.get_dtype(), tuple(part.get_shape()))
            for name, part in slices.items()
        }


class OpenFiles:
    """Files are opened once, while it is open itself. Several threads may use it."""

    def __init__(self) -> None:
        self._opened: dict[Path, Any] = {}
        self._read = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._opened = {}

    def file(self, path: Path) -> Any:
        """The file as `safe_open` gives it. Raises what `DAMAGED` lists."""
        opened = self._opened
        if path not in opened:
            opened[path] = safe_open(path, "pt")
        return opened[path]

    def counted(self, tensor: Tensor) -> Tensor:
        """The same tensor. Bytes stay in memory as long as their file is mapped, so files are
        opened anew after many bytes."""
        self._read += tensor.nbytes
        if self._read > MAPPED:
            self._opened, self._read = {}, 0
        return tensor


def raw_bytes(tensor: Tensor) -> Tensor:
    """uint8 (.., last x bytes of a value): a tensor of at least one dimension, row-major, without a
    copy where it lies so. torch calls a dimension of one entry contiguous whatever its stride, and
    then refuses to see bytes in it."""
    tensor = tensor.detach().contiguous()
    strides = torch.empty(tensor.shape, device="meta").stride()
    return tensor.as_strided(tensor.shape, strides).view(torch.uint8)
