"""Float grids: FP8 and MXFP8 (e4m3), NVFP4 and MXFP4 (e2m1). Codes are the numbers themselves, zero
points are 0, and the distance of the points grows with the numbers.

Scales: FP8 has ``max|w| / 448`` in float32, for a row or a 128 x 128 block. MX has a power of two
for 32 columns: the one that puts the largest magnitude into the last binade of e2m1 or e4m3 (OCP MX
v1.0); from 1.75 of that binade on the next one. NVFP4 has e4m3 for 16 columns, divided by one
float32 for the whole weight, ``448 * 6 / max|w|``. Round to nearest and every search begin there.
Suffixes as in `grids`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from auto_mmround.numerics.grids import Codes, Fit, from_groups, levels
from auto_mmround.numerics.pieces import fold_rows, spread_rows

E4M3_TOP, E2M1_TOP = 448.0, 6.0
BLOCK = 128  # rows and columns of an FP8 block
MX_BINADES = {"mxfp4": 2, "mxfp8": 8}
TINY, HUGE = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max
NVFP4_LEAST = 2.0**-9  # smallest e4m3
EXPONENT = 0x7F800000  # of a float32, as bits


class FloatGrid(NamedTuple):
    """The `grids.Points` of a float grid.

    rows: number of rows that share a scale. whole: the divisor of NVFP4's scales; a tensor for
    inputs, so that the host need not wait. fixed: the only scale of FP8 by tensor. how: a row of
    HOW, for inputs only. solved: see `started`.
    """

    data_type: str
    rows: int = 1
    whole: float | Tensor = 1.0
    fixed: float | None = None
    how: str = "compressed_tensors"
    solved: bool = False

    @property
    def bits(self) -> int:
        """Of a number."""
        return 8 if self.data_type in ("fp8", "mxfp8") else 4

    @property
    def top(self) -> float:
        """Largest number."""
        return E4M3_TOP if self.bits == 8 else E2M1_TOP

    @property
    def low(self) -> float:
        """Smallest number."""
        return -self.top

    @property
    def middle(self) -> float:
        """There are no zero points."""
        return 0

    @property
    def min_zero(self) -> int:
        """There are no zero points."""
        return 0

    @property
    def sym(self) -> bool:
        """There are no zero points."""
        return True

    @property
    def scale_range(self) -> None:
        """There are no super-blocks."""
        return None

    @property
    def exact_scales(self) -> bool:
        """Only FP8's are float32."""
        return self.data_type == "fp8" and self.fixed is None

    @property
    def offset_dtype(self) -> torch.dtype:
        """A weight may come to lie hundreds of the smallest steps of e4m3 away."""
        return torch.float16 if self.bits == 4 else torch.float32

    @property
    def factor_rate(self) -> float:
        """0 for MX: its next scale is twice as large, too far for a sign step. 0 for all behind a
        solve, see `started`."""
        rates = {"fp8": 1.0, "nvfp4": 0.5} if self.fixed is None and not self.solved else {}
        return rates.get(self.data_type, 0.0)

    def started(self) -> "FloatGrid":
        """Scales stay: a factor's step of .02 moves all codes of a group that were solved for each
        other, and the KL is lower without."""
        return self._replace(solved=True)

    @property
    def sweep_shift(self) -> float:
        """Rounded as they are."""
        return 0.0

    @property
    def _mantissa(self) -> tuple[float, float]:
        """A step as a share of the power of two below a number, and the smallest step."""
        return (2.0**-3, 2.0**-9) if self.bits == 8 else (2.0**-1, 2.0**-1)

    def spacing(self, x: Tensor) -> Tensor:
        """See `Points`; x float32."""
        share, least = self._mantissa
        power = (x.view(torch.int32) & EXPONENT).view(torch.float32)
        return power.mul_(share).clamp_(min=least)

    def held(self, code: Tensor, zero: Tensor) -> Tensor:
        return code.clamp(self.low, self.top)

    def gaps(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """See `Points`: towards zero a power of two has a neighbour that is nearer."""
        inner, outer = self.spacing(point * (1 - 2.0**-4)), self.spacing(point)
        negative = point < 0
        return torch.where(negative, outer, inner), torch.where(negative, inner, outer)

    def snap_(self, x: Tensor) -> Tensor:
        step = self.spacing(x)
        return x.div_(step).round_().mul_(step)

    def sweep(self, x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        return self.snap_(torch.div(x, scale, out=out))

    def plain(self, w_OGg: Tensor) -> tuple[Tensor, Tensor]:
        peak_OG = w_OGg.abs().amax(-1).float()
        if self.fixed is not None:
            return torch.full_like(peak_OG, self.fixed), torch.full_like(peak_OG, -0.0)
        if self.rows > 1:
            blocks_BG = fold_rows(peak_OG, self.rows).amax(1)
            peak_OG = spread_rows(blocks_BG, self.rows, len(peak_OG))
        if self.data_type in MX_BINADES:
            scale_OG = mx_scale(peak_OG, MX_BINADES[self.data_type], self.how)
        elif self.data_type == "nvfp4":
            scale_OG = levels(to_e4m3(peak_OG / E2M1_TOP * self.whole), 8)
            eps = torch.finfo(torch.float8_e4m3fn).eps
            scale_OG = self._divided(torch.where(scale_OG == 0, eps, scale_OG))
        else:
            scale_OG = torch.where(
                peak_OG > 0, (peak_OG / E4M3_TOP).clamp(min=TINY), torch.finfo(torch.float32).eps
            )
        return scale_OG, torch.full_like(scale_OG, -0.0)  # which keeps the sign of a zero

    def storable(self, scale_OG: Tensor, unit_OG: Tensor | None = None) -> Tensor:
        """See `Points`. Positive always."""
        if self.fixed is not None:
            return torch.full_like(scale_OG, self.fixed)
        if self.data_type == "nvfp4":
            return self._divided(self._e4m3_scale(scale_OG))
        if self.data_type == "fp8":
            return scale_OG.clamp(TINY, HUGE)
        mantissa_OG, exponent_OG = torch.frexp(scale_OG.clamp(2.0**-127, 2.0**127))
        up_OG = (mantissa_OG >= 0.75).int()  # the arithmetic middle of two powers
        return torch.ldexp(torch.ones_like(scale_OG), (exponent_OG - 1 + up_OG).clamp(max=127))

    def _e4m3_scale(self, scale_OG: Tensor) -> Tensor:
        """The scale as NVFP4's file holds it."""
        return levels(to_e4m3((scale_OG * self.whole).clamp(min=NVFP4_LEAST)), 8)

    def _divided(self, scale_OG: Tensor) -> Tensor:
        """The scale as `grids.dequantize` uses it. The divisor is a tensor, since accelerators turn
        division by a number into a product with its reciprocal."""
        whole = self.whole
        return scale_OG / (whole if isinstance(whole, Tensor) else scale_OG.new_full((), whole))

    def packed(self, code: Tensor) -> Tensor:
        """See `Points`: e4m3's bytes; e2m1 in 4 bits, the sign in bit 3."""
        if self.bits == 8:
            return code.to(torch.float8_e4m3fn).view(torch.uint8)
        size = code.abs()
        number = torch.minimum(2 * size, size + 2).minimum(size / 2 + 4)  # see `levels`
        return (number + 8 * code.signbit()).to(torch.uint8)

    def unpacked(self, byte: Tensor) -> Tensor:
        return levels(byte, self.bits)

    def fit(self, w_OGg: Tensor) -> Fit:
        peak_OG = w_OGg.abs().amax(-1).float()
        if self.data_type != "nvfp4":  # float32, or all its powers of two
            return Fit.of(peak_OG, TINY, torch.inf)
        # none is too large: whole is such that the largest is 448, but for float32's last bit
        return Fit.of(peak_OG / E2M1_TOP * self.whole, NVFP4_LEAST, torch.inf)

    def codes(self, q_OGg: Tensor, scale_OG: Tensor, zero_OG: Tensor, columns: int) -> Codes:
        whole = None
        if self.data_type == "nvfp4":
            scale_OG = self._e4m3_scale(scale_OG)
            whole = torch.as_tensor(self.whole, dtype=torch.float32, device=q_OGg.device).reshape(1)
        q_OI, zero_OG = from_groups(q_OGg, columns).contiguous(), zero_OG.to(torch.uint8)
        group = min(q_OGg.shape[-1], columns) if self.fixed is None else 0
        return Codes(q_OI, scale_OG, zero_OG, self.bits, group, True, self.data_type, whole)


def float_grid(data_type: str, group_size: int, peak: Tensor | None = None) -> FloatGrid:
    """The grid of a weight. peak: for NVFP4 and FP8 by tensor, the largest magnitude of the weight
    and of those that engines fuse with it: they share the scale for the whole weight."""
    rows = BLOCK if group_size == BLOCK else 1
    if data_type != "nvfp4" and group_size != 0:
        return FloatGrid(data_type, rows)
    if peak is None:
        raise ValueError(f"{data_type} has a scale for the whole weight: a magnitude is needed")
    if data_type == "nvfp4":
        return FloatGrid(data_type, rows, nvfp4_global(peak.float()).item())
    return FloatGrid(data_type, fixed=(peak.float() / E4M3_TOP).clamp(min=TINY).item())


def nearest(x_OGg: Tensor, grid: FloatGrid) -> Tensor:
    """Groups of numbers rounded to nearest, float32, as engines do with inputs."""
    if grid.data_type == "nvfp4" and grid.how == "auto_round":
        return _by_reciprocals(x_OGg, grid)
    scale_OG1 = grid.plain(x_OGg)[0][..., None]
    code_OGg = grid.snap_(x_OGg.float() / scale_OG1).clamp_(grid.low, grid.top)
    return code_OGg.mul_(scale_OG1)


def _by_reciprocals(x_OGg: Tensor, grid: FloatGrid) -> Tensor:
    """NVFP4 as AutoRound's loader computes it: ties fall otherwise than by division."""
    whole = torch.as_tensor(grid.whole, dtype=torch.float32, device=x_OGg.device)
    peak_OG1 = x_OGg.abs().amax(-1, keepdim=True).float()
    scale_OG1 = levels(to_e4m3(whole * (peak_OG1 * (1 / E2M1_TOP))), 8)
    factor_OG1 = _reciprocal(scale_OG1 * _reciprocal(whole))
    code_OGg = grid.snap_(x_OGg.float() * factor_OG1).clamp_(grid.low, grid.top)
    return code_OGg.mul_(_reciprocal(factor_OG1))


def _reciprocal(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1.0 / x)


def to_e4m3(x: Tensor) -> Tensor:
    """The nearest e4m3 numbers as their bytes, uint8. Half rounds to even; numbers beyond 448
    become 448."""
    return x.clamp(-E4M3_TOP, E4M3_TOP).to(torch.float8_e4m3fn).view(torch.uint8)


def mx_scale(peak_OG: Tensor, binade: int, how: str = "compressed_tensors") -> Tensor:
    """Powers of two, float32, for groups with these largest magnitudes; binade: exponent of the
    grid's last one. how: a row of HOW."""
    exponent_OG = HOW[how](peak_OG.float(), binade)
    exponent_OG = torch.where(peak_OG > 0, exponent_OG, -127).int().clamp(-127, 127)
    return torch.ldexp(torch.ones(peak_OG.shape, device=peak_OG.device), exponent_OG)


def _nearly_rounded(peak: Tensor, binade: int) -> Tensor:
    mantissa, exponent = torch.frexp(peak)  # mantissa in [0.5, 1)
    # from 1.75 on e2m1 would round to 8 quarters
    return exponent - 1 + (mantissa >= 0.875) - binade


# Reader that rounds inputs -> exponent of an MX scale, in that reader's order of operations.
# AutoRound clips numbers above the last one; with "rceil" in its name no number lies above.
HOW: dict[str, Callable[[Tensor, int], Tensor]] = {
    "compressed_tensors": _nearly_rounded,
    "auto_round": lambda peak, binade: peak.log2().floor() - binade,
    "auto_round_rceil": lambda peak, binade: (
        (peak / (E2M1_TOP if binade == 2 else E4M3_TOP)).log2().ceil()
    ),
}


def nvfp4_global(peak: Tensor) -> Tensor:
    """The float32 that NVFP4's scales are divided by, for this largest magnitude of the weight; 1
    for a zero."""
    most = 2.0**120  # so that it can be divided by
    return torch.where(peak > 0, (E4M3_TOP * E2M1_TOP / peak.clamp(min=TINY)).clamp(max=most), 1.0)
