"""Where magnitude can move without changing the model: from a norm or a linear layer into the
layers that read it.

Nothing is told by names. A norm's readers are seen in one forward pass of the block: every
operation on the norm's output, views included, belongs to some module; if one of them is no linear
layer (a residual, a router), the norm is left alone. Between two linear layers lies code that can't
be seen (attention, a product with a gate); whether a scale passes through it is tried: one side is
divided, the other multiplied, and the block's output must stay.
"""

import copy
import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auto_mmround.model import devices
from auto_mmround.model.chains import (
    Call,
    as_dtype,
    difference,
    first_tensor,
    map_tensors,
    to_device,
)
from auto_mmround.model.passes import run_model
from auto_mmround.model.speaking import speaking
from auto_mmround.model.structure import LINEAR, linears

log = logging.getLogger("auto_mmround")

# linear layers before a reader that may be its source: query, key and value, or gate and up
NEAR = 3
CANCELS = 1e-5  # share of the change by one side alone that may be left when both sides are scaled


@dataclass(frozen=True)
class Pair:
    """source: a norm or linear layer. readers: the linear layers that read its output. Names within
    the block.

    offset: a norm multiplies by offset + weight (Gemma: 1); None where the source is a linear
      layer.
    """

    source: str
    readers: tuple[str, ...]
    offset: float | None


@dataclass(frozen=True)
class Found:
    """The pairs of a block, and why other norms that linear layers read are none."""

    pairs: tuple[Pair, ...]
    refused: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def norm_pairs(block: nn.Module, call: Call, hidden: Tensor) -> Found:
    """The pairs of ``block`` whose source is a norm; the model calls the block by ``call`` on
    ``hidden`` (1, T, D)."""
    layers = dict(linears(block))
    watch = _Watch(block)
    with watch:
        output = call.run(block, hidden)
    pairs, refused = [], {}
    for name, seen in watch.norms.items():
        readers = tuple(dict.fromkeys(reader for reader in seen.readers if reader in layers))
        if not readers:
            continue
        reason = _why_not(seen, watch, layers, output)
        offset = (
            None if reason else gain_offset(block.get_submodule(name), *seen.args, **seen.kwargs)
        )
        if reason or offset is None:
            refused[name] = reason or "its gain is neither its weight nor 1 + its weight"
        else:
            pairs.append(Pair(name, readers, offset))
    return Found(tuple(pairs), refused)


@torch.no_grad()
def linear_pairs(block: nn.Module, call: Call, hidden: Tensor) -> tuple[Pair, ...]:
    """The pairs of ``block`` between linear layers, tried in float64 on a copy of the block.

    In float64 a scale that passes leaves 1e-10 of the change that one side alone makes, and one
    that only nearly does (small values through an activation) a thousandth. The scale is one a
    channel, so grouped-query attention, with fewer values than the output projection has inputs,
    has no pair.
    """
    twin = twin_of(block)
    call, hidden = as_twin(twin, call, hidden)
    layers = dict(linears(twin))
    order: list[str] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_, name=name: order.append(name))
        for name, layer in layers.items()
    ]
    try:
        before = call.run(twin, hidden)
    except RuntimeError as error:  # kernels without float64, such as grouped experts
        if devices.out_of_memory(error):
            raise
        reason = str(error).split("\n", 1)[0]
        log.warning(
            "%s: no pairs of linear layers are looked for: %s", type(block).__name__, reason
        )
        return ()
    for handle in handles:
        handle.remove()
    pairs = []
    for at, reader in enumerate(order):
        for source in reversed(order[max(0, at - NEAR) : at]):
            pair = Pair(source, (reader,), None)
            fits = _out_features(layers[source]) == _in_features(layers[reader])
            once = order.count(source) == order.count(reader) == 1
            if fits and once and _passes(twin, call, hidden, before, pair):
                pairs.append(pair)
                break
    return tuple(pairs)


def twin_of(block: nn.Module) -> nn.Module:
    """A copy of a block in float64, on a device that has it."""
    own = next(block.parameters()).device
    device = own if devices.traits(own).doubles else torch.device("cpu")
    # hooks of a device map would move its inputs
    twin = remove_hook_from_module(copy.deepcopy(block), recurse=True)
    return twin.to(device).to(torch.float64)  # first away from a device that has no float64


def as_twin(twin: nn.Module, call: Call, hidden: Tensor) -> tuple[Call, Tensor]:
    """How the model calls a block, for the block's twin."""
    device = next(twin.parameters()).device
    call = to_device(Call(call.args, call.kwargs, call.slot), device)
    call = Call(as_dtype(call.args, torch.float64), as_dtype(call.kwargs, torch.float64), call.slot)
    return call, hidden.to(device).to(torch.float64)


def shape_signature(block: nn.Module) -> tuple[Any, ...]:
    """Class, and names and shapes of the linear layers: equal for blocks that run the same code."""
    return (type(block), *((name, *layer.weight.shape) for name, layer in linears(block)))  # type: ignore[misc]


def _passes(twin: nn.Module, call: Call, hidden: Tensor, before: Tensor, pair: Pair) -> bool:
    """Whether dividing the source and multiplying the reader leaves the output, though one alone
    changes it."""
    changed = [twin.get_submodule(name) for name in (pair.source, *pair.readers)]
    kept = [
        {key: tensor.clone() for key, tensor in layer.state_dict().items()} for layer in changed
    ]
    channels = _out_features(changed[0])
    scale_C = 2 ** (2 * torch.rand(channels, generator=torch.Generator().manual_seed(channels)) - 1)
    changes = []
    for tried in (pair, Pair(pair.source, (), None)):
        rescale(twin, tried, scale_C)
        changes.append(difference(call.run(twin, hidden), before))
        for layer, state in zip(changed, kept):
            layer.load_state_dict(state)
    return changes[0] < CANCELS * changes[1]


@torch.no_grad()
def rescale(block: nn.Module, pair: Pair, scale_C: Tensor) -> None:
    """Divide the source's output channels by ``scale_C`` and multiply the readers' columns by it,
    in place.

    The norm's new weight is rounded to its dtype first and the readers get the exact quotient, so
    that their product stays. A channel that would vanish is left as it is.
    """
    source: Any = block.get_submodule(pair.source)
    scale_C = scale_C.to(
        source.weight.device, torch.promote_types(source.weight.dtype, torch.float32)
    )
    if pair.offset is None:
        along = 1 if isinstance(source, Conv1D) else 0
        _multiply(source.weight, 1 / scale_C, along)
    else:
        gain_C = source.weight.to(scale_C.dtype) + pair.offset
        stored_C = (gain_C / scale_C - pair.offset).to(source.weight.dtype)
        left_C = stored_C.to(scale_C.dtype) + pair.offset
        kept_C = (left_C != 0) & left_C.isfinite() & (gain_C != 0)
        scale_C = torch.where(kept_C, gain_C / left_C, 1.0)
        source.weight.copy_(torch.where(kept_C, stored_C, source.weight))
    if getattr(source, "bias", None) is not None:
        _multiply(source.bias, 1 / scale_C, 0)
    for reader in pair.readers:
        layer: Any = block.get_submodule(reader)
        _multiply(layer.weight, scale_C, 0 if isinstance(layer, Conv1D) else 1)


def _multiply(parameter: Tensor, factor_C: Tensor, along: int) -> None:
    shape = [-1 if dim == along else 1 for dim in range(parameter.ndim)]
    parameter.copy_(parameter.to(factor_C.dtype) * factor_C.reshape(shape))


@torch.no_grad()
def gain_offset(norm: nn.Module, *args: Any, **kwargs: Any) -> float | None:
    """0 for a norm that multiplies by its weight, 1 for one that multiplies by 1 + weight, None for
    anything else.

    args, kwargs: what it is called with, gates included. Tried by setting the weight to 0 and to 1.
    """
    weight: Tensor = norm.weight  # type: ignore[assignment]
    bias = getattr(norm, "bias", None)
    kept, outputs = weight.clone(), []
    try:
        for value in (0.0, 1.0):
            weight.fill_(value)
            output = norm(*args, **kwargs).float()
            outputs.append(output if bias is None else output - bias.float())
    finally:
        weight.copy_(kept)
    zero, one = outputs
    if not one.any():
        return None
    if not zero.any():
        return 0.0
    return 1.0 if difference(one, 2 * zero) < 2e-2 else None


@torch.no_grad()
def final_norm(
    model: PreTrainedModel, head: nn.Module, kwargs: Mapping[str, Any]
) -> tuple[str, float] | None:
    """The norm whose output the output head reads, and its offset, see `Pair`; None where another
    module makes what it reads, or where the norm does something else."""
    made: dict[int, tuple[str, tuple[Any, ...], Tensor]] = {}
    read: list[int] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if _looks_like_norm(module):
                stack.callback(module.register_forward_hook(_note(made, name)).remove)
        hook = head.register_forward_pre_hook(lambda layer, args: read.append(_memory(args[0])))
        stack.callback(hook.remove)
        run_model(speaking(model), kwargs)
    name, args, _ = made.get(read[-1], ("", (), None)) if read else ("", (), None)
    offset = gain_offset(model.get_submodule(name), *args) if name else None
    return None if offset is None else (name, offset)


def _note(made: dict[int, tuple[str, tuple[Any, ...], Tensor]], name: str) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and args:
            made[_memory(output)] = name, args, output  # alive: its memory is its name

    return hook


@dataclass
class _Norm:
    """What one pass showed of a norm. readers: innermost modules whose operations read its output,
    "" the block."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor
    calls: int = 1
    readers: list[str] = field(default_factory=list)


class _Watch(TorchDispatchMode):
    """One forward pass of a block: who reads the norms' outputs, by their memory. ``order``:
    modules as they ran."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.norms: dict[str, _Norm] = {}
        self.order: list[str] = []
        self._running: list[str] = [""]
        self._memory: dict[int, _Norm] = {}
        self._handles: list[Any] = []
        for name, module in block.named_modules():
            if name:
                self._handles.append(module.register_forward_pre_hook(self._enter(name)))
                self._handles.append(
                    module.register_forward_hook(self._leave(name), with_kwargs=True)
                )

    def __exit__(self, *error: Any) -> None:
        for handle in self._handles:
            handle.remove()
        super().__exit__(*error)

    def _enter(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            self._running.append(name)
            self.order.append(name)

        return hook

    def _leave(self, name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._running.pop()
            given = [*args, *kwargs.values()]
            if _looks_like_norm(module) and given and isinstance(output, Tensor):
                if name in self.norms:
                    self.norms[name].calls += 1
                elif isinstance(given[0], Tensor) and output.shape == given[0].shape:
                    self.norms[name] = self._memory[_memory(output)] = _Norm(args, kwargs, output)

        return hook

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        own = {_memory(tensor) for tensor in _tensors(result)}
        for tensor in _tensors((args, kwargs or {})):
            norm = self._memory.get(_memory(tensor))
            if norm is not None and (_memory(tensor) not in own or func._schema.is_mutable):
                norm.readers.append(self._running[-1])
        return result


def _looks_like_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    plain = not any(True for _ in module.children()) and not isinstance(module, LINEAR)
    return plain and isinstance(weight, nn.Parameter) and weight.ndim == 1


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors(value: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    map_tensors(value, tensors.append)
    return tensors


def _why_not(
    seen: _Norm, watch: _Watch, layers: Mapping[str, nn.Module], output: Any
) -> str | None:
    others = [reader or "the block itself" for reader in seen.readers if reader not in layers]
    if others:
        return f"also read by {others[0]}"
    if _memory(first_tensor(output)) == _memory(seen.output):
        return "it leaves the block"
    channels = seen.output.shape[-1]
    if any(_in_features(layers[reader]) != channels for reader in seen.readers):
        return "a reader takes other channels"
    repeated = [reader for reader in seen.readers if watch.order.count(reader) > 1]
    return "it runs more than once" if seen.calls > 1 or repeated else None


def _in_features(layer: Any) -> int:
    return layer.weight.shape[0 if isinstance(layer, Conv1D) else 1]


def _out_features(layer: Any) -> int:
    return layer.weight.shape[1 if isinstance(layer, Conv1D) else 0]
