"""Rounding to nearest, written apart from the package's own."""

from torch import Tensor

from auto_mmround.numerics.grids import Codes, Points, quantize, to_groups


def round_to_nearest(w_OI: Tensor, group_size: int, grid: Points) -> Codes:
    """Codes of a weight without any tuning; ``group_size`` -1 is one group a row."""
    columns = w_OI.shape[1]
    w_OGg = to_groups(w_OI.float(), group_size)
    scale_OG, zero_OG = grid.plain(w_OGg)
    q_OGg = quantize(w_OGg, 0.0, scale_OG[..., None], zero_OG[..., None], grid)
    return grid.codes(grid.packed(q_OGg), scale_OG, zero_OG, columns)
