"""Equalization: move magnitude between a layer's inputs and its weights, channel by channel, before
rounding.

The inputs of some linear layers are divided by a scale s for each channel, and the layers' columns
are multiplied by it, so the function stays. `smoothquant` (arXiv 2211.10438) makes activations
easier to quantize. `awq` (arXiv 2306.00978) protects the weights that large activations meet. Both
take each channel from the modality in which it stands out most, and not the pooled range: one loud
modality would hide the needs of the others. A common factor of s changes nothing, so scales have a
geometric mean of 1. Shape suffixes: K modalities, C channels (inputs of the layers), O outputs, G
groups a row, g columns a group.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from auto_mmround.numerics import grids, scale_search
from auto_mmround.numerics.grids import Points
from auto_mmround.numerics.moments import output_error

# smallest magnitude that a scale is computed from, as a share of the mean over channels
FLOOR = 1e-5
RATIOS = tuple(i / 20 for i in range(20))  # the grid of the AWQ paper
# outputs of all layers together that the search looks at: one ratio for all channels needs no more
ROWS = 256

Quantize = Callable[[Tensor, Tensor], Tensor]  # (w_OC, importance_C) -> W~_OC


def worst_modality(act_KC: Tensor) -> Tensor:
    """Magnitude of each channel in the modality where it stands out most from that modality's mean,
    (C,).

    Rows without any magnitude are modalities that no token had. With one modality it is that row.
    """
    level_K1 = act_KC.float().mean(1, keepdim=True)
    most_C = torch.where(level_K1 > 0, act_KC / level_K1, 0.0).amax(0) * level_K1.max()
    return torch.where(level_K1.max() > 0, most_C, 1.0)


def smoothquant(act_KC: Tensor, weights: Sequence[Tensor], strength: float = 0.8) -> Tensor:
    """s = act^a / weight^(1-a), (C,): act the largest input of the worst modality, weight the
    largest |W| a column.

    act_KC: largest |x| by modality. weights: (out, C) each, all that read the channels. strength:
    a, 0 to 1; the larger, the more of the activations' range goes into the weights.
    """
    weight_C = torch.stack([w_OC.float().abs().amax(0) for w_OC in weights]).amax(0)
    return _centred(
        _positive(worst_modality(act_KC)) ** strength / _positive(weight_C) ** (1 - strength)
    )


class Searched(NamedTuple):
    """A scale (C,), the ratio it came from (None: nothing was better than leaving the channels),
    and the relative output error of the worst modality before and after."""

    scale_C: Tensor
    ratio: float | None
    before: float
    after: float


def awq(
    weights: Sequence[Tensor],
    hessians: Sequence[Tensor],
    quantize: Sequence[Quantize],
    group_sizes: Sequence[int],
    *,
    duo: bool = True,
) -> Searched:
    """The ratio r with the smallest quantized output error, s = act^r, or with ``duo`` act^r /
    weight^(1-r).

    act is the root mean square input of the worst modality, weight the mean of |W| over its group's
    largest. The error is the largest over modalities of tr(E H E^T) / tr(W H W^T), E = W - W~.
    weights: (out, C) each, all layers that read the channels and are quantized. hessians: second
    moments (C, C), one a modality. quantize, group_sizes: how each weight will be rounded; -1 is
    one group a row.
    """
    few = _spread_rows([w_OC.float() for w_OC in weights], ROWS)
    act_C = _positive(
        worst_modality(torch.stack([h_CC.diagonal() for h_CC in hessians]).clamp(min=0).sqrt())
    )
    weight_C = _positive(_relative_weight(few, group_sizes))
    signals = [
        max(sum(output_error(w, torch.zeros_like(w), h) for w in few), 1e-30) for h in hessians
    ]
    importance_C = torch.stack(
        [h.diagonal() / signal for h, signal in zip(hessians, signals)]
    ).mean(0)

    def worst_error(scale_C: Tensor) -> float:
        rounded = [
            q(w * scale_C, importance_C / scale_C.square()) / scale_C for w, q in zip(few, quantize)
        ]
        return max(
            sum(output_error(w, w_q, h) for w, w_q in zip(few, rounded)) / signal
            for h, signal in zip(hessians, signals)
        )

    plain = torch.ones_like(act_C)
    before = worst_error(plain)
    best = Searched(plain, None, before, before)
    for ratio in RATIOS:
        scale_C = _centred(act_C**ratio / (weight_C ** (1 - ratio) if duo else 1.0))
        after = worst_error(scale_C)
        if after < best.after:
            best = Searched(scale_C, ratio, before, after)
    return best


def quantizer(grid: Points, group_size: int, searched: bool) -> Quantize:
    """Rounding to nearest as the run will do it: under searched scales, or under the scales of the
    plain range."""

    def rounded(w_OC: Tensor, importance_C: Tensor) -> Tensor:
        columns = w_OC.shape[1]
        w_OGg = grids.to_groups(w_OC, group_size)
        if searched:
            importance_Gg = grids.to_groups(importance_C[None], w_OGg.shape[-1])[0]
            scale_OG, zero_OG = scale_search.search_scale(w_OGg, importance_Gg, grid)
        else:
            scale_OG, zero_OG = grid.plain(w_OGg)
        q_OGg = grids.quantize(w_OGg, 0.0, scale_OG[..., None], zero_OG[..., None], grid)
        return grids.from_groups((q_OGg - zero_OG[..., None]) * scale_OG[..., None], columns)

    return rounded


def _relative_weight(weights: Sequence[Tensor], group_sizes: Sequence[int]) -> Tensor:
    """Mean over all rows of |W| over the largest in its group, (C,)."""
    parts = []
    for w_OC, group_size in zip(weights, group_sizes, strict=True):
        w_OGg = grids.to_groups(w_OC.abs(), group_size)
        parts.append(
            grids.from_groups(w_OGg / w_OGg.amax(-1, keepdim=True).clamp(min=1e-30), w_OC.shape[1])
        )
    return torch.cat(parts).mean(0)


def _spread_rows(weights: Sequence[Tensor], wanted: int) -> list[Tensor]:
    """At most about ``wanted`` rows of all weights together, evenly spread."""
    stride = max(1, sum(len(w_OC) for w_OC in weights) // wanted)
    return [w_OC[::stride] for w_OC in weights]


def _positive(magnitude_C: Tensor) -> Tensor:
    return magnitude_C.clamp(min=(FLOOR * magnitude_C.mean()).clamp(min=1e-30).item())


def _centred(scale_C: Tensor) -> Tensor:
    return scale_C / scale_C.log().mean().exp()
