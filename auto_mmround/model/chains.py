"""Capture what enters each stage, and push it block by block as the model itself does.

Every sample keeps its own length; nothing is padded. A `Chain` holds one hidden state a sample, plus how the model
called each block for that sample (positions, masks, cross-attention states). Samples of equal shape run together
where a test on the first pair shows that the block treats them alike.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from auto_mmround.errors import UserError
from auto_mmround.model.structure import Stage

log = logging.getLogger("auto_mmround")

# Largest relative difference between replay and model that may be rounding of the compute dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Call:
    """How the model called one block for one sample, but for the hidden state: it goes in at ``slot``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str  # position, or keyword, of the hidden state

    def run(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """The block's output hidden state."""
        if isinstance(self.slot, int):
            args = (*self.args[: self.slot], hidden, *self.args[self.slot :])
            return first_tensor(block(*args, **self.kwargs))
        return first_tensor(block(*self.args, **self.kwargs, **{self.slot: hidden}))


@dataclass
class Chain:
    """The inputs of one stage's current block: ``hidden[i]`` and ``calls[i][block]`` for sample i."""

    stage: Stage
    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    sample: list[int] = field(default_factory=list)  # index into the captured inputs: not every one reaches a tower
    batched: bool = False

    def __len__(self) -> int:
        return len(self.hidden)

    def advanced(self, blocks: Sequence[nn.Module], first: int, batch_size: int) -> "Chain":
        """The chain after ``blocks``, the first of which has index ``first`` in the stage."""
        out: list[Tensor] = [torch.empty(0)] * len(self)
        with torch.no_grad():
            for at in range(0, len(self), batch_size):
                for group, hidden in self.forward(blocks, first, range(at, min(at + batch_size, len(self)))):
                    for row, i in enumerate(group):
                        part = hidden[row : row + 1] if len(group) > 1 else hidden
                        out[i] = part.detach().to(self.hidden[i].device)
        return replace(self, hidden=out)

    def forward(
        self, blocks: Sequence[nn.Module], first: int, indices: Iterable[int]
    ) -> Iterable[tuple[list[int], Tensor]]:
        """Run samples through ``blocks``; yields (indices, output (B, T, D)), one item for each shape."""
        for group in self.groups(indices, first):
            yield group, self.run_group(blocks, first, group)

    def run_group(self, blocks: Sequence[nn.Module], first: int, group: Sequence[int]) -> Tensor:
        """Run samples of one shape through ``blocks`` together; (B, T, D)."""
        device = next(blocks[0].parameters()).device
        hidden = torch.cat([self.hidden[i] for i in group]) if len(group) > 1 else self.hidden[group[0]]
        hidden = hidden.to(device)
        for offset, block in enumerate(blocks):
            call = merge([self.calls[i][first + offset] for i in group])
            hidden = to_device(call, device).run(block, hidden)
        return hidden

    def groups(self, indices: Iterable[int], first: int) -> list[list[int]]:
        """Samples cut into those that can run together."""
        if not self.batched:
            return [[i] for i in indices]
        groups: dict[Any, list[int]] = {}
        for i in indices:
            groups.setdefault(self._shape_of(i, first), []).append(i)
        return list(groups.values())

    def _shape_of(self, i: int, first: int) -> Any:
        call = self.calls[i][first]
        return (tuple(self.hidden[i].shape), signature(call.args), signature(call.kwargs))

    def check_batching(self, block: nn.Module) -> None:
        """Allow batches if the first pair of equal shape gives together what each gives alone."""
        self.batched = False
        pair = next((g for g in self._equal_shapes() if len(g) > 1), [])[:2]
        if not pair or self.hidden[pair[0]].shape[0] != 1:
            return
        with torch.no_grad():
            alone = torch.cat([next(iter(self.forward([block], 0, [i])))[1] for i in pair])
            try:
                merged = merge([self.calls[i][0] for i in pair])
            except UnmergeableError:
                return
            device = next(block.parameters()).device
            together = to_device(merged, device).run(block, torch.cat([self.hidden[i] for i in pair]).to(device))
        self.batched = alone.shape == together.shape and difference(together, alone) <= TOLERANCE[alone.dtype]

    def _equal_shapes(self) -> list[list[int]]:
        groups: dict[Any, list[int]] = {}
        for i in range(len(self)):
            groups.setdefault(self._shape_of(i, 0), []).append(i)
        return list(groups.values())


class UnmergeableError(ValueError):
    """Calls of two samples have no common batch dimension."""


def capture(
    model: nn.Module,
    stages: Sequence[Stage],
    inputs: Sequence[Mapping[str, Any]],
    *,
    precision: Callable[[], AbstractContextManager] = nullcontext,
    store: torch.device | str = "cpu",
    on_sample: Callable[[int], None] = lambda i: None,
) -> dict[str, Chain]:
    """Run the model over all inputs and record each stage's first hidden state and every block's call.

    inputs: keyword arguments of the model, batch dimension 1. Returns a chain for each stage that a sample reached, in
    the order given. The first sample of each stage is replayed and must reproduce the model's own output.
    Raises UserError for a stage that is not a plain chain of blocks.
    """
    device = next(model.parameters()).device
    chains: dict[str, Chain] = {}
    for i, kwargs in enumerate(inputs):
        recorders = [_Recorder(model, stage, store) for stage in stages]
        with ExitStack() as stack, torch.no_grad(), precision():
            for recorder in recorders:
                stack.callback(recorder.remove)
            model(**{key: moved(value, device) for key, value in kwargs.items()}, use_cache=False)
        for recorder in (r for r in recorders if r.calls):
            fresh = recorder.stage.path not in chains
            chain = chains.setdefault(recorder.stage.path, Chain(recorder.stage))
            recorder.check_order()
            chain.hidden.append(recorder.first)
            chain.calls.append(recorder.calls)
            chain.sample.append(i)
            if fresh:
                with precision():
                    _check_replay(model, chain, recorder.last)
        on_sample(i)
    for chain in chains.values():
        with precision():
            chain.check_batching(model.get_submodule(chain.stage.blocks[0]))
    return {stage.path: chains[stage.path] for stage in stages if stage.path in chains}


class _Recorder:
    """Hooks on the blocks of one stage for one forward pass."""

    def __init__(self, model: nn.Module, stage: Stage, store: torch.device | str):
        self.stage, self.store = stage, store
        self.calls: list[Call] = []
        self.order: list[int] = []
        self.first = self.last = torch.empty(0)
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}  # a tensor given to every block is kept once
        self.handles = []
        blocks = [model.get_submodule(name) for name in stage.blocks]
        for index, block in enumerate(blocks):
            hook = self._before(index)
            self.handles.append(block.register_forward_pre_hook(hook, with_kwargs=True))
        self.handles.append(blocks[-1].register_forward_hook(self._after))

    def _before(self, index: int) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, slot = _hidden_of(args, kwargs)
            if not self.calls:
                self.first = hidden.detach().to(self.store, copy=True)
            self.order.append(index)
            if isinstance(slot, int):
                args = args[:slot] + args[slot + 1 :]
            else:
                kwargs = {key: value for key, value in kwargs.items() if key != slot}
            self.calls.append(Call(self._keep(args), self._keep(kwargs), slot))

        return hook

    def _after(self, block: nn.Module, args: Any, output: Any) -> None:
        self.last = first_tensor(output).detach().to(self.store)

    def _keep(self, value: Any) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            if id(tensor) not in self.seen:
                self.seen[id(tensor)] = (tensor, tensor.detach().to(self.store))
            return self.seen[id(tensor)][1]

        return map_tensors(value, keep)

    def check_order(self) -> None:
        """Each block exactly once, in order; everything else needs code of its own."""
        if self.order != list(range(self.stage.depth)):
            raise UserError(
                f"{self.stage.path}: the forward pass does not run each block once and in order "
                f"(saw {self.order[:6]}...); this family is not supported yet"
            )

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def _check_replay(model: nn.Module, chain: Chain, expected: Tensor) -> None:
    blocks = [model.get_submodule(name) for name in chain.stage.blocks]
    with torch.no_grad():
        replayed = next(iter(chain.forward(blocks, 0, [len(chain) - 1])))[1].to(expected.device)
    gap = difference(replayed, expected)
    if not gap <= TOLERANCE[expected.dtype]:
        raise UserError(
            f"{chain.stage.path}: replaying the blocks misses the model's own output by {gap:.1%}; the model does "
            "something between its blocks that is not handled, so this family is refused"
        )
    log.info("%s: replay of %d blocks equals the model (relative difference %.1e)", chain.stage.path, len(blocks), gap)


def difference(a: Tensor, b: Tensor) -> float:
    """Relative difference |a - b| / |b|, at least in float32."""
    b = b.to(torch.promote_types(b.dtype, torch.float32))
    return ((a.to(b.dtype) - b).norm() / b.norm().clamp(min=1e-12)).item()


def first_tensor(output: Any) -> Tensor:
    """The hidden state of a block's output: itself, or the first element of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def _hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, int | str]:
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for slot, value in named:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value, slot
    raise UserError("a block was called without a hidden state; this family is not supported yet")


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Apply ``change`` to every tensor in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        return type(value)(map_tensors(item, change) for item in value)
    if isinstance(value, dict):
        return {key: map_tensors(item, change) for key, item in value.items()}
    return value


def moved(value: Any, device: torch.device) -> Any:
    """The value with its tensors on ``device``, however nested."""
    return map_tensors(value, lambda tensor: tensor.to(device))


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """The value with its floating-point tensors in ``dtype``, however nested."""
    return map_tensors(value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)


def to_device(call: Call, device: torch.device) -> Call:
    """The call with its tensors on ``device``."""
    return Call(moved(call.args, device), moved(call.kwargs, device), call.slot)


def signature(value: Any) -> Any:
    """Shapes in nested arguments, and the other values themselves where they can be compared."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(signature(item) for item in value)
    if isinstance(value, dict):
        return tuple((key, signature(item)) for key, item in value.items())
    return value if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__


def merge(calls: Sequence[Call]) -> Call:
    """One call for several samples: tensors are joined along their first dimension of size 1, equal ones are shared.

    Raises UnmergeableError where there is no such dimension; `Chain.check_batching` tests that the guess is right.
    """
    if len(calls) == 1:
        return calls[0]
    return Call(_merge([c.args for c in calls]), _merge([c.kwargs for c in calls]), calls[0].slot)


def _merge(values: Sequence[Any]) -> Any:
    head = values[0]
    if isinstance(head, Tensor):
        for dim in range(min(2, head.ndim)):
            if head.shape[dim] == 1:
                return torch.cat(list(values), dim)
        if all(torch.equal(head, other) for other in values[1:]):
            return head
        raise UnmergeableError(f"tensors of shape {tuple(head.shape)}")
    if isinstance(head, (tuple, list)):
        return type(head)(_merge(items) for items in zip(*values))
    if isinstance(head, dict):
        return {key: _merge([value[key] for value in values]) for key in head}
    return head
