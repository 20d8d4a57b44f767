"""Float grids, rounded to nearest: FP8 and MXFP8 (e4m3), NVFP4 and MXFP4 (e2m1). No tuning: there
is no zero point to place and no offset to learn here.

Scales: FP8 ``max|w| / 448`` in float32, a row or a 128 x 128 block. MX: a power of two for 32
columns, the one that puts the largest magnitude into the last binade of e2m1 or e4m3 (OCP MX v1.0),
moved up from 1.75 of it on. NVFP4: e4m3 for 16 columns, divided by one float32 for the whole
weight, ``448 * 6 / max|w|``. Suffixes as in `grids`.
"""

import torch
from torch import Tensor

from auto_mmround.numerics.grids import Codes, Fit, dequantize, from_groups, levels, to_groups

E4M3_TOP, E2M1_TOP = 448.0, 6.0
BLOCK = 128  # rows and columns of an FP8 block
MX_BINADES = {"mxfp4": 2, "mxfp8": 8}
TINY = torch.finfo(torch.float32).tiny
NVFP4_LEAST = 2.0**-9  # smallest e4m3


def to_e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3 numbers as their bytes, uint8; half rounds to even, beyond 448 stays at
    448."""
    return x.clamp(-E4M3_TOP, E4M3_TOP).to(torch.float8_e4m3fn).view(torch.uint8)


def to_e2m1(x: Tensor) -> Tensor:
    """The nearest e2m1 numbers as 4-bit codes, uint8, sign in bit 3; half rounds to even, beyond 6
    stays at 6."""
    grid = levels("e2m1")[:8].to(x.device)
    middles = (grid[1:] + grid[:-1]) / 2
    index = torch.bucketize(x.abs(), middles)
    tie = (index % 2 == 1) & (x.abs() == middles[index.clamp(max=6)])
    return (index + tie + 8 * (x < 0)).to(torch.uint8)


def mx_scale(peak_OG: Tensor, binade: int) -> Tensor:
    """Powers of two, float32, for groups with these largest magnitudes; binade: exponent of the
    grid's last one."""
    mantissa_OG, exponent_OG = torch.frexp(peak_OG.float())  # mantissa in [0.5, 1)
    # from 1.75 on e2m1 would round to 8 quarters
    exponent_OG = exponent_OG - 1 + (mantissa_OG >= 0.875) - binade
    return torch.ldexp(
        torch.ones_like(mantissa_OG), torch.where(peak_OG > 0, exponent_OG, -127).clamp(-127, 127)
    )


def nvfp4_global(peak: Tensor) -> Tensor:
    """The float32 that NVFP4's scales are divided by, for this largest magnitude of the weight; 1
    for a zero."""
    most = 2.0**120  # so that it can be divided by
    return torch.where(peak > 0, (E4M3_TOP * E2M1_TOP / peak.clamp(min=TINY)).clamp(max=most), 1.0)


def fit(w_OGg: Tensor, data_type: str, peak: Tensor | None = None) -> Fit:
    """Whether the scales of a float grid suffice for a weight; peak: see `Nearest`."""
    peak_OG = w_OGg.abs().amax(-1).float()
    if data_type != "nvfp4":  # float32, or all its powers of two
        return Fit.of(peak_OG, TINY, torch.inf)
    whole = peak_OG.max() if peak is None else peak.float()
    return Fit.of(peak_OG / E2M1_TOP * nvfp4_global(whole), NVFP4_LEAST, E4M3_TOP)


class Nearest:
    """A weight on its nearest points; the same face as `rounding.Rounding` has where nothing is
    tuned.

    peak: largest magnitude that NVFP4's scale for the whole weight is for; engines that fuse
      weights want one for all.
    input_scale: (1,), of static activations.
    """

    def __init__(
        self,
        w_OI: Tensor,
        data_type: str,
        group_size: int,
        peak: Tensor | None = None,
        input_scale: Tensor | None = None,
    ):
        self._w_OI, self.columns = w_OI, w_OI.shape[1]
        columns = self.columns
        group = columns if group_size == -1 else group_size
        w_OGg = to_groups(w_OI.float(), group)
        peak_OG, global_scale = w_OGg.abs().amax(-1), None
        if data_type in MX_BINADES:
            scale_OG = mx_scale(peak_OG, MX_BINADES[data_type])
        elif data_type == "nvfp4":
            whole = (peak_OG.max() if peak is None else peak).float()
            global_scale = nvfp4_global(whole).reshape(1)
            scale_OG = levels("e4m3").to(w_OI.device)[
                to_e4m3(peak_OG / E2M1_TOP * global_scale).long()
            ]
            scale_OG = torch.where(scale_OG == 0, torch.finfo(torch.float8_e4m3fn).eps, scale_OG)
        else:
            if group_size == BLOCK:
                peak_OG = _rows_of_blocks(peak_OG)
            scale_OG = torch.where(
                peak_OG > 0, (peak_OG / E4M3_TOP).clamp(min=TINY), torch.finfo(torch.float32).eps
            )
        step_OG = scale_OG if global_scale is None else scale_OG / global_scale
        bits = 8 if data_type in ("fp8", "mxfp8") else 4
        encode = to_e4m3 if bits == 8 else to_e2m1
        q_OI = from_groups(encode(w_OGg / step_OG[..., None]), columns).contiguous()
        zero_OG = torch.zeros_like(scale_OG, dtype=torch.uint8)
        self._codes = Codes(
            q_OI, scale_OG, zero_OG, bits, group, True, data_type, global_scale, input_scale
        )

    def codes(self) -> Codes:
        """What goes to disk."""
        return self._codes

    def original(self) -> Tensor:
        """W (out, in), as it was given."""
        return self._w_OI

    def weight(self) -> Tensor:
        """W~, float32 (out, in)."""
        return dequantize(self._codes)

    def write(self, into_OI: Tensor) -> None:
        """Put W~ into ``into_OI``, in its dtype."""
        into_OI.copy_(self.weight())


def _rows_of_blocks(peak_OG: Tensor, rows: int = BLOCK) -> Tensor:
    """The largest magnitude of each block of rows, repeated for its rows."""
    blocks = (
        torch.nn.functional.pad(peak_OG, (0, 0, 0, -peak_OG.shape[0] % rows))
        .unflatten(0, (-1, rows))
        .amax(1)
    )
    return blocks.repeat_interleave(rows, 0)[: peak_OG.shape[0]]
