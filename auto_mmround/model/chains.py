"""Chains: the hidden states before a stage's current block, and how the model itself called every
block.

Every sample keeps its own length; nothing is padded. A `Chain` holds one hidden state a sample,
plus how the model called each block for that sample (positions, masks, cross-attention states).
Samples of equal shape run together where a test on the first pair shows that the block treats them
alike.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.structure import Stage

# Opens what blocks compute in.
Precision = Callable[[], AbstractContextManager]
# Largest relative difference between replay and model that may be rounding of the compute dtype.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Glue:
    """What the model does to the hidden state between two blocks, as seen for one sample.

    rows: int64 (N,), the tokens that it changes; values: float32 (N, D), what is added there
    (deep-stacked vision features). rows None: values is the whole new hidden state, where its shape
    changes. tokens: T of the sample.
    """

    rows: Tensor | None
    values: Tensor
    tokens: int

    def __call__(self, hidden: Tensor) -> Tensor:
        """The hidden state that the next block reads."""
        if self.rows is None:
            return self.values.to(hidden)
        flat_TD = hidden.reshape(-1, hidden.shape[-1])
        rows, values = self.rows.to(hidden.device), self.values.to(hidden.device)
        return flat_TD.index_copy(
            0, rows, (flat_TD[rows].float() + values).to(hidden.dtype)
        ).view_as(hidden)

    @classmethod
    def between(cls, output: Tensor, hidden: Tensor) -> "Glue | None":
        """The glue that makes ``hidden`` of a block's ``output``; None where they are the same."""
        if output.shape != hidden.shape:
            return cls(None, hidden, 0)
        if torch.equal(output, hidden):
            return None
        delta_TD = (
            hidden.reshape(-1, hidden.shape[-1]).float()
            - output.reshape(-1, hidden.shape[-1]).float()
        )
        rows = delta_TD.abs().amax(-1).nonzero()[:, 0]
        return cls(rows, delta_TD[rows], len(delta_TD))


Runner = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]


def run_plainly(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the block."""
    return block(*args, **kwargs)


@dataclass(frozen=True)
class Call:
    """How the model called one block for one sample, but for the hidden state: it goes in at
    ``slot``."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str  # position, or keyword, of the hidden state
    glue: Glue | None = None  # applied to the hidden state before

    def run(self, block: nn.Module, hidden: Tensor, runner: Runner = run_plainly) -> Tensor:
        """The block's output hidden state."""
        hidden = hidden if self.glue is None else self.glue(hidden)
        if isinstance(self.slot, int):
            args = (*self.args[: self.slot], hidden, *self.args[self.slot :])
            return first_tensor(runner(block, args, self.kwargs))
        return first_tensor(runner(block, self.args, self.kwargs | {self.slot: hidden}))


@dataclass
class Chain:
    """The inputs of one stage's current block: ``hidden[i]`` and ``calls[i][block]`` for entry i.

    sample: index into the captured inputs; not every input reaches a tower, and one may pass it
    twice. shared: mappings that blocks fill for later blocks (shared keys and values), as they
    stand before the current block. live: what a block is given depends on earlier blocks in a way
    that only the model knows, see `capture.recapture`. runner: how blocks are called, see
    `compiled.Compiled`. device: where they run. place: where their outputs are kept, e.g. a
    `spool.Spool`; None: on the device that the inputs are kept on.
    """

    stage: Stage
    hidden: list[Tensor] = field(default_factory=list)
    calls: list[list[Call]] = field(default_factory=list)
    shared: list[dict[str, Any]] = field(default_factory=list)
    sample: list[int] = field(default_factory=list)
    batched: bool = False
    live: bool = False
    runner: Runner = run_plainly
    device: torch.device | None = None
    place: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.hidden)

    def advanced(
        self,
        blocks: Sequence[nn.Module],
        first: int,
        batch_size: int,
        only: Sequence[int] | None = None,
        before: Callable[[list[int]], None] = lambda group: None,
    ) -> "Chain":
        """The chain after ``blocks``, the first of which has index ``first`` in the stage. only:
        the entries that will be read; others are empty from there on. before: told the entries that
        run together next."""
        out: list[Tensor] = [torch.empty(0)] * len(self)
        shared = list(self.shared)
        for group, hidden, state in self._passes(blocks, first, batch_size, only, before):
            for row, i in enumerate(group):
                part = hidden[row : row + 1] if len(group) > 1 else hidden
                out[i] = self.place(part) if self.place else part.detach().to(self.hidden[i].device)
                shared[i] = moved(state, self.hidden[i].device)
        return replace(self, hidden=out, shared=shared)

    def passed(
        self,
        blocks: Sequence[nn.Module],
        first: int,
        batch_size: int,
        only: Sequence[int] | None,
        before: Callable[[list[int]], None],
    ) -> None:
        """As `advanced`, for those who watch the blocks: nothing is kept."""
        for _ in self._passes(blocks, first, batch_size, only, before):
            pass

    def _passes(
        self,
        blocks: Sequence[nn.Module],
        first: int,
        batch_size: int,
        only: Sequence[int] | None,
        before: Callable[[list[int]], None],
    ) -> Iterator[tuple[list[int], Tensor, dict[str, Any]]]:
        entries = range(len(self)) if only is None else only
        for at in range(0, len(entries), batch_size):
            for group in self.groups(entries[at : at + batch_size], first):
                before(group)
                with torch.no_grad():
                    hidden, state = self._run(blocks, first, group)
                yield group, hidden, state

    def offload(self, place: Callable[[Tensor], Tensor]) -> None:
        """Keep hidden states elsewhere from now on."""
        self.place = place
        for i, hidden in enumerate(self.hidden):
            self.hidden[i] = place(hidden)

    def forward(
        self, blocks: Sequence[nn.Module], first: int, indices: Iterable[int]
    ) -> Iterable[tuple[list[int], Tensor]]:
        """Run samples through ``blocks``; yields (indices, output (B, T, D)), one item for each
        shape."""
        for group in self.groups(indices, first):
            yield group, self.run_group(blocks, first, group)

    def run_group(self, blocks: Sequence[nn.Module], first: int, group: Sequence[int]) -> Tensor:
        """Run samples of one shape through ``blocks`` together; (B, T, D)."""
        return self._run(blocks, first, group)[0]

    def _run(
        self, blocks: Sequence[nn.Module], first: int, group: Sequence[int]
    ) -> tuple[Tensor, dict[str, Any]]:
        hidden = (
            torch.cat([self.hidden[i] for i in group]) if len(group) > 1 else self.hidden[group[0]]
        )
        state, device = self.shared[group[0]], None
        for offset, block in enumerate(blocks):
            own = self._place_of(block) or hidden.device
            if own != device:
                # a copy for these blocks to fill
                device, hidden, state = own, devices.sent(hidden, own), moved(state, own)
            call = to_device(merge([self.calls[i][first + offset] for i in group]), device)
            hidden = replace(call, kwargs=call.kwargs | state).run(block, hidden, self.runner)
        if device and not torch.is_grad_enabled():
            devices.traits(device).mark_step()
        return hidden, state

    def _place_of(self, block: nn.Module) -> torch.device | None:
        """Where a block runs: where it lies, but for one that comes from files or host memory."""
        lies = next((p.device for p in block.parameters() if not p.is_meta), None)
        comes = lies is None or lies.type == devices.HOST.type
        return self.device or lies if comes else lies

    def groups(self, indices: Iterable[int], first: int) -> list[list[int]]:
        """Samples cut into those that can run together."""
        if not self.batched:
            return [[i] for i in indices]
        groups: dict[Any, list[int]] = {}
        for i in indices:
            groups.setdefault(self._shape_of(i, first), []).append(i)
        return list(groups.values())

    def _shape_of(self, i: int, first: int) -> Any:
        if self.hidden[i].shape[0] != 1:
            return i  # several images in one sample: a batch already
        call = self.calls[i][first]
        return (tuple(self.hidden[i].shape), signature(call.args), signature(call.kwargs))

    def check_batching(self, block: nn.Module) -> None:
        """Allow batches if the first pair of equal shape gives together what each gives alone."""
        self.batched = True
        pair = next((group for group in self.groups(range(len(self)), 0) if len(group) > 1), [])[:2]
        self.batched = False
        if not pair or any(self.shared):
            return
        with torch.no_grad():
            alone = torch.cat([self.run_group([block], 0, [i]) for i in pair])
            try:
                together = self.run_group([block], 0, pair)
            # a wrong guess of the batch dimension is a wrong shape somewhere
            except (UnmergeableError, RuntimeError):
                return
        self.batched = (
            alone.shape == together.shape and difference(together, alone) <= TOLERANCE[alone.dtype]
        )


class UnmergeableError(ValueError):
    """Calls of two samples have no common batch dimension."""


def difference(a: Tensor, b: Tensor) -> float:
    """Relative difference |a - b| / |b|, at least in float32."""
    b = b.to(torch.promote_types(b.dtype, torch.float32))
    return ((a.to(b.dtype) - b).norm() / b.norm().clamp(min=1e-12)).item()


def first_tensor(output: Any) -> Tensor:
    """The hidden state of a block's output: itself, or the first element of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, int | str]:
    """The hidden state that a block is called with, and where: the first floating tensor. Raises
    UserError."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for slot, value in named:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value, slot
    raise UserError("a block was called without a hidden state; this family is not supported yet")


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], slot: int | str, hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with another hidden state."""
    if isinstance(slot, int):
        return (*args[:slot], hidden, *args[slot + 1 :]), kwargs
    return args, kwargs | {slot: hidden}


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Apply ``change`` to every tensor in nested tuples, lists and mappings; those are copied."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, MutableMapping):
        copied = copy.copy(value)
        for key, item in value.items():
            copied[key] = map_tensors(item, change)
        return copied
    return value


def moved(value: Any, device: torch.device) -> Any:
    """The value with its tensors on ``device``, however nested."""
    return map_tensors(value, lambda tensor: tensor.to(device))


def as_dtype(value: Any, dtype: torch.dtype) -> Any:
    """The value with its floating-point tensors in ``dtype``, however nested."""
    return map_tensors(
        value, lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor
    )


class Modalities(NamedTuple):
    """Modalities of one sample's tokens: of the text stage (T,), and of the tower (frames,) where
    that is known."""

    text_T: Tensor
    tower_F: Tensor | None = None


def token_modalities(stage: Stage, modalities: Modalities, tokens: int) -> Tensor:
    """Modality (tokens,) of a stage's tokens: the sample's own for that stage, 0 throughout where
    it has none.

    A tower's number of tokens may be the text's by chance, and the text stage may add tokens to the
    sample's.
    """
    own = modalities.text_T if stage.name == "text" else modalities.tower_F
    if own is not None and len(own) == tokens:
        return own.long()
    return torch.zeros(tokens, dtype=torch.long)


def to_device(call: Call, device: torch.device) -> Call:
    """The call with its tensors on ``device``."""
    return replace(call, args=moved(call.args, device), kwargs=moved(call.kwargs, device))


def first_call(chain: Chain, index: int, block: nn.Module) -> tuple[Call, Tensor]:
    """How the block is called on the first sample, in the dtype of its weights, with what earlier
    ones left it."""
    parameter = next(block.parameters())
    call, hidden = chain.calls[0][index], chain.hidden[0].to(parameter.device, parameter.dtype)
    # a copy, for the block to fill
    kwargs = as_dtype({**call.kwargs, **chain.shared[0]}, parameter.dtype)
    return (
        to_device(Call(as_dtype(call.args, parameter.dtype), kwargs, call.slot), parameter.device),
        hidden,
    )


def signature(value: Any) -> Any:
    """Shapes in nested arguments, and the other values themselves where they can be compared."""
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(signature(item) for item in value)
    if isinstance(value, Mapping):
        return tuple((key, signature(item)) for key, item in value.items())
    return value if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__


def merge(calls: Sequence[Call]) -> Call:
    """One call for several samples: tensors are joined along their first dimension of size 1, equal
    ones are shared.

    Raises UnmergeableError where there is no such dimension; `Chain.check_batching` tests that the
    guess is right.
    """
    if len(calls) == 1:
        return calls[0]
    glue = _merge_glue([call.glue for call in calls])
    return Call(
        _merge([c.args for c in calls]), _merge([c.kwargs for c in calls]), calls[0].slot, glue
    )


def _merge_glue(glues: Sequence[Glue | None]) -> Glue | None:
    some = next((glue for glue in glues if glue is not None), None)
    if some is None:
        return None
    shifted = []
    for i, glue in enumerate(glues):
        if glue is None:
            continue
        if glue.rows is None:
            raise UnmergeableError("hidden states that change their shape between blocks")
        shifted.append((glue.rows + i * some.tokens, glue.values))
    rows, values = zip(*shifted)
    return Glue(torch.cat(rows), torch.cat(values), some.tokens * len(glues))


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
