"""Large weights, some rows at a time: a value takes several bytes while it is decoded.

Shapes: O out, I in, G groups a row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PIECE = 2**20  # values that are decoded at a time


def pieces_of(shape: torch.Size | tuple[int, int]) -> list[slice]:
    """Rows of a matrix, in pieces of about `PIECE` values."""
    step = max(1, PIECE // max(1, shape[1]))
    return [slice(at, at + step) for at in range(0, shape[0], step)]


def rows_of(codes: Any, rows: slice) -> Any:
    """`Codes` of some rows, without the units of super-blocks."""
    tables = {
        name: None if (table := getattr(codes, name)) is None else table[rows]
        for name in ("q_OI", "scale_OG", "zero_OG", "min_OG")
    }
    return codes._replace(**tables, unit_OS2=None)


def by_rows(decode: Callable[[Any, torch.dtype], Tensor], codes: Any, dtype: torch.dtype) -> Tensor:
    """All rows decoded by ``decode``, (out, in)."""
    pieces = pieces_of(codes.q_OI.shape)
    if len(pieces) < 2:
        return decode(codes, dtype)
    made_OI = torch.empty(codes.q_OI.shape, dtype=dtype, device=codes.q_OI.device)
    for rows in pieces:
        made_OI[rows] = decode(rows_of(codes, rows), dtype)
    return made_OI


def over_rows(x: Tensor, rows: int, dim: int = 0) -> Tensor:
    """Each entry is the sum over its run of ``rows`` entries along a dimension."""
    if rows == 1:
        return x
    sum_B = fold_rows(x.movedim(dim, 0), rows).sum(1)
    return spread_rows(sum_B, rows, x.shape[dim]).movedim(0, dim)


def fold_rows(x_O: Tensor, rows: int) -> Tensor:
    """Rows in blocks, (blocks, rows, ...). The last block is filled up with zeros."""
    short = -len(x_O) % rows
    if short:
        x_O = torch.cat([x_O, x_O.new_zeros(short, *x_O.shape[1:])])
    return x_O.unflatten(0, (-1, rows))


def spread_rows(x_B: Tensor, rows: int, count: int) -> Tensor:
    """The entry of a block of rows, repeated for each of ``count`` rows."""
    return x_B.repeat_interleave(rows, 0)[:count]
