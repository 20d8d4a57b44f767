"""Before anything is tuned: is every number of the model finite, and are there scales for every
weight?"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auto_mmround.errors import UserError, several
from auto_mmround.model.experts import Expert, separable, separated
from auto_mmround.model.keys import loaded_names
from auto_mmround.model.loading import Loaded
from auto_mmround.model.stored import Reader, stored_tensors
from auto_mmround.model.structure import every_block
from auto_mmround.numerics import grids
from auto_mmround.numerics.grids import Fit
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run.leaves import parameter_of, shared_peaks
from auto_mmround.run.plan import Plan, WeightPlan, assembled, fused_set, grid_of

log = logging.getLogger("auto_mmround")

LOST = 0.1  # share of a weight's groups that may need a smaller scale than there is
LARGEST = 2.0**50  # sums of squares of larger numbers leave float32
WIDE = "bf16"  # scales with the range of float32


def within_ranges(loaded: Loaded, plan: Plan) -> Plan:
    """The plan, in which weights that their scales can't hold have wider ones, or stay, which is
    said.

    Reads every tensor once. Raises UserError for one with NaN or infinity, and if no weight is left
    to quantize.
    """
    _check_unread(loaded)
    model, experts, judged = loaded.model, separable(loaded.model), dict[str, Judged]()
    blocks = every_block(model)
    _check_finite(_tensors(model, skip=tuple(f"{block}." for block in blocks)))
    for block in blocks:
        with loaded.holder.resident([block]), separated(model, experts, [block]):
            _check_finite(_tensors(model.get_submodule(block), f"{block}."))
            judged |= _judge(model, plan, plan.of_block(block), experts)
    judged |= _judge(
        model, plan, [w for w in plan.weights if w.scheme and w.block is None], experts
    )
    _say(judged)
    weights = [
        judged[weight.name].weight if weight.name in judged else weight for weight in plan.weights
    ]
    return assembled(plan.stages, weights, plan.formats)


def check_equalized(model: PreTrainedModel, plan: Plan) -> None:
    """Raises UserError where equalizing has left numbers that the planned scales do not hold."""
    experts = separable(model)
    with separated(model, experts):
        _check_finite(
            _tensors(model), "equalizing overflows: leave equalize off, or use another model_dtype"
        )
        judged = _judge(model, plan, [weight for weight in plan.weights if weight.scheme], experts)
    for name, (weight, _) in judged.items():
        if weight.scheme != plan.quantized[name]:
            raise UserError(
                f"{name}: once equalized its numbers need scales that there are not; leave"
                " equalize off"
            )


class Judged(NamedTuple):
    """A weight's plan, and how many groups of it get a larger scale than they need."""

    weight: WeightPlan
    small: int = 0


def _judge(
    model: nn.Module, plan: Plan, planned: Sequence[WeightPlan], experts: Mapping[str, Expert]
) -> dict[str, Judged]:
    """By weight; those that engines load as one share their fate."""
    peaks = shared_peaks(model, planned)
    sets: dict[Any, list[WeightPlan]] = {}
    for weight in planned:
        expert = experts.get(weight.name)
        key = expert.parameter.rpartition(".")[0] if expert else fused_set(weight.name)
        sets.setdefault(key, []).append(weight)
    judged: dict[str, Judged] = {}
    for members in sets.values():
        rows = [_rows(model, weight.name) for weight in members]
        fates = _together(members, rows, plan, [peaks.get(weight.name) for weight in members])
        judged |= {weight.name: fate for weight, fate in zip(members, fates, strict=True)}
    return judged


def _together(
    members: Sequence[WeightPlan],
    rows: Sequence[Tensor],
    plan: Plan,
    peaks: Sequence[Tensor | None],
) -> list[Judged]:
    reason = ""
    for dtype in (None, WIDE):
        weights = [_with_scales(weight, dtype) for weight in members]
        if dtype and not all(_held(weight, plan) for weight in weights):
            break
        fits = [
            _fit(w_OI, weight.scheme, peak)
            for weight, w_OI, peak in zip(weights, rows, peaks, strict=True)
        ]
        small, large = (sum(fit[i] for fit in fits) for i in (1, 2))
        if not large and small <= LOST * sum(fit.groups for fit in fits):
            return [Judged(weight, fit.small) for weight, fit in zip(weights, fits, strict=True)]
        reason = reason or f"numbers too {'large' if large else 'small'} for its scales"
    return [Judged(replace(weight, scheme=None, reason=reason)) for weight in members]


def _rows(model: nn.Module, name: str) -> Tensor:
    parameter, transposed = parameter_of(model, name)
    return parameter.data.t() if transposed else parameter.data.flatten(1)


def _with_scales(weight: WeightPlan, dtype: str | None) -> WeightPlan:
    assert weight.scheme is not None
    if dtype is None:
        return weight
    return replace(weight, scheme=replace(weight.scheme, scale_dtype=dtype))


def _held(weight: WeightPlan, plan: Plan) -> bool:
    """Whether all formats can hold it, and its grid has scales of a dtype."""
    assert weight.scheme is not None
    checks = (
        fmt.check(weight.scheme, weight.out_features, weight.in_features) for fmt in plan.formats
    )
    return weight.scheme.data_type == "int" and not any(checks)


def _fit(w_OI: Tensor, scheme: Scheme | None, peak: Tensor | None) -> Fit:
    assert scheme is not None
    w_OGg = grids.to_groups(w_OI, scheme.group_size)
    # rounded it may be beyond
    if float(w_OI.abs().max()) > min(LARGEST, torch.finfo(w_OI.dtype).max / 2):
        return Fit(1, 0, 1)
    return grid_of(scheme, peak).fit(w_OGg)


def _say(judged: Mapping[str, Judged]) -> None:
    """One line for all weights of a kind."""
    lines: dict[str, list[str]] = {}
    for name, (weight, small) in judged.items():
        if weight.reason:
            lines.setdefault(f"stays: {weight.reason}", []).append(name)
        elif small:
            lines.setdefault(
                "has groups of numbers below what its scales hold: they may become 0", []
            ).append(name)
    for text, names in lines.items():
        log.warning("%s%s %s", names[0], several(names), text)


def _tensors(
    module: nn.Module, prefix: str = "", skip: tuple[str, ...] = ()
) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, whether it is a buffer) of what lies in memory; masks, which are buffers, may
    hold infinities."""
    buffers = {name for name, _ in module.named_buffers()}
    for name, tensor in module.state_dict().items():
        if not tensor.is_meta and not (skip and name.startswith(skip)):
            yield prefix + name, tensor, name in buffers


def _check_finite(tensors: Iterator[tuple[str, Tensor, bool]], advice: str = "") -> None:
    for name, tensor, buffer in tensors:
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        low, high = tensor.aminmax() if tensor.itemsize > 1 else tensor.float().aminmax()
        if bool(low.isnan() | high.isnan()) or (not buffer and bool(low.isinf() | high.isinf())):
            cast = (
                ", or load it with --model_dtype bfloat16" if tensor.dtype == torch.float16 else ""
            )
            count = int((~tensor.isfinite()).sum())
            raise UserError(
                f"{name} holds NaN or infinity ({count} of {tensor.numel()} numbers,"
                f" {tensor.dtype}): " + (advice or f"mend the model's weights{cast}")
            )


def _check_unread(loaded: Loaded) -> None:
    """Tensors that the files have and the model has not: they are copied into every checkpoint."""
    if loaded.source is None:
        return
    stored = stored_tensors(loaded.source)
    unread = [
        key for key, (name, _) in loaded_names(loaded.model, stored.files).items() if name is None
    ]
    with Reader(stored) as reader:
        _check_finite((key, reader.tensor(key), False) for key in unread)
