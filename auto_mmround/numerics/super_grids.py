"""Super-blocks, the grids of GGUF's K types: 256 columns share a float16 unit d, asymmetric ones a
second, e.

W~ = d k (n - M) if symmetric, d k n - e m if not, with codes n, and integers k and m a group. So a
group's scale and minimum depend on the whole super-block. They are found here together, by weighted
squared error. After that the units stay fixed. A minimum is a real number, no multiple of the
scale. Adding it to the weight (`Super.min_OG`) leaves a grid with the zero point 0, which is like
any other grid to the rest of this package. Suffixes as in `grids`; S super-blocks a row, J groups a
super-block.
"""

from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from auto_mmround.numerics import grids, scale_search
from auto_mmround.numerics.grids import Grid, integers
from auto_mmround.numerics.scale_search import CHUNK, THERE

TINY, HUGE = 2.0**-24, torch.finfo(torch.float16).max  # of float16
BELOW = (0, 1, 2, 3, -1)  # so far below the bound the largest scale of a super-block may lie
TURNS = 3


class Super(NamedTuple):
    """Scales d k and minima e m (zero if symmetric), float32 (out, G), and the units d, e, float16
    (out, S, 2)."""

    scale_OG: Tensor
    min_OG: Tensor
    unit_OS2: Tensor

    @property
    def unit_OG(self) -> Tensor:
        """d of each group, float32."""
        return _by_group(self.unit_OS2[..., 0].float(), self.scale_OG.shape[1])

    @property
    def min_unit_OG(self) -> Tensor:
        """e of each group, float32."""
        return _by_group(self.unit_OS2[..., 1].float(), self.scale_OG.shape[1])

    def rows(self, part: slice) -> "Super":
        """Those of some rows."""
        return Super(*(tensor[part] for tensor in self))

    def times(self, factor_OG: Tensor, grid: Grid) -> "Super":
        """With scales and minima near these multiples, under the same units."""
        return _rounded(self.scale_OG * factor_OG, self.min_OG * factor_OG, self.unit_OS2, grid)


def search(w_OGg: Tensor, importance_Gg: Tensor, grid: Grid) -> Super:
    """Small sum of importance * (w - w~)^2: every group on its own first, then under the units of
    its super-block."""
    rows = max(1, (CHUNK if w_OGg.is_cpu else THERE * CHUNK) // w_OGg[0].numel())
    weight_Gg = torch.where(importance_Gg.sum(-1, keepdim=True) > 0, importance_Gg.float(), 1.0)
    parts = [
        fit(part, weight_Gg, grid, *_alone(part, weight_Gg, grid))
        for part in w_OGg.float().split(rows)
    ]
    return Super(*(torch.cat(part) for part in zip(*parts, strict=True)))


def fit(w_OGg: Tensor, weight_Gg: Tensor, grid: Grid, scale_OG: Tensor, min_OG: Tensor) -> Super:
    """The best super-blocks near these scales and minima of the groups.

    Integers and units are found in turns: integers by rounding, then units by least squares for the
    resulting codes. Several first units are tried: they bring the largest scale to the bound of
    larger magnitude, or near it. At the end each group tries its neighbouring integers. ValueError
    for columns that are no multiple of 256.
    """
    groups, columns = w_OGg.shape[1:]
    if groups * columns % grids.SUPER:
        raise ValueError(f"{groups * columns} columns are no multiple of {grids.SUPER}")
    assert grid.scale_range is not None
    low, high = grid.scale_range
    scale_OSJ, min_OSJ = (x.unflatten(1, (-1, grids.SUPER // columns)) for x in (scale_OG, min_OG))
    largest_OS = scale_OSJ.gather(-1, scale_OSJ.abs().argmax(-1, keepdim=True))[..., 0]
    bound = low if grid.sym else high
    best: tuple[Tensor, Super] | None = None
    for below in BELOW:
        unit_OS2 = _units(
            largest_OS / (bound + below if grid.sym else bound - below),
            min_OSJ.amax(-1) / (high - below),
        )
        for _ in range(TURNS):
            blocks = _rounded(scale_OG, min_OG, unit_OS2, grid)
            n_OGg, error_OG = _measure(w_OGg, weight_Gg, blocks, grid)
            best = _better(best, _by_super(error_OG, columns), blocks)
            unit_OS2 = _least_squares(w_OGg, weight_Gg, n_OGg, blocks, grid)
    assert best is not None
    for _ in range(2):
        blocks = _neighbours(w_OGg, weight_Gg, best[1], grid)
        n_OGg, error_OG = _measure(w_OGg, weight_Gg, blocks, grid)
        best = _better(best, _by_super(error_OG, columns), blocks)
        again = _rounded(
            blocks.scale_OG,
            blocks.min_OG,
            _least_squares(w_OGg, weight_Gg, n_OGg, blocks, grid),
            grid,
        )
        best = _better(best, _by_super(_measure(w_OGg, weight_Gg, again, grid)[1], columns), again)
    return best[1]


def zeros(blocks: Super, grid: Grid) -> Tensor:
    """Zero points of the grid of a weight to which the minima are added, float32 (out, G)."""
    return torch.full_like(blocks.scale_OG, grid.middle if grid.sym else 0)


def _alone(w_OGg: Tensor, weight_Gg: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales and minima of the groups, each found without the others: those of a plain grid, then
    minima that are real numbers."""
    scale_OG, zero_OG = scale_search.search_scale(w_OGg, weight_Gg, grid)
    min_OG = torch.zeros_like(scale_OG)
    if grid.sym:
        return scale_OG, min_OG
    best_OG, min_OG = torch.full_like(scale_OG, torch.inf), scale_OG * zero_OG
    kept = scale_OG, min_OG
    for _ in range(TURNS):
        n_OGg = _nearest(w_OGg, scale_OG, min_OG, grid)
        error_OG = (
            (n_OGg * scale_OG[..., None] - min_OG[..., None] - w_OGg).square() * weight_Gg
        ).sum(-1)
        wins_OG = error_OG < best_OG
        kept = torch.where(wins_OG, scale_OG, kept[0]), torch.where(wins_OG, min_OG, kept[1])
        best_OG = torch.minimum(best_OG, error_OG)
        # Weighted regression of w on n.
        total_OG = weight_Gg.sum(-1)
        n_OG, w_OG = ((x_OGg * weight_Gg).sum(-1) / total_OG for x_OGg in (n_OGg, w_OGg))
        about_OGg = (n_OGg - n_OG[..., None]) * weight_Gg
        slope_OG = (about_OGg * w_OGg).sum(-1) / (about_OGg * n_OGg).sum(-1).clamp(min=1e-30)
        scale_OG = torch.where(slope_OG > 0, slope_OG, scale_OG)
        min_OG = (scale_OG * n_OG - w_OG).clamp(min=0)
    return kept


def _nearest(w_OGg: Tensor, scale_OG: Tensor, min_OG: Tensor, grid: Grid) -> Tensor:
    """Codes less M, as floats."""
    middle = grid.middle if grid.sym else 0
    return (
        ((w_OGg + min_OG[..., None]) / scale_OG[..., None])
        .round_()
        .clamp_(-middle, grid.top - middle)
    )


def _measure(w_OGg: Tensor, weight_Gg: Tensor, blocks: Super, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes less M, and the weighted error of each group."""
    n_OGg = _nearest(w_OGg, blocks.scale_OG, blocks.min_OG, grid)
    error_OGg = n_OGg * blocks.scale_OG[..., None] - blocks.min_OG[..., None] - w_OGg
    return n_OGg, error_OGg.square_().mul_(weight_Gg).sum(-1)


def _rounded(scale_OG: Tensor, min_OG: Tensor, unit_OS2: Tensor, grid: Grid) -> Super:
    """The nearest scales and minima under these units."""
    assert grid.scale_range is not None
    d_OG, e_OG = (_by_group(unit_OS.float(), scale_OG.shape[1]) for unit_OS in unit_OS2.unbind(-1))
    m_OG = (min_OG / e_OG).round().clamp(0, grid.scale_range[1])
    return Super(d_OG * integers(scale_OG / d_OG, grid), e_OG * m_OG, unit_OS2)


def _units(d_OS: Tensor, e_OS: Tensor) -> Tensor:
    """As the file holds them. Never zero, because they are divisors, and never infinite."""
    pair_OS2 = torch.stack([d_OS, e_OS], -1).clamp(-HUGE, HUGE)
    return torch.where(pair_OS2 < 0, pair_OS2.clamp(max=-TINY), pair_OS2.clamp(min=TINY)).half()


def _least_squares(
    w_OGg: Tensor, weight_Gg: Tensor, n_OGg: Tensor, blocks: Super, grid: Grid
) -> Tensor:
    """Units with the least weighted error for these integers: one or two normal equations a
    super-block."""
    columns = w_OGg.shape[-1]
    a_OGg = n_OGg * (blocks.scale_OG / blocks.unit_OG)[..., None]
    b_OG1 = -(blocks.min_OG / blocks.min_unit_OG)[..., None]

    def total(x: Tensor, y: Tensor) -> Tensor:
        return _by_super((x * y * weight_Gg).sum(-1), columns)

    aa, aw = total(a_OGg, a_OGg), total(a_OGg, w_OGg)
    d_OS, e_OS = (unit.float() for unit in blocks.unit_OS2.unbind(-1))
    if grid.sym:
        return _units(torch.where(aa > 0, aw / aa.clamp(min=1e-30), d_OS), e_OS)
    ab, bb, bw = total(a_OGg, b_OG1), total(b_OG1, b_OG1), total(b_OG1, w_OGg)
    determinant = aa * bb - ab.square()
    solvable = determinant > 1e-6 * aa * bb
    safe = torch.where(solvable, determinant, 1.0)
    new_d, new_e = (aw * bb - bw * ab) / safe, (bw * aa - aw * ab) / safe
    good = solvable & (new_d > 0) & (new_e >= 0)
    return _units(torch.where(good, new_d, d_OS), torch.where(good, new_e, e_OS))


def _neighbours(w_OGg: Tensor, weight_Gg: Tensor, blocks: Super, grid: Grid) -> Super:
    """For each group the best of its integers and their neighbours."""
    assert grid.scale_range is not None
    d_OG, e_OG = blocks.unit_OG, blocks.min_unit_OG
    best_OG, scale_OG, min_OG = torch.full_like(d_OG, torch.inf), blocks.scale_OG, blocks.min_OG
    for more_k, more_m in product((0, -1, 1), (0,) if grid.sym else (0, -1, 1)):
        m_OG = (blocks.min_OG / e_OG + more_m).round().clamp(0, grid.scale_range[1])
        near = Super(
            d_OG * integers(blocks.scale_OG / d_OG + more_k, grid), e_OG * m_OG, blocks.unit_OS2
        )
        error_OG = _measure(w_OGg, weight_Gg, near, grid)[1]
        wins_OG = error_OG < best_OG
        scale_OG = torch.where(wins_OG, near.scale_OG, scale_OG)
        min_OG = torch.where(wins_OG, near.min_OG, min_OG)
        best_OG = torch.minimum(best_OG, error_OG)
    return Super(scale_OG, min_OG, blocks.unit_OS2)


def _better(
    best: tuple[Tensor, Super] | None, error_OS: Tensor, blocks: Super
) -> tuple[Tensor, Super]:
    """For each super-block the solution with the smaller error."""
    if best is None:
        return error_OS, blocks
    wins_OS = error_OS < best[0]
    wins_OG = _by_group(wins_OS, blocks.scale_OG.shape[1])
    return torch.minimum(error_OS, best[0]), Super(
        torch.where(wins_OG, blocks.scale_OG, best[1].scale_OG),
        torch.where(wins_OG, blocks.min_OG, best[1].min_OG),
        torch.where(wins_OS[..., None], blocks.unit_OS2, best[1].unit_OS2),
    )


def _by_group(x_OS: Tensor, groups: int) -> Tensor:
    return x_OS.repeat_interleave(groups // x_OS.shape[1], 1)


def _by_super(x_OG: Tensor, columns: int) -> Tensor:
    return x_OG.unflatten(1, (-1, grids.SUPER // columns)).sum(-1)
