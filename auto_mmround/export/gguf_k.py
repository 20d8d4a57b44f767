"""GGUF's super-blocks of 256 weights (K types): groups share a float16 scale d, times a small integer each.

W = d * k * (n - M) for the symmetric types, W = d * k * n - dmin * m for the others, with codes n and integers k, m a
group. Such scales are no free choice of a tuner that works on plain grids, so its weights are fitted here once more:
the scale integers by rounding, then codes and (d, dmin) in turns, the latter by least squares.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

SUPER = 256


class SuperType(NamedTuple):
    """One K type. low, high: bounds of the scale integers; minima lie in 0..high."""

    name: str
    bits: int
    sym: bool
    group: int
    low: int
    high: int
    columns: int = SUPER


SUPER_TYPES: Mapping[str, SuperType] = {
    t.name: t
    for t in (
        SuperType("Q2_K", 2, False, 16, 0, 15),
        SuperType("Q3_K", 3, True, 16, -32, 31),
        SuperType("Q4_K", 4, False, 32, 0, 63),
        SuperType("Q5_K", 5, False, 32, 0, 63),
        SuperType("Q6_K", 6, True, 16, -128, 127),
    )
}


class Super(NamedTuple):
    """A weight on a super-block grid (S super-blocks a row, G groups each, g columns a group). dmin, min: 0 if
    symmetric."""

    n_OSGg: Tensor  # uint8
    d_OS: Tensor  # float16; may be negative if symmetric
    dmin_OS: Tensor  # float16
    scale_OSG: Tensor  # int16
    min_OSG: Tensor  # int16


def decode(fitted: Super, kind: SuperType) -> Tensor:
    """W (out, in) float32, in the order of operations of ggml."""
    middle = 2 ** (kind.bits - 1) if kind.sym else 0
    scale_OSG = fitted.d_OS.float()[..., None] * fitted.scale_OSG
    min_OSG = fitted.dmin_OS.float()[..., None] * fitted.min_OSG
    return (scale_OSG[..., None] * (fitted.n_OSGg.float() - middle) - min_OSG[..., None]).flatten(1)


def search(w_OI: Tensor, kind: SuperType, importance_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scales and minima (out, groups) of each group on its own, the best of a few shrunken ranges by weighted error.

    importance_I: weights of the columns, such as second moments of the inputs; None weighs all alike.
    """
    w_OGg = w_OI.float().unflatten(1, (-1, kind.group))
    h_Gg = torch.ones_like(w_OI[0]) if importance_I is None else importance_I.float()
    h_Gg = h_Gg.unflatten(0, (-1, kind.group))
    low_OG, high_OG = w_OGg.amin(-1).clamp(max=0), w_OGg.amax(-1).clamp(min=0)
    extreme_OG = torch.where(-low_OG > high_OG, low_OG, high_OG)
    best_OG = torch.full_like(low_OG, torch.inf)
    scale_OG, min_OG = torch.zeros_like(low_OG), torch.zeros_like(low_OG)
    for factor in torch.linspace(0.6, 1.05, 19).tolist():
        if kind.sym:
            s_OG, m_OG = -factor * extreme_OG / 2 ** (kind.bits - 1), torch.zeros_like(low_OG)
        else:
            s_OG, m_OG = factor * (high_OG - low_OG) / (2**kind.bits - 1), -factor * low_OG
        value_OGg = _on_grid(w_OGg, s_OG, m_OG, kind)[1]
        error_OG = ((value_OGg - w_OGg).square() * h_Gg).sum(-1)
        better_OG = error_OG < best_OG
        best_OG = torch.where(better_OG, error_OG, best_OG)
        scale_OG, min_OG = torch.where(better_OG, s_OG, scale_OG), torch.where(better_OG, m_OG, min_OG)
    return scale_OG, min_OG


def fit(
    w_OI: Tensor, kind: SuperType, scale_OG: Tensor, min_OG: Tensor, importance_I: Tensor | None = None, turns: int = 3
) -> Super:
    """The nearest weight on the super-block grid that starts from these scales and minima of the groups.

    Several d a super-block are tried, a little below the one that reaches the largest scale, and the best is kept.
    ValueError for columns that are no multiple of 256.
    """
    if w_OI.shape[1] % SUPER:
        raise ValueError(f"{kind.name}: {w_OI.shape[1]} columns are no multiple of {SUPER}")
    split = (-1, SUPER // kind.group)
    w_OSGg = w_OI.float().unflatten(1, (*split, kind.group))
    h_SGg = torch.ones_like(w_OSGg[0]) if importance_I is None else importance_I.float().unflatten(0, w_OSGg.shape[1:])
    target_OSG, floor_OSG = scale_OG.float().unflatten(1, split), min_OG.float().unflatten(1, split)
    if kind.sym:  # the largest scale lands on the lower bound, which is the wider one
        at = target_OSG.abs().argmax(-1, keepdim=True)
        full_OS = target_OSG.gather(-1, at)[..., 0] / kind.low
    else:
        full_OS = target_OSG.amax(-1) / kind.high
    dmin_OS = floor_OSG.amax(-1) / kind.high
    best: tuple[Tensor, Super] | None = None
    for factor in (1.0, 1.01, 1.02, 1.04, 0.99, 0.98):
        d_OS = (full_OS * factor).half()
        m_OS = dmin_OS.half()
        scale_OSG = _integers(target_OSG, d_OS, kind.low, kind.high)
        min_OSG = _integers(floor_OSG, m_OS, 0, kind.high)
        for turn in range(turns):
            s_OSG, f_OSG = d_OS.float()[..., None] * scale_OSG, m_OS.float()[..., None] * min_OSG
            n_OSGg, value_OSGg = _on_grid(w_OSGg, s_OSG, f_OSG, kind)
            error_OS = ((value_OSGg - w_OSGg).square() * h_SGg).sum((-1, -2))
            found = Super(n_OSGg.to(torch.uint8), d_OS, m_OS, scale_OSG, min_OSG)
            best = (error_OS, found) if best is None else _better(best, (error_OS, found))
            if turn + 1 < turns:
                d_OS, m_OS = _least_squares(w_OSGg, h_SGg, found, kind)
    assert best is not None
    return best[1]


def _better(old: tuple[Tensor, Super], new: tuple[Tensor, Super]) -> tuple[Tensor, Super]:
    take_OS = new[0] < old[0]
    parts = [torch.where(take_OS.reshape(*take_OS.shape, *[1] * (a.ndim - 2)), b, a) for a, b in zip(old[1], new[1])]
    return torch.minimum(old[0], new[0]), Super(*parts)


def _on_grid(w: Tensor, scale: Tensor, minimum: Tensor, kind: SuperType) -> tuple[Tensor, Tensor]:
    """(codes, values) of the nearest points; scales and minima lack the last dimension of ``w``."""
    middle, top = (2 ** (kind.bits - 1) if kind.sym else 0), 2**kind.bits - 1
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)[..., None]
    n = ((w + minimum[..., None]) / safe + middle).round().clamp(0, top)
    n = torch.where(scale[..., None] == 0, torch.full_like(n, middle), n)
    return n, scale[..., None] * (n - middle) - minimum[..., None]


def _integers(value_OSG: Tensor, unit_OS: Tensor, low: int, high: int) -> Tensor:
    unit_OSG = torch.where(unit_OS == 0, torch.ones_like(unit_OS), unit_OS).float()[..., None]
    return (value_OSG / unit_OSG).round().clamp(low, high).to(torch.int16)


def _least_squares(w_OSGg: Tensor, h_SGg: Tensor, found: Super, kind: SuperType) -> tuple[Tensor, Tensor]:
    """(d, dmin) that minimize the weighted error for these integers: one or two normal equations a super-block."""
    middle = 2 ** (kind.bits - 1) if kind.sym else 0
    a_OSGg = found.scale_OSG[..., None] * (found.n_OSGg.float() - middle)
    b_OSG1 = -found.min_OSG.float()[..., None]

    def total(x: Tensor, y: Tensor) -> Tensor:
        return (x * y * h_SGg).sum((-1, -2))

    aa, aw = total(a_OSGg, a_OSGg), total(a_OSGg, w_OSGg)
    alone_OS = torch.where(aa > 0, aw / aa.clamp(min=1e-30), found.d_OS.float())
    if kind.sym:
        return alone_OS.half(), found.dmin_OS
    ab, bb, bw = total(a_OSGg, b_OSG1), total(b_OSG1, b_OSG1), total(b_OSG1, w_OSGg)
    determinant = aa * bb - ab.square()
    solvable = determinant > 1e-6 * aa * bb
    safe = torch.where(solvable, determinant, torch.ones_like(determinant))
    d_OS, dmin_OS = (aw * bb - bw * ab) / safe, (bw * aa - aw * ab) / safe
    good = solvable & (d_OS > 0) & (dmin_OS >= 0)
    return torch.where(good, d_OS, found.d_OS.float()).half(), torch.where(good, dmin_OS, found.dmin_OS.float()).half()


def pack(fitted: Super, kind: SuperType) -> Tensor:
    """Blocks as ggml stores them, (out, bytes of a row) uint8."""
    n = fitted.n_OSGg.flatten(2)
    d, dmin = (x.contiguous().unsqueeze(-1).view(torch.uint8) for x in (fitted.d_OS, fitted.dmin_OS))
    k, m = fitted.scale_OSG, fitted.min_OSG
    pairs = n.unflatten(-1, (4, 2, 32))  # chunks of 64: the first 32 in low nibbles, the others in high ones
    quarters = n.unflatten(-1, (2, 4, 32))  # halves of 128, each of four runs that share their bytes
    if kind.name == "Q2_K":
        fields = [_bytes(k | m << 4), _layers(quarters & 3, 2).flatten(2), d, dmin]
    elif kind.name == "Q3_K":
        fields = [_layers((quarters >> 2).flatten(2, 3), 1), _layers(quarters & 3, 2).flatten(2), _six_bits(k + 32), d]
    elif kind.name == "Q6_K":
        low = quarters & 15
        nibbles = torch.cat([low[..., 0, :] | low[..., 2, :] << 4, low[..., 1, :] | low[..., 3, :] << 4], -1)
        fields = [nibbles.flatten(2), _layers(quarters >> 4, 2).flatten(2), k.to(torch.int8).view(torch.uint8), d]
    else:
        high = [_layers((pairs >> 4).flatten(2, 3), 1)] if kind.bits == 5 else []
        nibbles = (pairs[..., 0, :] & 15 | (pairs[..., 1, :] & 15) << 4).flatten(2)
        fields = [d, dmin, _scales_and_minima(k, m), *high, nibbles]
    return torch.cat(fields, -1).flatten(1).contiguous()


def _bytes(x: Tensor) -> Tensor:
    return x.to(torch.uint8)


def _layers(x: Tensor, width: int) -> Tensor:
    """(.., J, l) -> (.., l) bytes: row j in bits width*j and up."""
    shifts = width * torch.arange(x.shape[-2], device=x.device)[:, None]
    return (x.long() << shifts).sum(-2).to(torch.uint8)


def _scales_and_minima(k: Tensor, m: Tensor) -> Tensor:
    """Eight 6-bit scales and eight minima in 12 bytes: four whole each with two bits of the others, then the rest."""
    first = [x[..., :4] | x[..., 4:] >> 4 << 6 for x in (k, m)]
    return _bytes(torch.cat([*first, k[..., 4:] & 15 | (m[..., 4:] & 15) << 4], -1))


def _six_bits(k: Tensor) -> Tensor:
    """Sixteen 6-bit scales in 12 bytes: low nibbles of i and i + 8 together, then the high pairs, four to a byte."""
    return torch.cat([_bytes(k[..., :8] & 15 | (k[..., 8:] & 15) << 4), _layers((k >> 4).unflatten(-1, (4, 4)), 2)], -1)
