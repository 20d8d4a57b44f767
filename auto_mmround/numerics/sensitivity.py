"""What rounding a weight to some grid does to the model's output, from its inputs and the gradients at its outputs.

To second order KL(model || changed model) of a sample is 1/2 E[(sum_t g_t . E x_t)^2], with the weight's error E = W -
W~, its inputs x_t, and g_t the gradient of the sample's log loss with labels drawn from the model. One draw a sample is
a noisy mean for long texts, so sums are squared window by window, which neglects how errors far apart add up.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from auto_mmround.numerics import gram
from auto_mmround.numerics.grids import Grid
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.start import StartConfig, closed_form

WINDOW = 64  # tokens
FINE = 6  # bits from which rounding to nearest, an upper bound, is judged instead: both are next to nothing


class Seen(NamedTuple):
    """One sample's tokens at one layer: inputs, gradients at the outputs; the set of samples that it belongs to."""

    x_TI: Tensor
    g_TO: Tensor
    part: int


def rounding_damage(
    weights_OI: Sequence[Tensor],
    moments: gram.Moments,
    seen: Sequence[Sequence[Seen]],
    positions: Sequence[int],
    group_size: int,
    grid: Grid,
    config: StartConfig,
) -> Tensor:
    """Nats a position (N, S) that rounding each of N weights with the same inputs adds, for S sets of samples.

    moments: of the inputs; by them the closed form rounds. seen: for each weight some samples; positions: of the
    model's output on them, by set.
    """
    roundings = [Rounding(w_OI, group_size, grid) for w_OI in weights_OI]
    if grid.bits < FINE:
        closed_form(roundings, moments, config)
    damage_NS = torch.zeros(len(weights_OI), len(positions))
    for n, (w_OI, rounding) in enumerate(zip(weights_OI, roundings, strict=True)):
        error_OI = w_OI.float() - rounding.weight()
        for x_TI, g_TO, part in seen[n]:
            change_T = ((x_TI.float() @ error_OI.t()) * g_TO.float()).sum(1)
            sums = torch.stack([window_T.sum() for window_T in change_T.split(WINDOW)])
            damage_NS[n, part] += 0.5 * sums.square().sum().item() / max(positions[part], 1)
    return damage_NS
