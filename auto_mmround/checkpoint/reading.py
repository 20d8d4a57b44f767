"""The tensors of a checkpoint folder, read one by one, and the weights that they decode to."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.headers import DAMAGED, read_header
from auto_mmround.model.kv_cache import SCALES
from auto_mmround.numerics.grids import dequantize
from auto_mmround.untrusted import read_object, weight_files

# Errors of unpacking if tensors contradict their configuration.
CONTRADICTIONS = (ValueError, LookupError, RuntimeError, TypeError, ArithmeticError)


class Shards(ExitStack):
    """Weight files, each opened once, until the context ends. Raises UserError for unreadable
    files."""

    def __init__(self) -> None:
        super().__init__()
        self._opened: dict[Path, Any] = {}

    def tensor(self, path: Path, name: str) -> Tensor:
        """A tensor of a file."""
        if path not in self._opened:
            with _readable(path):
                self._opened[path] = self.enter_context(safe_open(path, "pt"))
        try:
            found: Tensor = self._opened[path].get_tensor(name)
        except (SafetensorError, OSError, KeyError) as error:
            raise UserError(f"{path}: {name} cannot be read ({error})") from error
        return found


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
    return next((fmt.read for fmt in formats.of_method(quantization) if fmt.read), None)


def dequantized_state_dict(
    folder: Path, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint tensor name, tensor) by name; packed weights become plain ``X.weight`` (out, in).

    dtype: of all floating tensors; None keeps the stored ones and decodes packed weights to
    float32. Raises UserError for a folder or quantization method that cannot be read, and for
    tensors that contradict the configuration.
    """
    checkpoint = read_checkpoint(folder)
    quantization = checkpoint.quantization_config
    own = _reader(quantization) if quantization is not None else None
    if own is not None:
        for name, tensor in own(folder).items():
            yield name, tensor if dtype is None else tensor.to(dtype)
        return
    fmt = formats.from_config(quantization) if quantization is not None else None
    packed = fmt.packed(checkpoint.files) if fmt else frozenset()
    schemes = formats.schemes_of(quantization, packed) if quantization is not None else {}
    scales = set(checkpoint.kv_scales)
    with Shards() as shards:
        for name in checkpoint.files:
            if name in scales:
                continue
            module, _, part = name.rpartition(".")
            if fmt is None or quantization is None or module not in packed or part not in fmt.parts:
                tensor = shards.tensor(folder / checkpoint.files[name], name)
                yield (
                    name,
                    (
                        tensor.to(dtype)
                        if dtype is not None and tensor.is_floating_point()
                        else tensor
                    ),
                )
            elif part == next(iter(fmt.parts)):
                own_names = [n for p in fmt.parts if (n := f"{module}.{p}") in checkpoint.files]
                parts = {n: shards.tensor(folder / checkpoint.files[n], n) for n in own_names}
                try:
                    if module not in schemes:
                        formats.scheme_of(quantization, module)  # says why
                    codes = fmt.unpack(module, parts, schemes[module])
                except CONTRADICTIONS as error:
                    raise UserError(
                        f"{folder}: {module} contradicts quantization_config: {error}"
                    ) from error
                yield f"{module}.weight", dequantize(codes, dtype or torch.float32)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGED as error:
        raise UserError(
            f"{path} cannot be read ({error}): the file is damaged or cut off, copy it again"
        ) from error
