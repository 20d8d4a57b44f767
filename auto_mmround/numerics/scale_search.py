"""Scales and zero points that lower the error weighted by diag(H), group by group.

Shapes: O out, I in, G groups a row, g columns a group.
"""

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from auto_mmround.numerics import grids, pieces
from auto_mmround.numerics.float_grids import FloatGrid
from auto_mmround.numerics.grids import Points

# Elements of a weight searched at a time: so few that temporaries stay in the processor's cache. An
# accelerator takes THERE times as many, and tries as many candidates at once as fit into that.
CHUNK, THERE = 2**16, 256


class Search(NamedTuple):
    """Candidates: the plain scale times ``factors``, its zero point plus ``shifts``; then rounds
    around the best."""

    factors: tuple[float, ...]
    shifts: tuple[int, ...]
    rounds: tuple[tuple[tuple[float, ...], tuple[int, ...]], ...]


def spread(low: float, high: float, count: int) -> tuple[float, ...]:
    """``count`` numbers from ``low`` to ``high``, each the same multiple of the one before."""
    return tuple(low * (high / low) ** (i / (count - 1)) for i in range(count))


# Factors of the scale that brings a group's largest magnitude to 6 or 448. NVFP4: also to 4 and
# between, as far as e4m3 tells them apart. MX: half and twice the scale. FP8: within one power of
# two; beyond it the points repeat.
FLOATS = {
    "nvfp4": spread(0.7, 1.75, 12),
    "mxfp4": (1.0, 0.5, 2.0),
    "mxfp8": (1.0, 0.5, 2.0),
    "fp8": spread(0.85, 1.7, 12),
}


def search_plan(grid: Points) -> Search:
    """The candidates of `search_scale`, 22 to 46. Up to 4 bits, a symmetric scale of the other sign
    often wins.

    Floats: `FLOATS`. Integers move with steps of about 1 / top, so the last round's steps shrink
    with the bits.
    """
    if isinstance(grid, FloatGrid):
        return Search(FLOATS[grid.data_type] if grid.fixed is None else (), (0,), ())
    fine = tuple(1 + i / (2 * grid.top) for i in (-3, -2, -1, 1, 2, 3))
    if not grid.sym:
        factors = spread(0.35, 1.0, 8)
        return Search(factors, (-1, 0, 1), ((fine, (0,)),))
    if grid.bits <= 4:
        factors = spread(0.35, 1.3, 8)
        return Search(factors + tuple(-f for f in factors), (0,), ((fine, (0,)),))
    near = tuple(1 + i / 200 for i in (-4, -3, -2, -1, 1, 2, 3, 4))
    return Search(spread(0.45, 1.15, 32), (0,), ((near, (0,)), (fine, (0,))))


class _Best(NamedTuple):
    gain_OG: Tensor
    scale_OG: Tensor
    zero_OG: Tensor


def search_scale(w_OGg: Tensor, importance: Tensor, grid: Points) -> tuple[Tensor, Tensor]:
    """Scale and zero point (out, G), float32 as the file will hold them, with small sum of
    importance * (w - w~)^2.

    ``importance`` is E[x^2], (G, g) or (out, G, g). A group without any is searched unweighted.
    Candidates shrink the range, as in SignRoundV2 (arXiv 2512.04746), in coarse steps first and
    then in finer ones around the best. But a candidate's integers are judged with the scale that
    fits them best, s = sum(iwq) / sum(iqq). The error is then sum(iww) - sum(iwq)^2 / sum(iqq). So
    a few candidates find more than a fine grid of scales. The result is never worse than the plain
    scale of `grids.scale_and_zero`. Scales of floats are coarse: each candidate is judged with the
    nearest scale that the file can hold. Rows that share a scale are one long group.
    """
    if grid.rows > 1:
        assert isinstance(grid, FloatGrid)
        return _by_rows(w_OGg, importance, grid)
    rows = max(1, (CHUNK if w_OGg.is_cpu else THERE * CHUNK) // w_OGg[0].numel())
    parts = []
    for at in range(0, len(w_OGg), rows):
        part = importance[at : at + rows] if importance.dim() == 3 else importance
        w_PGg = w_OGg[at : at + rows].float()
        together = 1 if w_OGg.is_cpu else max(1, THERE * CHUNK // w_PGg.numel())
        parts.append(_search(w_PGg, part.float(), grid, search_plan(grid), together))
    return torch.cat([scale_OG for scale_OG, _ in parts]), torch.cat(
        [zero_OG for _, zero_OG in parts]
    )


def _by_rows(w_OGg: Tensor, importance: Tensor, grid: FloatGrid) -> tuple[Tensor, Tensor]:
    """`search_scale` for blocks of rows that share a scale."""

    def long(x_OGg: Tensor) -> Tensor:
        return pieces.fold_rows(x_OGg, grid.rows).transpose(1, 2).flatten(2)

    importance_OGg = importance.expand(w_OGg.shape)
    folded = search_scale(long(w_OGg), long(importance_OGg), grid._replace(rows=1))
    scale_OG, zero_OG = (pieces.spread_rows(x_BG, grid.rows, len(w_OGg)) for x_BG in folded)
    return scale_OG, zero_OG


def _search(
    w_OGg: Tensor, importance: Tensor, grid: Points, plan: Search, together: int
) -> tuple[Tensor, Tensor]:
    importance = torch.where(importance.sum(-1, keepdim=True) > 0, importance, 1.0)
    weighted_OGg = w_OGg * importance
    plain = grid.plain(w_OGg)
    best = _Best(torch.zeros_like(plain[0]), *plain)
    for factors, shifts in ((plan.factors, plan.shifts), *plan.rounds):
        _, scale_OG, zero_OG = best
        tried: Any = tuple(product(factors, shifts))
        if together > 1:  # (2, C, 1, 1)
            tried_2C = torch.tensor(tried, device=w_OGg.device).t()[..., None, None]
            tried = zip(*(part.split(together) for part in tried_2C), strict=True)
        for factor, shift in tried:
            zero_shifted_OG = (zero_OG + shift).clamp(grid.min_zero, grid.top)
            best = _better(
                best, w_OGg, weighted_OGg, importance, scale_OG * factor, zero_shifted_OG, grid
            )
    scale_OG = grid.storable(best.scale_OG)
    # Rounding the scale to its dtype may cost more than the search has won, or the group is all
    # zeros.
    kept_OG = weighted_error(w_OGg, importance, scale_OG, best.zero_OG, grid) <= weighted_error(
        w_OGg, importance, *plain, grid
    )
    return torch.where(kept_OG, scale_OG, plain[0]), torch.where(kept_OG, best.zero_OG, plain[1])


def _better(
    best: _Best,
    w_OGg: Tensor,
    weighted_OGg: Tensor,
    importance: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    grid: Points,
) -> _Best:
    """Group by group the better of ``best`` and a candidate scale and zero point, or several
    candidates, (C, O, G)."""
    if not grid.exact_scales:
        scale_OG = grid.storable(scale_OG)
    if grid.sym:
        q_OGg = grid.snap_(w_OGg / scale_OG[..., None])
        q_OGg.clamp_(grid.low - grid.middle, grid.top - grid.middle)
    else:
        q_OGg = (
            (w_OGg / scale_OG[..., None])
            .round_()
            .clamp_(-zero_OG[..., None], grid.top - zero_OG[..., None])
        )
    along_OG = (weighted_OGg * q_OGg).sum(-1)
    length_OG = q_OGg.square_().mul_(importance).sum(-1).clamp(min=1e-30)
    fit_OG = along_OG / length_OG
    if grid.exact_scales:
        gain_OG = along_OG * fit_OG
    else:
        fit_OG = grid.storable(fit_OG)
        gain_OG = fit_OG * (2 * along_OG - fit_OG * length_OG)
    if gain_OG.dim() > 2:
        gain_OG, first_OG = gain_OG.max(0)
        fit_OG, zero_OG = (x.gather(0, first_OG[None])[0] for x in (fit_OG, zero_OG))
    wins_OG = gain_OG > best.gain_OG
    return _Best(
        torch.where(wins_OG, gain_OG, best.gain_OG),
        torch.where(wins_OG, fit_OG, best.scale_OG),
        torch.where(wins_OG, zero_OG, best.zero_OG),
    )


def weighted_error(
    w_OGg: Tensor, importance: Tensor, scale_OG: Tensor, zero_OG: Tensor, grid: Points
) -> Tensor:
    """sum of importance * (w - w~)^2 over each group, rounded to nearest; (out, G)."""
    scale_OG1, zero_OG1 = scale_OG[..., None], zero_OG[..., None]
    q_OGg = grids.quantize(w_OGg, 0.0, scale_OG1, zero_OG1, grid)
    return (w_OGg - scale_OG1 * (q_OGg - zero_OG1)).square_().mul_(importance).sum(-1)
