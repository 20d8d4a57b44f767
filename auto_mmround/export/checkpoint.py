"""Checkpoint folders: atomic writing (shards, side files, configuration last) and lazy reading of what was written."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from auto_mmround import strict
from auto_mmround.errors import UserError
from auto_mmround.export import config_check, formats
from auto_mmround.numerics.grids import dequantize
from auto_mmround.untrusted import belongs, read_object, weight_files

_WEIGHTS = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".onnx_data", ".ot", ".npz",
    ".index.json", ".partial", ".pkl", ".pickle", ".joblib",
)  # fmt: skip
# Of one checkpoint only: configurations, and what a run, `eval` and `verify` write down about its weights. With an
# adapter's configuration beside merged weights loaders would look for the adapter.
_OWN_FILES = (
    "config.json", "quantization_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json",
    "adapter_config.json",
    "recipe.toml", "run.json", "eval.json", "verify.json", "report.json", "report.html",
)  # fmt: skip


_UNDERWAY = (".partial", ".unfinished", ".wrong")  # endings of folders of ours that are no results
# What unpacking raises for tensors that aren't what their configuration says.
CONTRADICTIONS = (ValueError, LookupError, RuntimeError, TypeError, ArithmeticError)
COPIED = 2**24  # bytes copied at a time
# torch's types as safetensors names them.
DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.uint16: "U16", torch.int16: "I16",
    torch.uint32: "U32", torch.int32: "I32", torch.uint64: "U64", torch.int64: "I64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip


def check_free(out: Path, overwrite: bool = False) -> None:
    """Raises UserError if a checkpoint can't be put at ``out``.

    overwrite: an existing checkpoint is replaced by :func:`commit`; a folder that holds something else never is.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file, no folder: choose another")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"the output folder {out} is not empty: choose another, or --overwrite replaces it")
        if not (out / "config.json").is_file():
            raise UserError(f"{out} is not a checkpoint folder and will not be overwritten: choose another")


def wrong_name(out: Path) -> Path:
    """Where a checkpoint goes that is not what was tuned."""
    return out.with_name(out.name + ".wrong")


def begin(out: Path, overwrite: bool = False) -> Path:
    """A fresh empty ``<out>.partial`` to write into. Raises UserError if ``out`` is in the way, see `check_free`."""
    check_free(out, overwrite)
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, out: Path) -> None:
    """Puts the finished folder in its place; what was there before goes away only after that."""
    old = out.with_name(out.name + ".old.partial")
    if out.exists():
        out.rename(old)
    partial.rename(out)
    sync_folder(out.parent)
    if old.exists():
        shutil.rmtree(old)


class ShardWriter:
    """Writes tensors to disk as they come, and makes a safetensors shard of them as soon as one is full.

    It holds no tensor: one is appended to a file of bare values, from which its shard is put together, aligned.
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
        """Appends the tensors. Raises ValueError for a name seen before, OSError where the disk takes no more."""
        for name, tensor in tensors.items():
            if name in self._names:
                raise ValueError(f"tensor {name} was written twice")
            self._names.add(name)
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self._limit:
                self.flush()
            with self._values.open("ab") as file:
                file.write(_bytes(tensor))
            self._pending[name] = _Span(tensor.dtype, tuple(tensor.shape), self._pending_bytes, size)
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
        _sync(path)
        self._values.unlink()
        self._shards.append((path, list(self._pending)))
        self._pending, self._pending_bytes = {}, 0

    def finish(self) -> list[Path]:
        """Writes the last shard, gives all their final names, writes the index; returns the weight files."""
        self.flush()
        count = len(self._shards)
        final: list[Path] = []
        weight_map: dict[str, str] = {}
        for i, (path, names) in enumerate(self._shards, start=1):
            name = "model.safetensors" if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors"
            final.append(path.rename(self._folder / name))
            weight_map |= dict.fromkeys(names, name)
        if count > 1:
            index = {"metadata": {"total_size": self._bytes}, "weight_map": dict(sorted(weight_map.items()))}
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
    """The head of a safetensors file with these tensors in this order; padded to 8 bytes, as its specification says."""
    fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, span in spans.items():
        fields[name] = {"dtype": DTYPES[span.dtype], "shape": span.shape, "data_offsets": (at, at + span.size)}
        at += span.size
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    """The values of a tensor, row-major, without another copy of them where they lie so already."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_side_files(source: Path, out: Path) -> list[str]:
    """Copy everything of the source but weights and configuration, byte for byte, hidden files and README left out;
    returns the names written, relative to ``out``."""
    chosen = side_files(source)
    for path in chosen:
        target = out / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        _sync(target)
    return [str(path.relative_to(source)) for path in chosen]


def write_config(out: Path, config: Mapping[str, Any], quantization_config: Mapping[str, Any] | None) -> None:
    """config.json, the file that makes the folder a checkpoint; None writes an unquantized one."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    if quantization_config is None:
        write_json(out / "config.json", plain)
        return
    if quantization_config.get("quant_method") == "auto-round":
        write_json(out / "quantization_config.json", quantization_config)
    write_json(out / "config.json", {**plain, "quantization_config": dict(quantization_config)})


class Shards(ExitStack):
    """Weight files, each opened once, and closed with the context. Raises UserError for what can't be read."""

    def __init__(self) -> None:
        super().__init__()
        self._opened: dict[Path, Any] = {}

    def tensor(self, path: Path, name: str) -> Tensor:
        """A tensor of a file."""
        if path not in self._opened:
            self._opened[path] = self.enter_context(_open(path))
        try:
            found: Tensor = self._opened[path].get_tensor(name)
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(f"{path}: {name} cannot be read ({error})") from error
        return found


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder; tensors are read one by one. files: tensor name -> shard file name; empty for a format
    that reads files of its own kind."""

    folder: Path
    config: Mapping[str, Any]
    quantization_config: Mapping[str, Any] | None
    files: Mapping[str, str] = field(repr=False)

    def tensors(self, names: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of these or all tensors, in that order. Raises UserError for a damaged or missing shard."""
        with Shards() as shards:
            for name in self.files if names is None else names:
                yield name, shards.tensor(self.folder / self.files[name], name)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Configuration and tensor names of a checkpoint folder. Raises UserError if it is none."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    config = read_object(folder / "config.json")
    quantization = config.get("quantization_config")
    if quantization is not None and (wrong := config_check.problem(quantization)):
        raise UserError(f"{folder / 'config.json'}: {wrong}")
    if quantization is not None and _reader(quantization) is not None:
        return Checkpoint(folder, config, quantization, {})
    files: dict[str, str] = {}
    for path in weight_files(folder):
        with _open(path) as handle:
            files |= dict.fromkeys(handle.keys(), path.name)
    return Checkpoint(folder, config, quantization, dict(sorted(files.items())))


def _reader(quantization: Mapping[str, Any]) -> Any:
    """How a format reads files of its own kind, None for safetensors."""
    own = {fmt.name: fmt.read for fmt in formats.FORMATS.values() if fmt.read}
    return own.get(str(quantization.get("quant_method")))


def dequantized_state_dict(folder: Path, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint tensor name, tensor), every packed weight as a plain ``X.weight`` (out, in); the order is by name.

    dtype: of all floating tensors; None keeps the stored ones and decodes packed weights to float32. Raises UserError
    for a folder or quantization method that cannot be read, or tensors that contradict the configuration.
    """
    checkpoint = read_checkpoint(folder)
    quantization = checkpoint.quantization_config
    own = _reader(quantization) if quantization is not None else None
    if own is not None:
        yield from own(folder, dtype)
        return
    fmt = formats.from_config(quantization) if quantization is not None else None
    first = f".{fmt.parts[0]}" if fmt else ""
    packed = {n.removesuffix(first) for n in checkpoint.files if fmt and n.endswith(first)}
    schemes = formats.schemes_of(quantization, packed) if quantization is not None else {}
    with Shards() as shards:
        for name in checkpoint.files:
            module, _, part = name.rpartition(".")
            if fmt is None or quantization is None or module not in packed or part not in fmt.parts:
                tensor = shards.tensor(folder / checkpoint.files[name], name)
                yield name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            elif part == fmt.parts[0]:
                own_names = [n for p in fmt.parts if (n := f"{module}.{p}") in checkpoint.files]
                parts = {n: shards.tensor(folder / checkpoint.files[n], n) for n in own_names}
                try:
                    if module not in schemes:
                        formats.scheme_of(quantization, module)  # says why
                    codes = fmt.unpack(module, parts, schemes[module])
                except CONTRADICTIONS as error:
                    raise UserError(f"{folder}: {module} contradicts quantization_config: {error}") from error
                yield f"{module}.weight", dequantize(codes, dtype or torch.float32)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): the file is damaged or cut off, copy it again") from error


def side_files(source: Path) -> list[Path]:
    """The side files of a model folder. Raises UserError for a link to a file elsewhere."""
    chosen = [path for path in sorted(source.rglob("*")) if is_side_file(path, source)]
    strays = [path for path in chosen if not belongs(path, source)]
    if strays:
        raise UserError(
            f"{strays[0]} is a link out of the model's folder: nothing from elsewhere is copied; put the file there"
        )
    return chosen


def is_side_file(path: Path, source: Path) -> bool:
    """Whether a file of a model folder belongs into every checkpoint made from it, unchanged; earlier results that lie
    in it do not."""
    parts = path.relative_to(source).parts
    hidden = any(part.startswith(".") or part == "__pycache__" or part.endswith(_UNDERWAY) for part in parts)
    hidden = hidden or any((above / "run.json").is_file() for above in path.parents[: len(parts) - 1])
    own = len(parts) == 1 and (path.name in _OWN_FILES or path.name.upper().startswith("README"))
    return path.is_file() and not hidden and not own and not path.name.endswith(_WEIGHTS)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """As `write_whole`, indented."""
    write_whole(path, (strict.dumps(strict.tagged(value), indent=2) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """A file that is there as a whole or not at all, whenever the machine stops."""
    temporary = path.with_name(path.name + ".partial")
    temporary.write_bytes(content)
    _sync(temporary)
    temporary.replace(path)
    sync_folder(path.parent)


def _sync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """What was created, renamed and removed in the folder stays so when the machine stops."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
