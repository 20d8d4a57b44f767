"""GGUF's super-blocks of 256 weights (K types): pure packing of codes on their grids, exact.

W = d * k * (n - M) for the symmetric types, W = d * k * n - dmin * m for the others, with codes n,
float16 d and dmin a super-block, and integers k, m a group. The tuner works on these grids
(`numerics/super_grids.py`); `onto` is for weights that were tuned on plain ones.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from auto_mmround.numerics import grids, super_grids
from auto_mmround.numerics.grids import Codes, Grid


class SuperType(NamedTuple):
    """One K type. low, high: bounds of the scale integers; minima lie in 0..high."""

    name: str
    bits: int
    sym: bool
    group: int
    low: int
    high: int
    columns: int = grids.SUPER

    @property
    def grid(self) -> Grid:
        """What a tuner works on."""
        return Grid(self.bits, self.sym, scale_range=(self.low, self.high))


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


def onto(codes: Codes, ggml: SuperType) -> tuple[Codes, float]:
    """The nearest weight on the super-block grid that starts from a plain grid's scales and minima,
    and how far it is: rms, in steps of the plain grid."""
    w_OI, grid = grids.dequantize(codes), ggml.grid
    w_OGg, scale_OG = grids.to_groups(w_OI, ggml.group), codes.scale_OG.float()
    min_OG = torch.zeros_like(scale_OG) if codes.sym else scale_OG * codes.zero_OG
    blocks = super_grids.fit(w_OGg, torch.ones_like(w_OGg[0]), grid, scale_OG, min_OG)
    zero_OG, own_OG = super_grids.zeros(blocks, grid), None if grid.sym else blocks.min_OG
    q_OGg = grids.quantize(
        w_OGg + blocks.min_OG[..., None], 0.0, blocks.scale_OG[..., None], zero_OG[..., None], grid
    )
    fitted = grids.make_codes(
        q_OGg, blocks.scale_OG, zero_OG, w_OI.shape[1], grid, own_OG, blocks.unit_OS2
    )
    moved_OGg = grids.to_groups(grids.dequantize(fitted) - w_OI, ggml.group) / scale_OG[..., None]
    return fitted, float(moved_OGg.square().mean().sqrt())


def pack(codes: Codes, ggml: SuperType) -> Tensor:
    """Blocks as ggml stores them, (out, bytes of a row) uint8.

    Raises ValueError where the image would not be exact: another scheme, or scales and minima that
    are not the units times integers within the type's bounds.
    """
    scheme = (codes.bits, codes.sym, codes.group_size)
    if scheme != (ggml.bits, ggml.sym, ggml.group) or codes.unit_OS2 is None:
        raise ValueError(
            f"{ggml.name} does not hold {codes.bits} bits by {codes.group_size} columns without"
            " units"
        )
    groups = ggml.columns // ggml.group
    d, dmin = codes.unit_OS2.unbind(-1)
    k = _multiples(codes.scale_OG, d, groups, ggml.low, ggml.high)
    m = k * 0 if codes.min_OG is None else _multiples(codes.min_OG, dmin, groups, 0, ggml.high)
    n = codes.q_OI.unflatten(1, (-1, ggml.columns))
    d, dmin = (x.contiguous().unsqueeze(-1).view(torch.uint8) for x in (d, dmin))
    # chunks of 64: the first 32 in low nibbles, the others in high ones
    pairs = n.unflatten(-1, (4, 2, 32))
    # halves of 128, each of four runs that share their bytes
    quarters = n.unflatten(-1, (2, 4, 32))
    if ggml.name == "Q2_K":
        fields = [_bytes(k | m << 4), _layers(quarters & 3, 2).flatten(2), d, dmin]
    elif ggml.name == "Q3_K":
        fields = [
            _layers((quarters >> 2).flatten(2, 3), 1),
            _layers(quarters & 3, 2).flatten(2),
            _six_bits(k + 32),
            d,
        ]
    elif ggml.name == "Q6_K":
        low = quarters & 15
        nibbles = torch.cat(
            [low[..., 0, :] | low[..., 2, :] << 4, low[..., 1, :] | low[..., 3, :] << 4], -1
        )
        fields = [
            nibbles.flatten(2),
            _layers(quarters >> 4, 2).flatten(2),
            k.to(torch.int8).view(torch.uint8),
            d,
        ]
    else:
        high = [_layers((pairs >> 4).flatten(2, 3), 1)] if ggml.bits == 5 else []
        nibbles = (pairs[..., 0, :] & 15 | (pairs[..., 1, :] & 15) << 4).flatten(2)
        fields = [d, dmin, _scales_and_minima(k, m), *high, nibbles]
    return torch.cat(fields, -1).flatten(1).contiguous()


def _multiples(value_OG: Tensor, unit_OS: Tensor, groups: int, low: int, high: int) -> Tensor:
    """(out, S, groups) int16 with value = unit * integer, exactly."""
    unit_OS1 = unit_OS.float()[..., None]
    value_OSJ = value_OG.unflatten(1, (-1, groups))
    whole_OSJ = (value_OSJ / unit_OS1).round()
    if (
        not torch.equal(whole_OSJ * unit_OS1, value_OSJ)
        or whole_OSJ.min() < low
        or whole_OSJ.max() > high
    ):
        raise ValueError(f"scales or minima are no integers from {low} to {high} times their unit")
    return whole_OSJ.to(torch.int16)


def _bytes(x: Tensor) -> Tensor:
    return x.to(torch.uint8)


def _layers(x: Tensor, width: int) -> Tensor:
    """(.., J, l) -> (.., l) bytes: row j in bits width*j and up."""
    shifts = width * torch.arange(x.shape[-2], device=x.device)[:, None]
    return (x.long() << shifts).sum(-2).to(torch.uint8)


def _scales_and_minima(k: Tensor, m: Tensor) -> Tensor:
    """Eight 6-bit scales and eight minima in 12 bytes: four whole each with two bits of the others,
    then the rest."""
    first = [x[..., :4] | x[..., 4:] >> 4 << 6 for x in (k, m)]
    return _bytes(torch.cat([*first, k[..., 4:] & 15 | (m[..., 4:] & 15) << 4], -1))


def _six_bits(k: Tensor) -> Tensor:
    """Sixteen 6-bit scales in 12 bytes: low nibbles of i and i + 8 together, then the high pairs,
    four to a byte."""
    return torch.cat(
        [
            _bytes(k[..., :8] & 15 | (k[..., 8:] & 15) << 4),
            _layers((k >> 4).unflatten(-1, (4, 4)), 2),
        ],
        -1,
    )
