"""Integer grids of 2 to 8 bits, symmetric full-range and asymmetric: pure quantize and dequantize.
And `Points`: the questions of solvers and sign steps to any grid (floats: `float_grids`).

A weight ``w_OI`` (out x in) is cut along ``in`` into groups of ``group_size``; each group has one
scale and one zero point. A stored code ``q`` is unsigned, ``0 .. 2**bits - 1``, and means ``scale *
(q - zero)``. Shape suffixes: O out, I in, G groups a row, g columns a group.
"""

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from auto_mmround.numerics.pieces import by_rows

SUPER = 256  # columns of a super-block
LEAST = {torch.float16: 2.0**-24}  # smallest scale, where all keep numbers below the normal ones
SCALE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


class Codes(NamedTuple):
    """A quantized weight: the integers that go to disk, and what they mean."""

    q_OI: Tensor  # uint8
    scale_OG: Tensor  # float; may be negative
    zero_OG: Tensor  # uint8; symmetric: 2**(bits-1) everywhere
    bits: int
    # the real one: per channel means in_features; 0: one scale for the whole weight (FP8)
    group_size: int
    sym: bool
    # "fp8", "nvfp4", "mxfp4", "mxfp8": q is the number's own bits, see `levels`
    data_type: str = "int"
    global_scale: Tensor | None = None  # NVFP4: float32 (1,), what scales are divided by
    input_scale: Tensor | None = None  # static FP8, NVFP4: float32 (1,), of all inputs
    # super-blocks: float32, taken off every value of the group; None: nothing is
    min_OG: Tensor | None = None
    # super-blocks: float16, what scales and minima are multiples of, see `super_grids`
    unit_OS2: Tensor | None = None


class Points(Protocol):
    """A grid as solvers and sign steps see it: W~ = scale * (code - zero). Codes of integers are 0
    .. top. Codes of floats are the numbers themselves, with zero 0; `packed` gives their bytes.

    middle: zero point of a symmetric grid. rows: number of rows that share a scale. exact_scales:
    the file can hold nearly every real number as a scale. scale_range: see `Grid`. offset_dtype: a
    dtype that keeps offsets off the rounding edge. factor_rate: sign steps multiply the rate of
    factors by it.
    """

    @property
    def low(self) -> float: ...
    @property
    def top(self) -> float: ...
    @property
    def middle(self) -> float: ...
    @property
    def sym(self) -> bool: ...
    @property
    def bits(self) -> int: ...
    @property
    def min_zero(self) -> int: ...
    @property
    def rows(self) -> int: ...
    @property
    def exact_scales(self) -> bool: ...
    @property
    def scale_range(self) -> tuple[int, int] | None: ...
    @property
    def offset_dtype(self) -> torch.dtype: ...
    @property
    def factor_rate(self) -> float: ...

    def started(self) -> "Points":
        """The grid behind a start in closed form, where other factors may be tuned."""

    def snap_(self, x: Tensor) -> Tensor:
        """Round to the nearest point, in place and without bounds; half to even."""
        ...

    def sweep(self, x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        """The nearest point of ``x / scale``. The caller has added `sweep_shift` scales to x."""
        ...

    @property
    def sweep_shift(self) -> float: ...

    def spacing(self, x: Tensor) -> Tensor | float:
        """Distance of the points around x."""
        ...

    def held(self, code: Tensor, zero: Tensor) -> Tensor:
        """Codes counted from the zero point, kept between the smallest and the largest."""
        ...

    def gaps(self, point: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Distances of a point from its neighbours below and above."""
        ...

    def plain(self, w_OGg: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points of round to nearest (out, G), as the file will hold them."""
        ...

    def storable(self, scale_OG: Tensor, unit_OG: Tensor | None = None) -> Tensor:
        """The nearest scales that the file can hold. unit_OG: of super-blocks."""
        ...

    def packed(self, code: Tensor) -> Tensor:
        """Codes as uint8."""
        ...

    def unpacked(self, byte: Tensor) -> Tensor:
        """Codes as numbers."""
        ...

    def fit(self, w_OGg: Tensor) -> "Fit":
        """Whether its scales suffice for a weight."""
        ...

    def codes(self, q_OGg: Tensor, scale_OG: Tensor, zero_OG: Tensor, columns: int) -> Codes:
        """From `packed` codes what goes to disk."""
        ...


class Grid(NamedTuple):
    """The family of integer grids that a weight may use.

    min_zero: smallest zero point that the file can hold. scale_bits: significant bits of a scale,
      None: the dtype's.
    scale_range: bounds of the integers that scales are multiples by, in super-blocks of 256
      columns (`super_grids`).
    """

    bits: int
    sym: bool
    scale_dtype: torch.dtype = torch.float16
    min_zero: int = 0
    scale_bits: int | None = None
    scale_range: tuple[int, int] | None = None

    @property
    def top(self) -> int:
        """Largest stored code."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """Zero point of the symmetric grid."""
        return 2 ** (self.bits - 1)

    @property
    def low(self) -> int:
        """Smallest stored code."""
        return 0

    @property
    def rows(self) -> int:
        """Rows that share a scale."""
        return 1

    @property
    def exact_scales(self) -> bool:
        """Whether every number is nearly a scale."""
        return True

    @property
    def offset_dtype(self) -> torch.dtype:
        return torch.float16

    @property
    def factor_rate(self) -> float:
        """0 from 3 bits on: a factor's step of .02 moves codes that solved for each other, the
        largest of 4 bits by .16, of 8 bits by 2.5. Published ranges do not ask."""
        return 0.0 if self.bits >= 3 and self.scale_range is None else 1.0

    def started(self) -> "Grid":
        return self

    @property
    def sweep_shift(self) -> float:
        """The nearest integer is the floor half a step up."""
        return 0.5

    def snap_(self, x: Tensor) -> Tensor:
        return x.round_()

    def sweep(self, x: Tensor, scale: Tensor, out: Tensor) -> Tensor:
        return torch.div(x, scale, rounding_mode="floor", out=out)

    def spacing(self, x: Tensor) -> float:
        return 1.0

    def held(self, code: Tensor, zero: Tensor) -> Tensor:
        if self.sym:
            return code.clamp(-self.middle, self.top - self.middle)
        return torch.maximum(code, -zero).minimum(self.top - zero)

    def gaps(self, point: Tensor) -> tuple[float, float]:
        return 1.0, 1.0

    def plain(self, w_OGg: Tensor) -> tuple[Tensor, Tensor]:
        return scale_and_zero(*ranges(w_OGg, self), self)

    def storable(self, scale_OG: Tensor, unit_OG: Tensor | None = None) -> Tensor:
        return storable(scale_OG, self, unit_OG)

    def packed(self, code: Tensor) -> Tensor:
        return code.to(torch.uint8)

    def unpacked(self, byte: Tensor) -> Tensor:
        return byte

    def fit(self, w_OGg: Tensor) -> "Fit":
        low_OG, high_OG = ranges(w_OGg, self)
        peak_OG = torch.maximum(-low_OG, high_OG)
        need_OG = peak_OG / self.middle if self.sym else (high_OG - low_OG) / self.top
        return Fit.of(need_OG, *self.bounds)

    def codes(self, q_OGg: Tensor, scale_OG: Tensor, zero_OG: Tensor, columns: int) -> Codes:
        return make_codes(q_OGg, scale_OG, zero_OG, columns, self)

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest magnitude of a scale that the file can hold. Where the product with
        a zero point is stored, the product fits too. For super-blocks these are bounds of a unit,
        though a scale may be many units."""
        facts = torch.finfo(self.scale_dtype)
        low, high = LEAST.get(self.scale_dtype, facts.tiny), facts.max
        return low, (
            high if self.scale_bits is None else 2.0 ** math.floor(math.log2(high / self.top))
        )


def levels(byte: Tensor, bits: int) -> Tensor:
    """The float32 number of every code, uint8, of e4m3 (8 bits) or e2m1 (4: 0, .5, 1, 1.5, 2, 3, 4,
    6, the sign in bit 3). Computed: a table would have to be copied to an accelerator."""
    if bits == 8:
        return byte.view(torch.float8_e4m3fn).float()
    size = (byte & 7).float()
    return torch.where(byte > 7, -1.0, 1.0) * torch.maximum(size / 2, size - 2).maximum(
        2 * size - 8
    )


def dequantize(codes: Codes, dtype: torch.dtype = torch.float32) -> Tensor:
    """``scale * (q - zero) - min``, for floats ``scale * level``, in float32, then as ``dtype``."""
    return by_rows(_decoded, codes, dtype)


def _decoded(codes: Codes, dtype: torch.dtype) -> Tensor:
    scale_OG1, q_OGg = codes.scale_OG.float()[..., None], to_groups(codes.q_OI, codes.group_size)
    if codes.data_type != "int":
        scale_OG1 = scale_OG1 if codes.global_scale is None else scale_OG1 / codes.global_scale
        value_OGg = levels(q_OGg, codes.bits) * scale_OG1
    else:
        value_OGg = (q_OGg.float() - codes.zero_OG.float()[..., None]) * scale_OG1
    least = 0.0 if codes.min_OG is None else codes.min_OG[..., None]
    return from_groups((value_OGg - least).to(dtype), codes.q_OI.shape[1])


def to_groups(w_OI: Tensor, group_size: int) -> Tensor:
    """Cut rows into groups, (out, G, group_size). A short last group is filled with zeros, which
    change no range. A size below 1 means one group a row."""
    group_size = group_size if group_size > 0 else w_OI.shape[1]
    if short := -w_OI.shape[1] % group_size:
        w_OI = torch.nn.functional.pad(w_OI, (0, short))
    return w_OI.reshape(len(w_OI), -1, group_size)


def from_groups(w_OGg: Tensor, columns: int) -> Tensor:
    """Inverse of `to_groups` for a weight of ``columns`` input features; dimensions may lie in
    front."""
    return w_OGg.flatten(-2)[..., :columns]


def ranges(w_OGg: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Smallest (at most 0) and largest (at least 0) value of each group, float32 (out, G).

    Where the file cannot hold a zero point below ``min_zero`` the range is stretched downwards just
    as far as needed.
    """
    low_OG = w_OGg.amin(-1).float().clamp(max=0)
    high_OG = w_OGg.amax(-1).float().clamp(min=0)
    if not grid.sym and grid.min_zero:
        low_OG = torch.minimum(low_OG, -high_OG * grid.min_zero / (grid.top - grid.min_zero))
    return low_OG, high_OG


def scale_and_zero(low_OG: Tensor, high_OG: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point for a range, both float32 but with the values that the file will hold.

    Symmetric, full range: the side of larger magnitude lands on the code 0, so the scale takes the
    sign that puts it there (SignRound's "full range", the idea of GGUF's Q4_0). Asymmetric: the
    range maps onto all codes.
    """
    if grid.sym:
        magnitude_OG = torch.where(-low_OG > high_OG, -low_OG, -high_OG)
        scale_OG = storable(magnitude_OG / grid.middle, grid)
        return scale_OG, torch.full_like(scale_OG, grid.middle)
    scale_OG = storable((high_OG - low_OG) / grid.top, grid)
    return scale_OG, (-low_OG / scale_OG).round().clamp(grid.min_zero, grid.top)


class Fit(NamedTuple):
    """Counts of a weight's groups. groups: all that hold anything but zeros. small, large: those
    that need a smaller, or a larger, scale than there is."""

    groups: int
    small: int
    large: int

    @classmethod
    def of(cls, scale_OG: Tensor, low: float, high: float) -> "Fit":
        """Of the scales needed, 0 for groups of zeros."""
        size_OG = scale_OG.abs()
        few = torch.stack(
            [(size_OG > 0).sum(), ((size_OG > 0) & (size_OG < low)).sum(), (size_OG > high).sum()]
        )
        return cls(*few.tolist())


def integers(ratio_OG: Tensor, grid: Grid) -> Tensor:
    """Scales of a super-block in its unit -> integers that the file can hold, never 0."""
    assert grid.scale_range is not None
    whole_OG = ratio_OG.round().clamp(*grid.scale_range)
    return torch.where(whole_OG == 0, 1.0, whole_OG)


def storable(scale_OG: Tensor, grid: Grid, unit_OG: Tensor | None = None) -> Tensor:
    """Round to what the file can hold, neither zero nor infinite, with its sign; back in float32.

    unit_OG: of super-blocks, whose scales are integers times it.
    """
    if unit_OG is not None:
        return unit_OG * integers(scale_OG / unit_OG, grid)
    if grid.scale_bits is not None:
        mantissa_OG, exponent_OG = torch.frexp(scale_OG.float())
        steps = 2.0**grid.scale_bits
        scale_OG = torch.ldexp((mantissa_OG * steps).round() / steps, exponent_OG)
    low, high = grid.bounds
    scale_OG = scale_OG.float().clamp(-high, high).to(grid.scale_dtype).float()
    return torch.where(scale_OG < 0, scale_OG.clamp(max=-low), scale_OG.clamp(min=low))


def quantize(
    w_OGg: Tensor, offset_OGg: Tensor | float, scale_OG1: Tensor, zero_OG1: Tensor, grid: Points
) -> Tensor:
    """Codes ``clamp(round(w / scale + offset) + zero, low, top)`` as floats, shape of ``w``; half
    rounds to even."""
    ratio_OGg = w_OGg / scale_OG1 + offset_OGg
    return grid.snap_(ratio_OGg).add(zero_OG1).clamp(grid.low, grid.top)


def make_codes(
    q_OGg: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    columns: int,
    grid: Grid,
    min_OG: Tensor | None = None,
    unit_OS2: Tensor | None = None,
) -> Codes:
    """Pack float codes, scales and zeros of `quantize` into `Codes`; the others are of
    super-blocks."""
    return Codes(
        q_OI=from_groups(q_OGg, columns).to(torch.uint8).contiguous(),
        scale_OG=scale_OG.to(grid.scale_dtype if unit_OS2 is None else torch.float32),
        zero_OG=zero_OG.to(torch.uint8),
        bits=grid.bits,
        group_size=min(q_OGg.shape[-1], columns),
        sym=grid.sym,
        min_OG=min_OG,
        unit_OS2=unit_OS2,
    )
