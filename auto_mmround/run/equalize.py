"""Equalize before quantizing: one pass over the calibration samples, block by block, that leaves
the function as it is.

Norms and linear layers that stay in 16 bits change with the quantized ones. The checkpoint gets
them as they are then in memory.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from auto_mmround.errors import UserError
from auto_mmround.modalities import PAD
from auto_mmround.model.chains import (
    TOLERANCE,
    Chain,
    Modalities,
    difference,
    first_call,
    token_modalities,
)
from auto_mmround.model.pairs import Found, Pair, linear_pairs, norm_pairs, rescale, shape_signature
from auto_mmround.model.structure import linears, shared_parameters
from auto_mmround.numerics import equalize as numerics
from auto_mmround.numerics.moments import Moments
from auto_mmround.recipe.patterns import matches
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.out_of_memory import FEWER, phase
from auto_mmround.run.plan import Plan, grid_of
from auto_mmround.run.rotate import rotate
from auto_mmround.run.session import Session, Told, Window

log = logging.getLogger("auto_mmround")

WHAT, HELPS = "equalizing", f"leave --equalize out, or {FEWER}"


@dataclass(frozen=True)
class Equalized:
    """A pair that was rescaled. ratio, before, after: of the AWQ search, see
    `numerics.equalize.Searched`."""

    source: str
    readers: tuple[str, ...]
    ratio: float | None = None
    before: float | None = None
    after: float | None = None


def equalize(session: Session, told: Told = lambda done, total: None) -> list[Equalized]:
    """Rescale the pairs of all planned blocks in place, by the recipe's `equalize`, or turn the
    hidden states; returns what was done.

    Raises UserError as `rotate` does, for mappings that name no pair of the model, and where a
    block's output does not stay.
    """
    method, done = session.recipe.equalize, list[Equalized]()
    if method == "hadamard":
        norms = rotate(session, told).norms
        return [Equalized(norm, gain.readers) for norm, gain in norms.items()]
    shared, links = shared_parameters(session.model), dict[Any, tuple[Pair, ...]]()

    def visit(chain: Chain, window: Window) -> Chain:
        (name,), index, (block,) = window
        what, pairs = f"{WHAT} of {name}", list[Pair]()
        if session.plan.of_block(name):
            with session.exactly():
                all_pairs = _pairs(session, chain, window, links)
            pairs = [
                p for p in all_pairs if _free(p, block, shared) and _planned(p, name, session.plan)
            ]
        watched = partial(_watched_pass, session, chain, window, pairs)
        after, statistics = session.fitting(what, watched, [chain], HELPS)
        if pairs:
            with phase(what, HELPS), session.exactly(), torch.no_grad(), ExitStack() as undo:
                for parameter in {
                    id(p): p for pair in pairs for p in _parameters(pair, block)
                }.values():
                    undo.callback(parameter.copy_, parameter.clone())
                call, hidden = first_call(chain, index, block)
                expected = call.run(block, hidden)
                call, hidden = first_call(chain, index, block)
                fresh = [
                    _apply(block, name, p, statistics[p.source], session.plan, session.recipe)
                    for p in pairs
                ]
                _check_unchanged(name, call.run(block, hidden), expected)
                undo.pop_all()
            done.extend(change for change in fresh if change)
            log.info(
                "%s: %s rescales %d of %d pairs", name, method, sum(map(bool, fresh)), len(pairs)
            )
        return after

    for chain in session.record(session.plan.stages, told, WHAT, HELPS).values():
        session.push(chain, visit)
    if not done:
        log.warning("equalize = %s found no pair to rescale", method)
    return done


def _pairs(
    session: Session, chain: Chain, window: Window, links: dict[Any, tuple[Pair, ...]]
) -> list[Pair]:
    """The pairs of a block that the recipe is for. links: pairs of linear layers, which blocks of
    one shape share."""
    (name,), index, (block,) = window
    first = block, *first_call(chain, index, block)
    seen, shape = norm_pairs(*first), shape_signature(block)
    if session.recipe.equalize == "awq" and shape not in links:
        links[shape] = linear_pairs(*first)
    return _chosen(
        replace(seen, pairs=seen.pairs + links.get(shape, ())), session.recipe, name, block
    )


@dataclass
class _Statistics:
    """What a pair's readers take, by modality: largest magnitude (C,), and second moments if asked
    for."""

    with_moments: bool
    largest: dict[int, Tensor] = field(default_factory=dict)
    moments: dict[int, Moments] = field(default_factory=dict)

    def add(self, x: Tensor, modality_T: Tensor) -> None:
        """x: (..., C). modality_T: of its tokens. Where their number differs all count as one
        modality."""
        x_TC = x.detach().reshape(-1, x.shape[-1])
        # On the host: a device does not know beforehand how many of a modality there are.
        modality_T = modality_T.cpu() if len(modality_T) == len(x_TC) else torch.zeros(len(x_TC))
        for modality in modality_T.unique().tolist():
            if modality == PAD:
                continue
            part_TC = x_TC[(modality_T == modality).nonzero()[:, 0].to(x.device)]
            largest_C = part_TC.abs().amax(0).float()
            self.largest[modality] = torch.maximum(self.largest.get(modality, largest_C), largest_C)
            if self.with_moments:
                moments = Moments(x.shape[-1], device=x.device)
                self.moments.setdefault(modality, moments).add(part_TC)


def _watched_pass(
    session: Session, chain: Chain, window: Window, pairs: Sequence[Pair], batch_size: int
) -> tuple[Chain, dict[str, _Statistics]]:
    """Push all samples through the block; the chain behind it, and what the pairs' readers were
    given."""
    statistics = {pair.source: _Statistics(session.recipe.equalize == "awq") for pair in pairs}
    own = [_modality_T(chain, i, session.modalities) for i in range(len(chain))]
    current = [torch.empty(0)]

    def before(group: list[int]) -> None:
        current[0] = torch.cat([own[i] for i in group])

    def hook_for(pair: Pair) -> Callable[..., None]:
        return lambda layer, args: statistics[pair.source].add(args[0], current[0])

    with ExitStack() as stack:
        for pair in pairs:
            handle = (
                window.blocks[0]
                .get_submodule(pair.readers[0])
                .register_forward_pre_hook(hook_for(pair))
            )
            stack.callback(handle.remove)
        return chain.advanced(window.blocks, window.first, batch_size, before=before), statistics


def _modality_T(chain: Chain, i: int, modalities: Sequence[Modalities]) -> Tensor:
    own = Modalities(modalities[chain.sample[i]].text_T)
    return token_modalities(chain.stage, own, chain.hidden[i].shape[:-1].numel())


def _apply(
    block: nn.Module, name: str, pair: Pair, statistics: _Statistics, plan: Plan, recipe: Recipe
) -> Equalized | None:
    """Rescale one pair. None if no token reached it, or the search found nothing better than
    leaving it."""
    quantized = [(reader, plan.quantized.get(f"{name}.{reader}")) for reader in pair.readers]
    layers = [(block.get_submodule(reader), scheme) for reader, scheme in quantized if scheme]
    weights = [_rows(layer) for layer, _ in layers]
    change = Equalized(
        f"{name}.{pair.source}", tuple(f"{name}.{reader}" for reader in pair.readers)
    )
    if not statistics.largest:
        return None
    if recipe.equalize == "smoothquant":
        act_KC = torch.stack(list(statistics.largest.values()))
        scale_C = numerics.smoothquant(act_KC, weights, recipe.smoothing_strength)
    else:
        hessians = [moments.hessian() for moments in statistics.moments.values()]
        sizes = [scheme.group_size for _, scheme in layers]
        rounding = [
            numerics.quantizer(grid_of(s, w_OI.abs().max()), s.group_size, recipe.closed_form)
            for (_, s), w_OI in zip(layers, weights, strict=True)
        ]
        scaled = numerics.awq(weights, hessians, rounding, sizes, duo=recipe.duo_scaling)
        if scaled.ratio is None:
            return None
        scale_C = scaled.scale_C
        change = replace(change, ratio=scaled.ratio, before=scaled.before, after=scaled.after)
    rescale(block, pair, scale_C)
    return change


def _rows(layer: Any) -> Tensor:
    return layer.weight.data.t() if isinstance(layer, Conv1D) else layer.weight.data


def _check_unchanged(name: str, output: Tensor, expected: Tensor) -> None:
    """Rescaling may round, no more."""
    gap = difference(output, expected)
    if not gap <= TOLERANCE[expected.dtype]:
        raise UserError(
            f"{name}: equalizing changes the block's output by {gap:.1%}; leave `equalize` off"
        )


def _chosen(seen: Found, recipe: Recipe, name: str, block: nn.Module) -> list[Pair]:
    """All pairs found, or those that the recipe's mappings name."""
    if recipe.mappings is None:
        return list(seen.pairs)
    modules = [part for part, _ in block.named_modules() if part]
    layers = [part for part, _ in linears(block)]
    pairs = {pair.source: pair for pair in seen.pairs}
    chosen: dict[str, Pair] = {}
    for patterns, source_pattern in recipe.mappings:
        sources = [part for part in modules if matches(source_pattern, f"{name}.{part}")]
        readers = {
            part
            for part in layers
            if any(matches(pattern, f"{name}.{part}") for pattern in patterns)
        }
        fitting = [pairs[s] for s in sources if s in pairs and readers & set(pairs[s].readers)]
        if sources and readers and not fitting:
            source = next((s for s in sources if s in seen.refused), sources[0])
            reason = seen.refused.get(source, f"no scale passes from there to {sorted(readers)[0]}")
            raise UserError(f"mappings: {name}.{source} can't be rescaled: {reason}")
        for pair in fitting:
            left = [reader for reader in pair.readers if reader not in readers]
            if left:
                raise UserError(
                    f"mappings: {name}.{pair.source} is also read by {left[0]}; name it in the"
                    " mapping too"
                )
            chosen[pair.source] = pair
    return list(chosen.values())


def _planned(pair: Pair, name: str, plan: Plan) -> bool:
    return any(f"{name}.{reader}" in plan.quantized for reader in pair.readers)


def _free(pair: Pair, block: nn.Module, shared: set[int]) -> bool:
    """Whether no weight of the pair is also used elsewhere."""
    return not any(id(p) in shared for p in _parameters(pair, block))


def _parameters(pair: Pair, block: nn.Module) -> Iterator[nn.Parameter]:
    for part in (pair.source, *pair.readers):
        yield from block.get_submodule(part).parameters()
