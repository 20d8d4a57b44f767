"""The tensors of a checkpoint folder, read one by one, and the weights that they decode to."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.export.format import PackedFormat, WholeFormat
from auto_mmround.headers import DAMAGED, OpenFiles, read_header
from auto_mmround.lazy import Lazy
from auto_mmround.model.kv_cache import SCALES
from auto_mmround.numerics.grids import dequantize
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.untrusted import read_object, weight_files

# Errors of unpacking if tensors contradict their configuration.
CONTRADICTIONS = (ValueError, LookupError, RuntimeError, TypeError, ArithmeticError)


class Shards(OpenFiles):
    """Reads tensors of weight files. Raises UserError for unreadable files."""

    def tensor(self, path: Path, name: str) -> Tensor:
        """A tensor of a file."""
        with _readable(path):
            file = self.file(path)
        try:
            return self.counted(file.get_tensor(name))
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(f"{path}: {name} cannot be read ({error})") from error


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder; tensors are read one by one.

    files: tensor name -> shard file name; empty for a format with files of its own kind.
    """

    folder: Path
    config: Mapping[str, Any]
    quantization_config: Mapping[str, Any] | None
    files: Mapping[str, str] = field(repr=False)

    @property
    def kv_scales(self) -> list[str]:
        """Names of the scales of keys and values, where the configuration says that there are."""
        said = (self.quantization_config or {}).get("kv_cache_scheme")
        return [name for name in self.files if said and name.rpartition(".")[2] in SCALES]

    def tensors(self, names: list[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of these tensors, or all, in that order. Raises UserError for unreadable
        shards."""
        with Shards() as shards:
            for name in self.files if names is None else names:
                yield name, shards.tensor(self.folder / self.files[name], name)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Configuration and tensor names of a checkpoint folder. Raises UserError if it is none."""
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json")
    config = read_object(folder / "config.json")
    quantization = config.get("quantization_config")
    if quantization is not None and (wrong := formats.problem(quantization)):
        raise UserError(f"{folder / 'config.json'}: {wrong}")
    if quantization is not None and _reader(quantization) is not None:
        return Checkpoint(folder, config, quantization, {})
    files: dict[str, str] = {}
    for path in weight_files(folder):
        with _readable(path):
            files |= dict.fromkeys(read_header(path), path.name)
    return Checkpoint(folder, config, quantization, dict(sorted(files.items())))


def _reader(quantization: Mapping[str, Any]) -> Any:
    """How a format reads files of its own kind, None for safetensors."""
    known = formats.of_method(quantization)
    return next((fmt.read for fmt in known if isinstance(fmt, WholeFormat)), None)


Maker = Callable[[Shards], Tensor]


class Decoded(Lazy[Maker, Maker]):
    """What the tensors of a checkpoint decode to: key -> what reads and decodes it. Packed weights
    are plain ``X.weight`` (out, in)."""

    def __init__(self, folder: Path, dtype: torch.dtype | None = None):
        """dtype: of packed weights, and of all that a format reads itself; None is float32, or as
        that format reads it. Raises UserError for a folder or quantization method that cannot be
        read."""
        self.checkpoint, self._dtype = read_checkpoint(folder), dtype
        self.packed: frozenset[str] = frozenset()
        quantization = self.checkpoint.quantization_config
        own = _reader(quantization) if quantization is not None else None
        makers: dict[str, Maker] = {}
        super().__init__(makers, lambda maker: maker)
        if own is not None:
            tensors = own(folder)
            makers |= {name: partial(self._own, tensors, name) for name in tensors}
            return
        fmt = formats.from_config(quantization) if quantization is not None else None
        self.packed = fmt.packed(self.checkpoint.files) if fmt else frozenset()
        schemes = formats.schemes_of(quantization, self.packed) if quantization is not None else {}
        scales = set(self.checkpoint.kv_scales)
        for name in (name for name in self.checkpoint.files if name not in scales):
            module, _, part = name.rpartition(".")
            if (
                not isinstance(fmt, PackedFormat)
                or module not in self.packed
                or part not in fmt.parts
            ):
                makers[name] = partial(self._stored, name)
            elif part == next(iter(fmt.parts)):
                scheme = schemes.get(module)
                makers[f"{module}.weight"] = partial(self._unpacked, fmt, module, scheme)

    def _own(self, tensors: Mapping[str, Tensor], name: str, shards: Shards) -> Tensor:
        return tensors[name] if self._dtype is None else tensors[name].to(self._dtype)

    def _stored(self, name: str, shards: Shards) -> Tensor:
        return shards.tensor(self.checkpoint.folder / self.checkpoint.files[name], name)

    def _unpacked(
        self, fmt: PackedFormat, module: str, scheme: Scheme | None, shards: Shards
    ) -> Tensor:
        names = [n for part in fmt.parts if (n := f"{module}.{part}") in self.checkpoint.files]
        parts = {name: self._stored(name, shards) for name in names}
        try:
            if scheme is None:  # says why
                scheme = formats.scheme_of(self.checkpoint.quantization_config or {}, module)
            codes = fmt.unpack(module, parts, scheme)
        except CONTRADICTIONS as error:
            raise UserError(
                f"{self.checkpoint.folder}: {module} contradicts quantization_config: {error}"
            ) from error
        return dequantize(codes, self._dtype or torch.float32)


def dequantized_state_dict(
    folder: Path, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint tensor name, tensor) of `Decoded`, one after the other. dtype: of all floating
    tensors; None keeps the stored ones and decodes packed weights to float32.

    Raises UserError as that does, and for tensors that contradict the configuration.
    """
    with Shards() as shards:
        for name, make in Decoded(folder, dtype).items():
            tensor = make(shards)
            yield name, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise UserError(
            f"{path} cannot be read ({error}): the file is damaged or cut off, copy it again"
        ) from error
