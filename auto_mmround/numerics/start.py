"""The closed-form start: second moments of a block's inputs, a scale search, a GPTQ solve, offsets
that say it."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from auto_mmround.numerics import gptq, grids, scale_search, super_grids
from auto_mmround.numerics.moments import Moments
from auto_mmround.numerics.rounding import Rounding


@dataclass(frozen=True)
class StartConfig:
    """dampening: share of the mean of diag(H) added to it. order, block: of the columns, see
    `gptq.solve`.

    refit: fit the scales to the solved integers at the end. margin: how far the start stays from
    the rounding edge, in steps of the grid; sign steps can flip what is close to it. retarget:
    solve for the teacher's outputs, see `gptq.retarget`; the moments must have been taken with
    teacher inputs.
    """

    dampening: float = 0.05
    order: gptq.Order = "weight"
    block: int = 64
    refit: bool = True
    margin: float = 0.1
    retarget: bool = False


class Collector:
    """Second moments of the inputs of some layers, added up while hooks see forward passes.

    Layers that are fed the same tensor (q, k, v; gate, up) share one `Moments`. Call `next_pass`
    before each pass.
    cross: each pass comes after one over the same samples with the teacher's inputs
      (``next_pass(teacher=True)``).
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
        """Add the input (..., in) of a layer, with the tokens' weights if they are as many as its
        tokens."""
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
    """A `Collector` that watches the layers while open. weights: of a layer's tokens in the current
    pass, pads 0; the same for layers that share an input."""
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
    """Layers in the order in which they run, those together that share an input (q, k, v; gate,
    up).

    Experts, which run one by one on different tokens, come as those of one name.
    """
    turns: dict[str, list[str]] = {}
    of_input: dict[int, str] = {}
    for name, found in moments.items():
        block = next(block for block in blocks if name.startswith(f"{block}."))
        title = block + re.sub(r"\.\d+(?=\.)", ".*", name.removeprefix(block))
        turns.setdefault(of_input.setdefault(id(found), title), []).append(name)
    return list(turns.values())


def closed_form(roundings: Sequence[Rounding], moments: Moments, config: StartConfig) -> None:
    """Put weights of one grid that read the same input at the GPTQ solution under searched scales.

    They are stacked along their outputs, which are independent, so one factorization serves all. In
    float32, whatever the caller computes blocks in.
    """
    with torch.autocast(roundings[0].w_OGg.device.type, enabled=False):
        _closed_form(roundings, moments, config)


def _closed_form(roundings: Sequence[Rounding], moments: Moments, config: StartConfig) -> None:
    hessian_II, grid = moments.hessian(), roundings[0].grid
    w_OGg = torch.cat([rounding.w_OGg for rounding in roundings])
    group_size, columns = w_OGg.shape[-1], roundings[0].columns
    w_OI = grids.from_groups(w_OGg, columns).float()
    if config.retarget:
        w_OI = gptq.retarget(w_OI, hessian_II, moments.cross(), config.dampening)
    target_OGg = grids.to_groups(w_OI, group_size)
    importance_Gg = grids.to_groups(hessian_II.diagonal()[None], group_size)[0]
    blocks: super_grids.Super | None = None
    if grid.scale_range is None:
        scale_OG, zero_OG = scale_search.search_scale(target_OGg, importance_Gg, grid)
    else:
        blocks = super_grids.search(target_OGg, importance_Gg, grid)
        scale_OG, zero_OG = blocks.scale_OG, super_grids.zeros(blocks, grid)
        w_OGg, target_OGg = (
            x_OGg.float() + blocks.min_OG[..., None] for x_OGg in (w_OGg, target_OGg)
        )
        w_OI = grids.from_groups(target_OGg, columns)  # on the grid that is left, see `super_grids`
    q_OI = gptq.solve(
        w_OI, hessian_II, scale_OG, zero_OG, group_size, grid,
        dampening=config.dampening, order=config.order, block=config.block,
    )  # fmt: skip
    if config.refit:
        unit_OG = blocks.unit_OG if blocks else None
        scale_OG = gptq.refit_scale(
            w_OI, q_OI, hessian_II, scale_OG, zero_OG, group_size, grid, unit_OG
        )
    q_OGg = grids.to_groups(q_OI, group_size)
    offset_OGg = gptq.place_start(w_OGg, q_OGg, scale_OG, zero_OG, grid, config.margin)
    rows = [len(rounding.w_OGg) for rounding in roundings]
    found = (scale_OG, zero_OG, offset_OGg, *(blocks or ()))
    for rounding, *parts in zip(roundings, *(part.split(rows) for part in found), strict=True):
        scale, zero, offset, *own = (part.clone() for part in parts)
        rounding.start_at(scale, zero, offset, super_grids.Super(*own) if own else None)


def closed_forms(
    roundings: Mapping[str, Rounding], moments: Mapping[str, Moments], config: StartConfig
) -> None:
    """`closed_form` for the layers of a block; one that no token reached has inputs that all count
    alike."""
    stacks: dict[tuple[int, grids.Grid, int], list[Rounding]] = {}
    plain = replace(config, retarget=False)
    found: dict[int, Moments] = {}
    for name, rounding in roundings.items():
        own = moments.get(name)
        if own is None:
            own = Moments(rounding.columns, device=rounding.w_OGg.device)
            own.add(torch.eye(rounding.columns, device=rounding.w_OGg.device))
        found[id(own)] = own
        stacks.setdefault((id(own), rounding.grid, rounding.w_OGg.shape[-1]), []).append(rounding)
    for (identity, *_), stack in stacks.items():
        closed_form(stack, found[identity], config if found[identity].crossed else plain)
