"""Equalize before quantizing: one pass over the calibration samples, block by block, that leaves the function as it is.

Norms and linear layers that stay in 16 bits change with the quantized ones; what changed in memory is what the
checkpoint gets.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auto_mmround.calibration.inputs import PAD, ModelInput
from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.capture import capture
from auto_mmround.model.chains import TOLERANCE, Call, Chain, as_dtype, difference, to_device, token_kinds
from auto_mmround.model.pairs import Found, Pair, linear_pairs, norm_pairs, rescale, shape_signature
from auto_mmround.model.streaming import device_of
from auto_mmround.model.structure import linears
from auto_mmround.numerics import equalize as numerics
from auto_mmround.numerics.gram import Moments
from auto_mmround.recipe.patterns import matches
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.memory import FEWER, BatchSize, Places, moved_away, phase
from auto_mmround.run.plan import Plan, grid_of
from auto_mmround.run.weights import kinds_of

log = logging.getLogger("auto_mmround")

WHAT, HELPS = "equalizing", f"leave --equalize out, or {FEWER}"


@dataclass(frozen=True)
class Equalized:
    """A pair that was rescaled. ratio, before, after: of the AWQ search, see `numerics.equalize.Searched`."""

    source: str
    readers: tuple[str, ...]
    ratio: float | None = None
    before: float | None = None
    after: float | None = None


def equalize(
    model: PreTrainedModel,
    recipe: Recipe,
    plan: Plan,
    inputs: Sequence[ModelInput],
    captured: Callable[[int, int], None] = lambda done, total: None,
    disk: Callable[[Tensor], Tensor] = Tensor.cpu,
) -> list[Equalized]:
    """Rescale the pairs of all planned blocks in place, by the recipe's `equalize`; returns what was done.

    inputs: calibration samples. disk: puts hidden states into files. Raises UserError for mappings that name no pair of
    the model, and where a block's output does not stay.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    batches = [as_dtype(sample.kwargs, dtype) for sample in inputs]
    done: list[Equalized] = []

    device = device_of(model)

    def precision() -> AbstractContextManager:
        return devices.autocast(device, dtype, recipe.amp)

    run = partial(
        capture, model, plan.stages, batches, precision=precision, on_sample=lambda i: captured(i + 1, len(batches))
    )
    chains, batch = Places.of(recipe, device, disk).fitting(WHAT, run, HELPS), BatchSize(recipe.batch)
    shared = _shared_parameters(model)
    links: dict[Any, tuple[Pair, ...]] = {}  # found once for blocks of one kind
    for chain in chains.values():
        for index, name in enumerate(chain.stage.blocks):
            block = model.get_submodule(name)
            pairs: list[Pair] = []
            if plan.of_block(name):
                first = block, *_first_call(chain, index, block)
                found, kind = norm_pairs(*first), shape_signature(block)
                if recipe.equalize == "awq" and kind not in links:
                    links[kind] = linear_pairs(*first)
                found = replace(found, pairs=found.pairs + links.get(kind, ()))
                pairs = _chosen(found, recipe, name, block)
                pairs = [p for p in pairs if _free(p, block, shared) and _planned(p, name, plan)]
            watched = partial(_watched_pass, chain, index, block, pairs, recipe.equalize == "awq", inputs)
            with precision():
                after, statistics = batch.fitting(
                    f"{WHAT} of {name}", watched, partial(moved_away, [chain], disk), HELPS
                )
            if pairs:
                with phase(f"{WHAT} of {name}", HELPS), torch.no_grad(), ExitStack() as undo:
                    for parameter in {id(p): p for pair in pairs for p in _parameters(pair, block)}.values():
                        undo.callback(parameter.copy_, parameter.clone())
                    call, hidden = _first_call(chain, index, block)
                    expected = call.run(block, hidden)
                    fresh = [_apply(block, name, pair, statistics[pair.source], plan, recipe) for pair in pairs]
                    _check_unchanged(name, call.run(block, hidden), expected)
                    undo.pop_all()
                done += [change for change in fresh if change]
                log.info("%s: %s rescales %d of %d pairs", name, recipe.equalize, sum(map(bool, fresh)), len(pairs))
            chain = after
    if not done:
        log.warning("equalize = %s found no pair to rescale", recipe.equalize)
    return done


def _first_call(chain: Chain, index: int, block: nn.Module) -> tuple[Call, Tensor]:
    """How the block is called on the first sample, in the dtype of its weights: comparing goes without autocast."""
    parameter = next(block.parameters())
    call, hidden = chain.calls[0][index], chain.hidden[0].to(parameter.device, parameter.dtype)
    call = Call(as_dtype(call.args, parameter.dtype), as_dtype(call.kwargs, parameter.dtype), call.slot)
    return to_device(call, parameter.device), hidden


@dataclass
class _Statistics:
    """What a pair's readers take, by modality: largest magnitude (C,), and second moments if asked for."""

    with_moments: bool
    largest: dict[int, Tensor] = field(default_factory=dict)
    moments: dict[int, Moments] = field(default_factory=dict)

    def add(self, x: Tensor, kind_T: Tensor) -> None:
        """x: (..., C). kind_T: modality of its tokens; where their number differs all count as one kind."""
        x_TC = x.detach().reshape(-1, x.shape[-1])
        kind_T = kind_T.to(x.device) if len(kind_T) == len(x_TC) else torch.zeros(len(x_TC), device=x.device)
        for kind in kind_T.unique().tolist():
            if kind == PAD:
                continue
            part_TC = x_TC[kind_T == kind]
            largest_C = part_TC.abs().amax(0).float()
            self.largest[kind] = torch.maximum(self.largest.get(kind, largest_C), largest_C)
            if self.with_moments:
                self.moments.setdefault(kind, Moments(x.shape[-1], device=x.device)).add(part_TC)


def _watched_pass(
    chain: Chain,
    index: int,
    block: nn.Module,
    pairs: Sequence[Pair],
    with_moments: bool,
    inputs: Sequence[ModelInput],
    batch_size: int,
) -> tuple[Chain, dict[str, _Statistics]]:
    """Push all samples through the block; the chain behind it, and what the pairs' readers were given."""
    statistics = {pair.source: _Statistics(with_moments) for pair in pairs}
    kinds = [_kinds(chain, i, inputs) for i in range(len(chain))]
    hidden, current = list(chain.hidden), [torch.empty(0)]

    def hook_for(pair: Pair) -> Callable[..., None]:
        return lambda layer, args: statistics[pair.source].add(args[0], current[0])

    with ExitStack() as stack, torch.no_grad():
        for pair in pairs:
            handle = block.get_submodule(pair.readers[0]).register_forward_pre_hook(hook_for(pair))
            stack.callback(handle.remove)
        for at in range(0, len(chain), batch_size):
            for group in chain.groups(range(at, min(at + batch_size, len(chain))), index):
                current[0] = torch.cat([kinds[i] for i in group])
                output = chain.run_group([block], index, group)
                for row, i in enumerate(group):
                    part = output[row : row + 1] if len(group) > 1 else output
                    hidden[i] = chain.place(part) if chain.place else part.detach().to(hidden[i].device)
    return replace(chain, hidden=hidden), statistics


def _kinds(chain: Chain, i: int, inputs: Sequence[ModelInput]) -> Tensor:
    return token_kinds(chain.stage, kinds_of([inputs[chain.sample[i]]])[0], chain.hidden[i].shape[:-1].numel())


def _apply(
    block: nn.Module, name: str, pair: Pair, statistics: _Statistics, plan: Plan, recipe: Recipe
) -> Equalized | None:
    """Rescale one pair. None if no token reached it, or the search found nothing better than leaving it."""
    quantized = [(reader, plan.quantized.get(f"{name}.{reader}")) for reader in pair.readers]
    layers = [(block.get_submodule(reader), scheme) for reader, scheme in quantized if scheme]
    weights = [_rows(layer) for layer, _ in layers]
    change = Equalized(f"{name}.{pair.source}", tuple(f"{name}.{reader}" for reader in pair.readers))
    if not statistics.largest:
        return None
    if recipe.equalize == "smoothquant":
        act_KC = torch.stack(list(statistics.largest.values()))
        scale_C = numerics.smoothquant(act_KC, weights, recipe.smoothing_strength)
    else:
        hessians = [moments.hessian() for moments in statistics.moments.values()]
        sizes = [scheme.group_size for _, scheme in layers]
        rounding = [numerics.quantizer(grid_of(s), s.group_size, recipe.closed_form) for _, s in layers]
        found = numerics.awq(weights, hessians, rounding, sizes, duo=recipe.duo_scaling)
        if found.ratio is None:
            return None
        scale_C, change = found.scale_C, replace(change, ratio=found.ratio, before=found.before, after=found.after)
    rescale(block, pair, scale_C)
    return change


def _rows(layer: Any) -> Tensor:
    return layer.weight.data.t() if isinstance(layer, Conv1D) else layer.weight.data


def _check_unchanged(name: str, output: Tensor, expected: Tensor) -> None:
    """Rescaling may round, no more."""
    gap = difference(output, expected)
    if not gap <= TOLERANCE[expected.dtype]:
        raise UserError(f"{name}: equalizing changes the block's output by {gap:.1%}; leave `equalize` off")


def _chosen(found: Found, recipe: Recipe, name: str, block: nn.Module) -> list[Pair]:
    """All pairs found, or those that the recipe's mappings name."""
    if recipe.mappings is None:
        return list(found.pairs)
    modules = [part for part, _ in block.named_modules() if part]
    layers = [part for part, _ in linears(block)]
    pairs = {pair.source: pair for pair in found.pairs}
    chosen: dict[str, Pair] = {}
    for patterns, source_pattern in recipe.mappings:
        sources = [part for part in modules if matches(source_pattern, f"{name}.{part}")]
        readers = {part for part in layers if any(matches(pattern, f"{name}.{part}") for pattern in patterns)}
        fitting = [pairs[s] for s in sources if s in pairs and readers & set(pairs[s].readers)]
        if sources and readers and not fitting:
            source = next((s for s in sources if s in found.refused), sources[0])
            reason = found.refused.get(source, f"no scale passes from there to {sorted(readers)[0]}")
            raise UserError(f"mappings: {name}.{source} can't be rescaled: {reason}")
        for pair in fitting:
            left = [reader for reader in pair.readers if reader not in readers]
            if left:
                raise UserError(f"mappings: {name}.{pair.source} is also read by {left[0]}; name it in the mapping too")
            chosen[pair.source] = pair
    return list(chosen.values())


def _planned(pair: Pair, name: str, plan: Plan) -> bool:
    return any(f"{name}.{reader}" in plan.quantized for reader in pair.readers)


def _shared_parameters(model: nn.Module) -> set[int]:
    counts = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {identity for identity, count in counts.items() if count > 1}


def _free(pair: Pair, block: nn.Module, shared: set[int]) -> bool:
    """Whether no weight of the pair is also used elsewhere."""
    return not any(id(p) in shared for p in _parameters(pair, block))


def _parameters(pair: Pair, block: nn.Module) -> Iterator[nn.Parameter]:
    for part in (pair.source, *pair.readers):
        yield from block.get_submodule(part).parameters()
