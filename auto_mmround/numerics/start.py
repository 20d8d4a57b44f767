"""The closed-form start: second moments of a block's inputs, a scale search, a GPTQ solve, and
offsets that give the solved integers."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from auto_mmround.numerics import descent, gptq, grids, scale_search, super_grids, sweeps
from auto_mmround.numerics.moments import Hessian, Moments
from auto_mmround.numerics.rounding import Rounding

MOST = 2**26  # elements of weights under one H that are worked on at a time


@dataclass(frozen=True)
class StartConfig:
    """dampening, order, block: see `gptq.Solving`.

    refit: fit the scales to the solved integers at the end. again: number of further rounds, see
    `descent`. margin: distance of the start from the rounding edge, in steps of the grid; sign
    steps can flip integers close to the edge. retarget: solve for the teacher's outputs, see
    `gptq.retarget`; this needs moments with teacher inputs.
    """

    dampening: float = 0.05
    order: gptq.Order = "weight"
    block: int = 64
    refit: bool = True
    again: int = 4
    margin: float = 0.1
    retarget: bool = False


class Collector:
    """Adds up second moments of the inputs of some layers, in hooks on forward passes.

    Layers that read the same tensor (q, k, v; gate, up) share one `Moments`. Call `next_pass`
    before each pass. cross: before each pass comes one over the same samples with the teacher's
    inputs (``next_pass(teacher=True)``).
    """

    def __init__(self, weights: Callable[[str], Tensor | None], cross: bool = False):
        self._weights, self._cross = weights, cross
        self._listening = False
        self._teacher: dict[str, Tensor] = {}
        self._moments: dict[str, Moments] = {}
        self._owner: dict[str, str] = {}
        # this pass's inputs, kept alive so that no id comes twice
        self._seen: dict[int, tuple[Tensor, str]] = {}

    def next_pass(self, teacher: bool = False) -> None:
        """Forget the tensors of the last pass."""
        self._seen.clear()
        self._listening = teacher

    def moments(self) -> dict[str, Moments]:
        """Layer name -> moments, for every layer that was run."""
        return {name: self._moments[owner] for name, owner in self._owner.items()}

    def see(self, name: str, x: Tensor) -> None:
        """Add the input (..., in) of a layer. Weights of tokens are used if there is one for each
        token."""
        if self._listening:
            self._teacher[name] = x.detach()
            return
        teacher = self._teacher.pop(name, None)
        if not x.numel():  # an expert that none of these tokens chose
            return
        if self._cross and (teacher is None or teacher.shape != x.shape):
            return  # an expert that the teacher chose for other tokens
        if name not in self._owner:
            self._owner[name] = self._seen.setdefault(id(x), (x, name))[1]
        if self._owner[name] == name:
            weight = self._weights(name)
            whole = weight is not None and weight.numel() == x.shape[:-1].numel()
            moments = self._moments.setdefault(
                name, Moments(x.shape[-1], cross=self._cross, device=x.device)
            )
            moments.add(
                x.detach(), weight.to(x.device) if weight is not None and whole else None, teacher
            )


@contextmanager
def collecting(
    layers: Mapping[str, nn.Module], weights: Callable[[str], Tensor | None], cross: bool = False
) -> Iterator[Collector]:
    """A `Collector` that watches the layers while open. weights: layer -> weights of its tokens in
    the current pass, 0 for padding; layers that share an input must have the same."""
    collector = Collector(weights, cross)

    def hook_for(name: str) -> Callable[..., None]:
        return lambda layer, args: collector.see(name, args[0])

    handles = [layer.register_forward_pre_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        yield collector
    finally:
        for handle in handles:
            handle.remove()


def in_turn(moments: Mapping[str, Moments], blocks: Sequence[str]) -> list[list[str]]:
    """Groups of layers in the order in which they run. Layers that share an input (q, k, v; gate,
    up) are one group. So are all experts' matrices of one name, which run on different tokens.
    """
    turns: dict[str, list[str]] = {}
    of_input: dict[int, str] = {}
    for name, own in moments.items():
        block = next(block for block in blocks if name.startswith(f"{block}."))
        title = block + re.sub(r"\.\d+(?=\.)", ".*", name.removeprefix(block))
        turns.setdefault(of_input.setdefault(id(own), title), []).append(name)
    return list(turns.values())


def closed_form(roundings: Sequence[Rounding], moments: Moments, config: StartConfig) -> None:
    """Put weights of one grid that read the same input at the GPTQ solution under searched scales.

    They are stacked along their outputs. Outputs are independent, so one factorization serves all.
    The work is in float32, in whatever dtype the caller computes blocks.
    """
    _place([_Stack(list(roundings), moments)], config)


def closed_forms(
    roundings: Mapping[str, Rounding], moments: Mapping[str, Moments], config: StartConfig
) -> None:
    """`closed_form` for the layers of a block. For layers that no token reached see `_for_all`.

    Accelerators solve by `sweeps`, stacks of one shape (experts) together. The host asks once which
    of them must be solved in turn all the same.
    """
    stacks: dict[tuple[Any, ...], _Stack] = {}
    waiting: list[_Stack] = []
    for name, own in _for_all(roundings, moments).items():
        rounding = roundings[name]
        # rows that share a scale stay together
        alone = name if len(rounding.w_OGg) % rounding.grid.rows else ""
        key = id(own), rounding.grid, rounding.w_OGg.shape[-1], alone
        stack = stacks.setdefault(key, _Stack([], own))
        if stack.roundings and sum(r.w_OGg.numel() for r in stack.roundings) > MOST:
            waiting.append(stack)
            stack = stacks[key] = _Stack([], own)
        stack.roundings.append(rounding)
    waiting += stacks.values()
    batches = _batches([stack for stack in waiting if stack.sweepable(config)])
    doubts = [_place(batch, config, in_sweeps=True).to(batches[0][0].device) for batch in batches]
    bad = torch.cat(doubts).tolist() if doubts else []
    swept = [stack for batch in batches for stack in batch]
    good = {id(stack) for stack, doubted in zip(swept, bad, strict=True) if not doubted}
    for stack in waiting:
        if id(stack) not in good:
            _place([stack], config)


def _for_all(
    roundings: Mapping[str, Rounding], moments: Mapping[str, Moments]
) -> dict[str, Moments]:
    """Moments for every layer; equal ones are one object. An expert that no token reached gets the
    moments of all tokens that reached the other experts, for the matrices that read tokens
    directly. For other layers without tokens all inputs count alike."""
    first: dict[tuple[str, str], Moments] = {}  # (list of experts, number) -> of what it reads
    reached: dict[tuple[str, str], list[Moments]] = {}  # (list of experts, matrix)
    for name, own in moments.items():  # in the order in which layers run
        if (where := _expert(name)) is not None:
            experts, number, matrix = where
            if first.setdefault((experts, number), own) is own:
                reached.setdefault((experts, matrix), []).append(own)
    made: dict[Any, Moments] = {}
    whole = {}
    for name, rounding in roundings.items():
        experts, _, matrix = _expert(name) or (name, "", "")
        others = reached.get((experts, matrix), [])
        key = tuple(map(id, others)) or rounding.columns
        if name not in moments and key not in made:
            made[key] = Moments.pooled(others) if others else _alike(rounding)
        whole[name] = moments[name] if name in moments else made[key]
    return whole


def _alike(rounding: Rounding) -> Moments:
    device = rounding.w_OGg.device
    moments = Moments(rounding.columns, device=device)
    moments.add(torch.eye(rounding.columns, device=device))
    return moments


def is_expert(name: str) -> bool:
    """Whether a layer is in a numbered list inside a numbered block."""
    return _expert(name) is not None


def _expert(name: str) -> tuple[str, str, str] | None:
    """(list of experts, number in it, name of the matrix) of a layer in a numbered list inside a
    numbered block; None for other layers."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    if len(numbers) < 2:
        return None
    at = numbers[-1]
    return ".".join(parts[:at]), parts[at], ".".join(parts[at + 1 :])


class _Stack(NamedTuple):
    """Weights of one grid that read the same input."""

    roundings: list[Rounding]
    moments: Moments

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.roundings[0].w_OGg.device

    def sweepable(self, config: StartConfig) -> bool:
        """Whether rounding by `sweeps` is quicker."""
        return self.device.type != "cpu" and not (config.retarget and self.moments.crossed)


def _batches(stacks: Sequence[_Stack]) -> list[list[_Stack]]:
    """Stacks of one shape together, with at most `sweeps.MOST` elements. Super-blocks stay apart,
    because they are searched under one diagonal. So do rows that share a scale."""
    batches: list[list[_Stack]] = []
    open_: dict[tuple[Any, ...], list[_Stack]] = {}
    for stack in stacks:
        first = stack.roundings[0]
        shape = sum(len(rounding.w_OGg) for rounding in stack.roundings), *first.w_OGg.shape[1:]
        key = shape, first.columns, first.grid, stack.device
        batch = open_.get(key)
        size = math.prod(shape)
        apart = first.grid.scale_range or shape[0] % first.grid.rows
        if batch is None or apart or (len(batch) + 1) * size > sweeps.MOST:
            batch = open_[key] = []
            batches.append(batch)
        batch.append(stack)
    return batches


def _place(stacks: Sequence[_Stack], config: StartConfig, in_sweeps: bool = False) -> Tensor:
    """Put stacks of one shape at their start; only one stack, unless ``in_sweeps``. Returns bool
    (N,): True for stacks that must be solved in turn, see `sweeps.Sweeping.doubtful`."""
    with torch.autocast(stacks[0].device.type, enabled=False):
        solved, doubtful_N = _solved(stacks, config, in_sweeps)
        roundings = [rounding for stack in stacks for rounding in stack.roundings]
        rows = [len(rounding.w_OGg) for rounding in roundings]
        blocks = solved.blocks or ()
        split = [
            part.split(rows) for part in (solved.scale_OG, solved.zero_OG, solved.q_OGg, *blocks)
        ]
        for rounding, scale, zero, q, *own in zip(roundings, *split, strict=True):
            super_ = super_grids.Super(*(part.clone() for part in own)) if own else None
            rounding.start_from(scale.clone(), zero.clone(), q, super_, config.margin)
        return doubtful_N


class _Start(NamedTuple):
    """Scales, zero points (out, G), codes uint8 (out, G, g), super-blocks."""

    scale_OG: Tensor
    zero_OG: Tensor
    q_OGg: Tensor
    blocks: super_grids.Super | None

    @classmethod
    def joined(cls, parts: Sequence["_Start"]) -> "_Start":
        """Of all rows."""
        if len(parts) == 1:
            return parts[0]
        scales, zeros, codes, blocks = zip(*parts, strict=True)
        many = [torch.cat(part) for part in zip(*blocks, strict=True)] if blocks[0] else []
        super_ = super_grids.Super(*many) if many else None
        return cls(torch.cat(scales), torch.cat(zeros), torch.cat(codes), super_)


def _solved(
    stacks: Sequence[_Stack], config: StartConfig, in_sweeps: bool
) -> tuple[_Start, Tensor]:
    """The start of the stacks, a part of the rows at a time: float32 copies of a wide weight take
    more than the weight itself."""
    first, count = stacks[0].roundings[0], len(stacks)
    grid, columns, group_size = first.grid, first.columns, first.w_OGg.shape[-1]
    weights = [rounding.w_OGg for stack in stacks for rounding in stack.roundings]
    w_OGg = torch.cat(weights) if len(weights) > 1 else weights[0]
    moments = [stack.moments for stack in stacks]
    if config.retarget and moments[0].crossed:
        w_OI, both = grids.from_groups(w_OGg, columns), (moments[0].hessian(), moments[0].cross())
        w_OI = gptq.retarget(w_OI, *both, config.dampening)
        w_OGg = grids.to_groups(w_OI, group_size)
    diagonals = (grids.to_groups(m.diagonal()[None], group_size)[0] for m in moments)
    importance = torch.stack(list(diagonals))
    importance = (
        importance[0] if count == 1 else importance.repeat_interleave(len(w_OGg) // count, 0)
    )
    under = _Under.of(moments, group_size, grid, config, in_sweeps)
    parts = []
    rows = _together(len(w_OGg), columns, sweeps.MOST if in_sweeps else MOST, count, grid.rows)
    for part_OGg in w_OGg.split(rows):
        scale_OG, zero_OG, blocks = _searched(part_OGg, importance, grid)
        if blocks:  # on the grid that is left, see `super_grids`
            part_OGg = part_OGg.float() + blocks.min_OG[..., None]
        w_OI, unit_OG = grids.from_groups(part_OGg, columns).float(), blocks and blocks.unit_OG
        q_OI = under.solve(w_OI, scale_OG=scale_OG, zero_OG=zero_OG)
        for again in range(1 + config.again if config.refit else 0):
            if again:
                q_OI, scale_OG = under.descend(w_OI, q_OI, scale_OG, zero_OG, unit_OG)
            if not again or not under.descend.fits:
                scale_OG = under.refit(w_OI, q_OI, scale_OG, zero_OG, unit_OG)
        q_OGg = grids.to_groups(grid.packed(q_OI), group_size)
        parts.append(_Start(scale_OG, zero_OG, q_OGg, blocks))
    doubtful_N = under.sweeping.doubtful() if under.sweeping else torch.zeros(count)
    return _Start.joined(parts), doubtful_N


def _together(rows: int, columns: int, most: int, least: int, step: int) -> int:
    """How many of so many rows to solve at a time, a multiple of ``step``: parts are alike, since a
    small one starts as many kernels, and up to an eighth over ``most`` elements."""
    parts = -(-rows * columns // (most + most // 8))
    each = max(least, -(-rows // parts))
    return each + -each % step


class _Under(NamedTuple):
    """Second moments of one weight, or of N of one shape, and the functions that solve under
    them."""

    hessian: Hessian
    group_size: int
    grid: grids.Points
    solve: Callable[..., Tensor]
    descend: descent.Descent
    sweeping: sweeps.Sweeping | None

    @classmethod
    def of(
        cls,
        moments: Sequence[Moments],
        group_size: int,
        grid: grids.Points,
        config: StartConfig,
        in_sweeps: bool,
    ) -> "_Under":
        """Column by column without H whole, or by `sweeps`."""
        how = gptq.Solving(config.dampening, config.order, config.block)
        if in_sweeps:
            each = [own.hessian() for own in moments]
            hessian_NII = torch.stack(each) if len(each) > 1 else each[0][None]
            made = sweeps.Sweeping(hessian_NII, group_size, grid, how)
            descend = descent.Descent(
                hessian_NII, group_size, grid, how, sweeps.BLOCK, made.rounded
            )
            return cls(hessian_NII, group_size, grid, made, descend, made)
        in_turn = partial(descent.in_turn, grid=grid, block=config.block)
        descend = descent.Descent(moments[0], group_size, grid, how, descent.WIDTH, in_turn)
        solver = gptq.Solver(moments[0], group_size, grid, how)
        return cls(moments[0], group_size, grid, solver, descend, None)

    def refit(
        self, w_OI: Tensor, q_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, unit_OG: Tensor | None
    ) -> Tensor:
        """`gptq.refit_scale` of all rows."""
        count = len(self.hessian) if isinstance(self.hessian, Tensor) else 1
        w_OI, q_OI, scale_OG, zero_OG = _apart(count, w_OI, q_OI, scale_OG, zero_OG)
        return gptq.refit_scale(
            w_OI, q_OI, self.hessian, scale_OG, zero_OG, self.group_size, self.grid, unit_OG
        ).flatten(0, -2)


def _searched(
    w_OGg: Tensor, importance: Tensor, grid: grids.Points
) -> tuple[Tensor, Tensor, super_grids.Super | None]:
    if not isinstance(grid, grids.Grid) or not grid.scale_range:
        return *scale_search.search_scale(w_OGg, importance, grid), None
    blocks = super_grids.search(w_OGg, importance, grid)
    return blocks.scale_OG, super_grids.zeros(blocks, grid), blocks


def _apart(count: int, *tensors: Tensor) -> list[Tensor]:
    """Rows of several weights of one shape with a dimension for the weights."""
    return [x.unflatten(0, (count, -1)) if count > 1 else x for x in tensors]
