"""Tensors to safetensors shards with their index, one tensor in memory at a time."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_mmround.atomic import sync_file, sync_folder, write_json
from auto_mmround.headers import TYPE_NAMES, raw_bytes

COPIED = 2**24  # bytes copied at a time


class ShardWriter:
    """Writes tensors to disk as they come, and makes a safetensors shard of them as soon as one is
    full.

    It holds no tensor: one is appended to a file of bare values, from which its shard is put
    together, aligned.
    """

    def __init__(self, folder: Path, max_shard_bytes: int = 5 * 10**9) -> None:
        self._folder = folder
        self._limit = max_shard_bytes
        self._values = folder / "values.partial"
        self._pending: dict[str, _Span] = {}
        self._pending_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._names: set[str] = set()
        self._bytes = 0

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Appends the tensors. Raises ValueError for a name seen before, OSError where the disk
        takes no more."""
        for name, tensor in tensors.items():
            if name in self._names:
                raise ValueError(f"tensor {name} was written twice")
            self._names.add(name)
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self._limit:
                self.flush()
            with self._values.open("ab") as file:
                file.write(values_of(tensor))
            self._pending[name] = _Span(
                tensor.dtype, tuple(tensor.shape), self._pending_bytes, size
            )
            self._pending_bytes += size
            self._bytes += size

    def flush(self) -> None:
        """Makes a shard of what is pending, under a temporary name."""
        if not self._pending:
            return
        path = self._folder / f"shard-{len(self._shards) + 1:05d}.safetensors.partial"
        # Widest numbers first, so that every tensor starts at a multiple of its own.
        order = sorted(self._pending, key=lambda name: (-self._pending[name].dtype.itemsize, name))
        with path.open("wb") as shard, self._values.open("rb") as values:
            shard.write(_header({name: self._pending[name] for name in order}))
            for name in order:
                values.seek(self._pending[name].start)
                left = self._pending[name].size
                while left:
                    left -= shard.write(values.read(min(left, COPIED)))
        sync_file(path)
        self._values.unlink()
        self._shards.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> list[Path]:
        """Writes the last shard, gives all their final names, writes the index; returns the weight
        files."""
        self.flush()
        count = len(self._shards)
        final: list[Path] = []
        weight_map: dict[str, str] = {}
        for i, (path, names) in enumerate(self._shards, start=1):
            name = (
                "model.safetensors" if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
            )
            final.append(path.rename(self._folder / name))
            weight_map |= dict.fromkeys(names, name)
        if count > 1:
            index = {
                "metadata": {"total_size": self._bytes},
                "weight_map": dict(sorted(weight_map.items())),
            }
            write_json(self._folder / "model.safetensors.index.json", index)
        sync_folder(self._folder)
        return final


@dataclass(frozen=True)
class _Span:
    """Where a tensor lies in the file of bare values."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


def _header(spans: Mapping[str, _Span]) -> bytes:
    """The head of a safetensors file with these tensors in this order; padded to 8 bytes, as its
    specification says."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, span in spans.items():
        fields[name] = {
            "dtype": TYPE_NAMES[span.dtype],
            "shape": span.shape,
            "data_offsets": (at, at + span.size),
        }
        at += span.size
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def values_of(tensor: Tensor) -> memoryview:
    """The values of a tensor, row-major, without another copy of them where they lie so already."""
    return raw_bytes(tensor.cpu().reshape(-1)).numpy().data
