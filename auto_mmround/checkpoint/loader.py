"""Our own reader: a checkpoint of ours becomes a plain Transformers model with decoded weights."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.modeling_utils import LoadStateDictInfo
from transformers.pytorch_utils import Conv1D

from auto_mmround.checkpoint.reading import Decoded, Shards, read_checkpoint
from auto_mmround.checkpoint.rounding import round_cache, round_inputs
from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.lazy import LazyTensor
from auto_mmround.model import devices
from auto_mmround.model.borrowed import made_runnable
from auto_mmround.model.keys import further_layers, parameter_names, renamed_keys
from auto_mmround.model.loading import (
    NONSENSE,
    Loaded,
    Readable,
    load,
    load_processor,
    load_tokenizer,
    model_class,
    read_config,
    skeleton,
)
from auto_mmround.model.quantized import METHODS
from auto_mmround.model.restacking import restacked, stacking
from auto_mmround.model.streaming import has_room, load_streamed
from auto_mmround.untrusted import one_line, read_object

log = logging.getLogger("auto_mmround")

# Methods in which a source may be stored. compressed-tensors is not among them: it is read as
# engines read it, with activations.
SOURCES = tuple(method for method in METHODS if method != "compressed-tensors")


def from_quantized(
    folder: str | Path,
    *,
    dtype: str | None = None,
    device: str | torch.device = "cpu",
    remote_code: bool = False,
    activations: bool = False,
    stream: bool | None = False,
) -> Loaded:
    """Load a quantized checkpoint without any engine: decode packed weights, keep the rest.

    dtype: of all weights; None is the configuration's. activations: if the configuration asks
    engines to quantize a layer's inputs, we do so. stream: decode blocks when their turn comes;
    None: where the decoded model takes most of the free memory. Raises UserError for a folder that
    can't be read or computed with, and for tensors that don't fit the model exactly.
    """
    folder, device = Path(folder), torch.device(device)
    config = read_config(folder, remote_code)
    config.quantization_config = None
    del config.quantization_config
    wanted = devices.dtype_of(dtype) or config.dtype or torch.float32
    decoded = Decoded(folder, wanted)
    quantization = decoded.checkpoint.quantization_config
    if quantization is not None and (unread := formats.unread(quantization, activations)):
        raise UserError(f"{folder} can't be computed as engines do: {unread}")
    try:
        empty = skeleton(config, folder, remote_code)
        streams = _streams(empty, folder, wanted, device) if stream is None else stream
        state = AsKept(empty, folder, decoded)
        cls = model_class(config, folder, remote_code)
        model, holder, met = load_streamed(
            cls, config, state, wanted, device, renamed_keys, whole=not streams
        )
    except NONSENSE as error:
        if devices.out_of_memory(error):
            raise
        raise UserError(f"{folder} can't be loaded: {one_line(str(error))[:400]}") from None
    _check_filled(folder, met)
    made_runnable(model)
    if activations:
        round_inputs(model, decoded, state.files, device)
        round_cache(model, decoded.checkpoint, state.files, device)
    if (folder / "generation_config.json").is_file():
        with Readable(folder, "generation_config.json"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    processor = load_processor(folder, remote_code)
    tokenizer = load_tokenizer(folder, processor, remote_code)
    model = model.eval().requires_grad_(False)
    model = model if streams else model.to(device)  # type: ignore[arg-type]
    return Loaded(model, tokenizer, processor, folder, holder)


def _streams(
    empty: PreTrainedModel, folder: Path, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether the decoded model takes too much of the free memory."""
    size = sum(parameter.numel() for parameter in empty.parameters()) * dtype.itemsize
    if has_room(size, device):
        return False
    log.info("%s: blocks are read when their turn comes", folder)
    return True


def _carried(model: PreTrainedModel, folder: Path, keys: Iterable[str]) -> set[str]:
    """The keys that the model's class does not load, and did not load from the source either:
    layers behind its own, and the keys that `run.json` names."""
    record = folder / "run.json"
    unread = read_object(record).get("unread") if record.is_file() else None
    known = set(map(str, unread)) if isinstance(unread, list) else set()
    return further_layers(model, keys) | (known & set(keys))


def _check_filled(folder: Path, met: LoadStateDictInfo) -> None:
    """Raises UserError if not every tensor filled one parameter."""
    mismatched = (key for key, *_ in met.mismatched_keys)
    wrong = sorted({*met.missing_keys, *met.unexpected_keys, *mismatched})
    if wrong:
        raise UserError(
            f"{folder}: {len(wrong)} tensors are missing, unknown or of the wrong shape, first"
            f" {wrong[0]}"
        )


class AsKept:
    """Decoded tensors in the form in which a model's class reads them, a `Keyed`.

    Packed weights are (out, in). GPT-2's Conv1D is (in, out); some families stack experts.
    """

    def __init__(self, model: PreTrainedModel, folder: Path, decoded: Decoded):
        keys = decoded.keys() - _carried(model, folder, decoded)
        self._model, self._decoded = model, decoded
        self._stacks = stacking(model, keys)
        members = {member for _, each in self._stacks.values() for member in each}
        self.files = [*(key for key in decoded if key in keys - members), *self._stacks]
        turned = {
            f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)
        }
        stored = decoded.checkpoint.files
        names = parameter_names(model, self.files) if turned else {}
        # packed ones of 8 bits keep the name of the weight
        packed = {f"{module}.weight" for module in decoded.packed}
        self._turned = {
            key
            for name, key in names.items()
            if name in turned and (key in packed or key not in stored)
        }

    @contextmanager
    def reader(self) -> Iterator["_Slices"]:
        """See `Keyed.reader`."""
        with Shards() as shards:
            yield _Slices(partial(self.tensor, shards=shards))

    def tensor(self, key: str, shards: Shards) -> Tensor:
        """One of ``files``."""
        if key in self._stacks:
            name, members = self._stacks[key]
            return restacked(
                self._model, name, members, lambda member: self._decoded[member](shards)
            )
        tensor = self._decoded[key](shards)
        return tensor.t().contiguous() if key in self._turned else tensor


@dataclass(frozen=True)
class _Slices:
    """What `AsKept.reader` gives."""

    tensor: Callable[[str], Tensor]

    def slice(self, key: str) -> LazyTensor:
        """See `Slices.slice`."""
        return LazyTensor(partial(self.tensor, key))


def load_any(
    name: str,
    *,
    dtype: str | None = None,
    device: str | torch.device = "cpu",
    remote_code: bool = False,
    stream: bool | None = False,
) -> Loaded:
    """A plain model, or a quantized checkpoint with activations as an engine quantizes them.

    On a processor float16 becomes float32, as in `load`. stream: see there and `from_quantized`.
    """
    folder = Path(name)
    quantization = read_checkpoint(folder).quantization_config if folder.is_dir() else None
    # that is how the source is stored
    if quantization is not None and quantization.get("quant_method") not in SOURCES:
        own = devices.dtype_of(dtype) or read_config(folder, remote_code).dtype
        half = own == torch.float16
        dtype = "float32" if half and torch.device(device).type == "cpu" else dtype
        return from_quantized(
            folder,
            dtype=dtype,
            device=device,
            remote_code=remote_code,
            activations=True,
            stream=stream,
        )
    return load(name, dtype=dtype, device=device, remote_code=remote_code, stream=stream)
