"""Between a model's weights and their codes: rounding states for weights, codes from them, weights
from codes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from auto_mmround.errors import UserError
from auto_mmround.model.products import unseen
from auto_mmround.numerics.grids import Codes, dequantize
from auto_mmround.numerics.moments import Moments
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.start import StartConfig
from auto_mmround.numerics.tuner import TunedWeight
from auto_mmround.recipe.algorithms import Algorithm
from auto_mmround.run.plan import WeightPlan, fused_set, grid_of

# Puts the layers of a block at their start under second moments of their inputs.
Starting = Callable[[Mapping[str, Rounding], Mapping[str, Moments], StartConfig], None]


def starting(how: Algorithm) -> Starting:
    """The function that finds an algorithm's start; there is none for rounding to nearest."""
    file, _, name = str(how.start).rpartition(".")
    function: Starting = getattr(import_module(f"auto_mmround.numerics.{file}"), name)
    return unseen(function)


def leaves_of(
    model: nn.Module,
    planned: Sequence[WeightPlan],
    input_scales: Mapping[str, Tensor] | None = None,
) -> dict[str, TunedWeight]:
    """Rounding states for the weights, at round to nearest; the parameters are as before until they
    are `rounded`.

    input_scales: of static activations, see `static_inputs`.
    """
    leaves = {}
    peaks = shared_peaks(model, planned)
    for weight in planned:
        parameter, transposed = parameter_of(model, weight.name)
        w_OI = (parameter.data.t() if transposed else parameter.data).clone()
        assert weight.scheme is not None
        grid = grid_of(weight.scheme, peaks.get(weight.name))
        rounding = Rounding(w_OI, weight.scheme.group_size, grid)
        input_scale = (input_scales or {}).get(weight.name)
        leaves[weight.name] = TunedWeight(parameter, rounding, transposed, input_scale)
    return leaves


@contextmanager
def rounded(leaves: Mapping[str, TunedWeight], *, keep: bool = True) -> Iterator[None]:
    """The parameters hold W~. Where the work inside fails, or without ``keep``, they hold the
    weights as they were."""
    with ExitStack() as undo:
        for leaf in leaves.values():
            undo.callback(leaf.show_original)
        for leaf in leaves.values():
            leaf.refresh()
        yield
        if keep:
            undo.pop_all()


def codes_of(tuned: Mapping[str, TunedWeight]) -> dict[str, Codes]:
    """What goes to disk, in host memory."""
    return {name: Codes(*_to_cpu(weight.codes())) for name, weight in tuned.items()}


def write_back(model: nn.Module, planned: Sequence[WeightPlan], codes: Mapping[str, Codes]) -> None:
    """The parameters hold what their codes say, to the bit what tuning left in them."""
    for weight in planned:
        parameter, transposed = parameter_of(model, weight.name)
        rows = parameter.data.t() if transposed else parameter.data
        rows.copy_(dequantize(codes[weight.name]).view_as(rows))


def parameter_of(model: nn.Module, name: str) -> tuple[nn.Parameter, bool]:
    """A layer's weight, and whether it is (in, out)."""
    layer = model.get_submodule(name)
    if not isinstance(layer.weight, nn.Parameter):
        raise UserError(
            f"{name}: its weight is made of others as it runs (a parametrization, or pruning of"
            " torch): make it permanent first, as remove_parametrizations or prune.remove does"
        )
    return layer.weight, isinstance(layer, Conv1D)


def shared_peaks(model: nn.Module, planned: Sequence[WeightPlan]) -> dict[str, Tensor]:
    """Largest magnitude of all members of each set of weights that engines fuse, where those want
    one scale for them. In host memory, which waits once."""
    sets: dict[Any, list[str]] = {}
    for weight in planned:
        if weight.scheme and weight.scheme.one_for_fused:
            sets.setdefault(fused_set(weight.name), []).append(weight.name)
    names = [name for members in sets.values() for name in members]
    peaks = [model.get_parameter(f"{name}.weight").detach().abs().max() for name in names]
    if not peaks:
        return {}
    together = torch.stack([peak.to(peaks[0].device) for peak in peaks]).cpu()
    largest = [part.max() for part in together.split([len(members) for members in sets.values()])]
    return {
        name: peak for members, peak in zip(sets.values(), largest, strict=True) for name in members
    }


def _to_cpu(codes: Codes) -> list[Any]:
    return [part.cpu() if isinstance(part, Tensor) else part for part in codes]
