"""What rounding a weight to some grid does to the model's output, from second moments on both of its sides.

To second order KL(model || changed model) = 1/2 E[(g . E x)^2] a token, with the weight's error E = W - W~, its inputs
x, and g the gradient of the log loss of labels drawn from the model. With inputs and gradients independent of each
other, and gradients of different outputs too, that is 1/2 sum_o E[g_o^2] (E H E^T)_oo, H = E[x x^T].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from auto_mmround.numerics import gram
from auto_mmround.numerics.grids import Grid
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.start import StartConfig, closed_form


def rounding_damage(
    weights_OI: Sequence[Tensor],
    moments: gram.Moments,
    hessians_SII: Sequence[Tensor],
    squares_SO: Sequence[Tensor],
    group_size: int,
    grid: Grid,
    config: StartConfig,
) -> Tensor:
    """Nats a position (N, S) that rounding each of N weights with the same inputs adds, for S sets of samples.

    moments: of all tokens; by them the closed form rounds. hessians_SII: second moments of each set. squares_SO: for
    each weight the sums of squared gradients at its outputs on each set, see `model.fisher.layer_fisher`.
    """
    roundings = [Rounding(w_OI, group_size, grid) for w_OI in weights_OI]
    closed_form(roundings, moments, config)
    damage_NS = torch.empty(len(weights_OI), len(hessians_SII))
    for n, (w_OI, rounding) in enumerate(zip(weights_OI, roundings, strict=True)):
        error_OI = w_OI.float() - rounding.weight()
        for s, h_II in enumerate(hessians_SII):
            damage_NS[n, s] = 0.5 * (((error_OI @ h_II) * error_OI).sum(1) * squares_SO[n][s]).sum()
    return damage_NS
