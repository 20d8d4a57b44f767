"""The state of one weight while it is tuned: rounding offsets and range factors (SignRound, arXiv
2309.05516).

The weight itself is the leaf: the module's own parameter holds the quantized values W~, the
backward pass leaves dL/dW~ on it, and `Rounding.step` turns that into signs for the offsets V and
the factors analytically:

    W~ = s * (clamp(round(W/s + V) + z, 0, top) - z),   round() passes gradients straight through
    dW~/dV = s * inside        dW~/ds = (q - z) - inside * W/s        dW~/dz = -s * (1 - inside)

with ``inside`` = 1 where the clamp does nothing, its bounds included. On a float grid round() goes
to the nearest number, z is 0, and a step of V is as long as the numbers there are apart. From
(s, z) the chain goes on to what is tuned: `RangeFactors` as published, or `ScaleFactor` after a
start found in closed form, and of floats.
"""

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from auto_mmround.numerics import gptq, grids, pieces, super_grids
from auto_mmround.numerics.float_grids import FloatGrid
from auto_mmround.numerics.grids import Codes, Grid, Points
from auto_mmround.numerics.super_grids import Super

# Share of the rate of factors for scales that are integers times a unit: their steps are large.
COARSE = 0.5
# Elements of a weight worked on at a time. On a processor they stay in its cache. On an accelerator
# the start of a kernel is dear, and the temporaries are still small beside a block.
CHUNK, CHUNK_THERE = 2**18, 2**22


def leaf_gradients(
    ratio_OGg: Tensor,
    offset_OGg: Tensor,
    scale_OG1: Tensor,
    zero_OG1: Tensor,
    grad_OGg: Tensor,
    grid: Points,
    zeros: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """From dL/dW~ the gradients of a step: dL/dV up to the factor s (O,G,g), whose signs alone
    count, dL/ds (O,G), and with ``zeros`` dL/dz (O,G). Overwrites the ratio W/s. Codes are counted
    from the zero point."""
    code_OGg = grid.snap_(ratio_OGg + offset_OGg)
    value_OGg = grid.held(code_OGg, zero_OG1)
    passed_OGg = grad_OGg * (code_OGg == value_OGg)  # inside, the bounds included
    grad_scale_OG = value_OGg.mul_(grad_OGg).sub_(ratio_OGg.mul_(passed_OGg)).sum(-1)
    if not zeros:
        return passed_OGg, grad_scale_OG, None
    grad_zero_OG = ((passed_OGg.float() - grad_OGg) * scale_OG1).sum(-1)
    return passed_OGg, grad_scale_OG, grad_zero_OG


class Now(NamedTuple):
    """Scales and zero points (out, G), float32 with the values that the file will hold; for
    super-blocks also units and minima."""

    scale_OG: Tensor
    zero_OG: Tensor
    blocks: Super | None = None

    def rows(self, part: slice) -> "Now":
        """Those of some rows, in the same memory."""
        blocks = self.blocks.rows(part) if self.blocks else None
        return Now(self.scale_OG[part], self.zero_OG[part], blocks)

    def ratio(self, w_OGg: Tensor) -> Tensor:
        """W/s, float32; with what super-blocks take off W."""
        if self.blocks:
            w_OGg = w_OGg.float() + self.blocks.min_OG[..., None]
        return (w_OGg / self.scale_OG[..., None]).float()  # of float64 too


def moved(
    w_OGg: Tensor,
    offset_OGg: Tensor,
    now: Now,
    grad_OGg: Tensor,
    turn_OG: Tensor,
    grid: Points,
    zeros: bool,
) -> tuple[Tensor, Tensor | None]:
    """The offsets' part of a step, in place. Returns the gradients of scales and zero points, see
    `leaf_gradients`. turn: the scale's sign times the rate."""
    scale_OG1, zero_OG1 = now.scale_OG[..., None], now.zero_OG[..., None]
    ratio_OGg, far = now.ratio(w_OGg), None
    if isinstance(grid, FloatGrid):
        far = grid.spacing(ratio_OGg + offset_OGg)
    move_OGg, grad_scale_OG, grad_zero_OG = leaf_gradients(
        ratio_OGg, offset_OGg, scale_OG1, zero_OG1, grad_OGg.float(), grid, zeros
    )
    move_OGg.sign_()
    if far is not None:
        move_OGg *= far
    offset_OGg.addcmul_(move_OGg, turn_OG[..., None], value=-1)
    return grad_scale_OG, grad_zero_OG


def quantized(w_OGg: Tensor, offset_OGg: Tensor, now: Now, grid: Points) -> Tensor:
    """W~, float32."""
    code_OGg = grid.held(grid.snap_(now.ratio(w_OGg).add_(offset_OGg)), now.zero_OG[..., None])
    if not isinstance(grid, FloatGrid):
        code_OGg += 0.0  # files of integers hold no negative zero
    made_OGg = code_OGg.mul_(now.scale_OG[..., None])
    return made_OGg.sub_(now.blocks.min_OG[..., None]) if now.blocks else made_OGg


def put(into_OI: Tensor, w_OGg: Tensor, offset_OGg: Tensor, now: Now, grid: Points) -> None:
    """Write W~ into ``into_OI``, in its dtype."""
    into_OI.copy_(grids.from_groups(quantized(w_OGg, offset_OGg, now, grid), into_OI.shape[1]))


class Kernels(NamedTuple):
    """The functions of a step that work on every element of a weight: `moved` and `put`, or the
    same compiled.

    in_pieces: a few rows at a time, so that temporaries stay in a processor's cache. Compiled code
      has none.
    """

    moved: Callable[..., tuple[Tensor, Tensor | None]] = moved
    put: Callable[..., None] = put
    in_pieces: bool = True


PLAIN = Kernels()


class RangeFactors:
    """The published parametrization: factors in [0, 1], start 1, of each group's smallest and
    largest value.

    Symmetric: s = -(side of larger magnitude) / M. Asymmetric: s = (high*fh - low*fl) / top, z =
      round(-low*fl / s).
    """

    def __init__(self, low_OG: Tensor, high_OG: Tensor, grid: Grid):
        self.low_OG, self.high_OG, self.grid = low_OG, high_OG, grid
        self.factors_2OG = torch.ones(2, *low_OG.shape, device=low_OG.device)
        self.zeros = not grid.sym  # whether a step asks for dL/dz

    def rows(self, part: slice) -> "RangeFactors":
        """Those of some rows, in the same memory."""
        view = copy.copy(self)
        view.low_OG = self.low_OG[part]
        view.high_OG = self.high_OG[part]
        view.factors_2OG = self.factors_2OG[:, part]
        return view

    def now(self) -> Now:
        """Scales and zero points of the ranges times their factors."""
        low_OG, high_OG = self.low_OG * self.factors_2OG[0], self.high_OG * self.factors_2OG[1]
        return Now(*grids.scale_and_zero(low_OG, high_OG, self.grid))

    def step(
        self, scale_OG: Tensor, grad_scale_OG: Tensor, grad_zero_OG: Tensor | None, lr: float
    ) -> None:
        """One sign step of the factors from the gradients of scale and zero point (chain rule)."""
        low_factor_OG, high_factor_OG = self.factors_2OG
        if grad_zero_OG is None:
            low_rules_OG = -self.low_OG * low_factor_OG > self.high_OG * high_factor_OG
            none_OG = torch.zeros_like(grad_scale_OG)
            grad_low_OG = torch.where(low_rules_OG, -self.low_OG * grad_scale_OG, none_OG)
            grad_high_OG = torch.where(low_rules_OG, none_OG, -self.high_OG * grad_scale_OG)
        else:
            # A zero point held by its bounds does not move.
            ideal_OG = -self.low_OG * low_factor_OG / scale_OG
            free_OG = (ideal_OG.round() >= self.grid.min_zero) & (ideal_OG.round() <= self.grid.top)
            grad_zero_OG = grad_zero_OG * free_OG
            total_OG = (grad_scale_OG - grad_zero_OG * ideal_OG / scale_OG) / self.grid.top
            grad_low_OG = -self.low_OG * (total_OG + grad_zero_OG / scale_OG)
            grad_high_OG = self.high_OG * total_OG
        self.factors_2OG.sub_(torch.stack([grad_low_OG, grad_high_OG]).sign_(), alpha=lr).clamp_(
            0, 1
        )


class ScaleFactor:
    """A scale found beforehand times a factor, start 1, kept in [0.5, 1.5]; the zero point and
    units stay.

    blocks: super-blocks with that scale; their minima take part in the factor, as zero points do.
    """

    def __init__(
        self, scale_OG: Tensor, zero_OG: Tensor, grid: Points, blocks: Super | None = None
    ):
        self.scale_OG, self.zero_OG, self.grid = scale_OG, zero_OG, grid
        self.blocks = blocks._replace(scale_OG=scale_OG) if blocks else None
        self.factors_2OG = torch.ones(1, *scale_OG.shape, device=scale_OG.device)
        self.zeros = blocks is not None and not grid.sym

    def rows(self, part: slice) -> "ScaleFactor":
        """Those of some rows, in the same memory."""
        view = copy.copy(self)
        view.scale_OG, view.zero_OG = self.scale_OG[part], self.zero_OG[part]
        view.blocks = self.blocks.rows(part) if self.blocks else None
        view.factors_2OG = self.factors_2OG[:, part]
        return view

    def now(self) -> Now:
        """The scales times their factor, as the file can hold them."""
        if self.blocks is None:
            return Now(self.grid.storable(self.scale_OG * self.factors_2OG[0]), self.zero_OG)
        assert isinstance(self.grid, Grid)
        blocks = self.blocks.times(self.factors_2OG[0], self.grid)
        return Now(blocks.scale_OG, self.zero_OG, blocks)

    def step(
        self, scale_OG: Tensor, grad_scale_OG: Tensor, grad_zero_OG: Tensor | None, lr: float
    ) -> None:
        """One sign step: dL/df = s0 * dL/ds, and with a minimum m, which is s times a zero point,
        m0/s * dL/dz more."""
        grad_OG = pieces.over_rows(grad_scale_OG * self.scale_OG, self.grid.rows)
        if self.blocks and grad_zero_OG is not None:
            grad_OG = grad_OG + grad_zero_OG * self.blocks.min_OG / scale_OG
        rate = COARSE if self.blocks else self.grid.factor_rate
        self.factors_2OG[0].sub_(grad_OG.sign_(), alpha=lr * rate).clamp_(0.5, 1.5)


class Kept(NamedTuple):
    """Everything that the result of a `Rounding` depends on: codes, uint8 (out, G, g), and
    factors."""

    q_OGg: Tensor
    factors_2OG: Tensor


class Rounding:
    """Offsets V of one weight, and the factors of its scales and zero points.

    At first V = 0 (float32) and the ranges are those of the weight: rounded to nearest. `start_at`
    sets a better start, with V in float16: offsets are at most a few steps of the grid, and stay
    off the rounding edge. Minima of super-blocks are added to W and taken off W~, so the grid
    between is like any other.
    """

    def __init__(self, w_OI: Tensor, group_size: int, grid: Points):
        self.grid = grid
        self.columns = w_OI.shape[1]
        self.w_OGg = grids.to_groups(w_OI, group_size)
        self.ranges: RangeFactors | ScaleFactor
        # without memory until a step, or a better start, makes others of them
        self.offset_OGg = torch.zeros((), device=w_OI.device).expand(self.w_OGg.shape)
        if not isinstance(grid, Grid):
            self.ranges = ScaleFactor(*grid.plain(self.w_OGg), grid)
        elif grid.scale_range is None:
            self.ranges = RangeFactors(*grids.ranges(self.w_OGg, grid), grid)
        else:
            alike_Gg = torch.ones(self.w_OGg.shape[1:], device=w_OI.device)
            blocks = super_grids.search(self.w_OGg, alike_Gg, grid)
            self.start_at(blocks.scale_OG, super_grids.zeros(blocks, grid), self.offset_OGg, blocks)

    def start_at(
        self, scale_OG: Tensor, zero_OG: Tensor, offset_OGg: Tensor, blocks: Super | None = None
    ) -> None:
        """Begin from scales, zero points and offsets found in closed form. From then on a factor of
        the scale is tuned.

        blocks: super-blocks to which the scales belong.
        """
        self.ranges = ScaleFactor(scale_OG, zero_OG, self.grid, blocks)
        self.offset_OGg = offset_OGg.to(self.grid.offset_dtype)

    def start_from(
        self,
        scale_OG: Tensor,
        zero_OG: Tensor,
        q_OGg: Tensor,
        blocks: Super | None = None,
        margin: float = 0.1,
    ) -> None:
        """`start_at` with offsets that give these codes, see `gptq.place_start`."""
        self.grid = self.grid.started()
        self.ranges = ScaleFactor(scale_OG, zero_OG, self.grid, blocks)
        self.offset_OGg = torch.empty(
            self.w_OGg.shape, dtype=self.grid.offset_dtype, device=q_OGg.device
        )
        self._place(q_OGg, margin)

    def _place(self, q_OGg: Tensor, margin: float = 0.1) -> None:
        now = self.ranges.now()
        margins: float | Tensor = margin
        if not self.grid.factor_rate:
            margins = gptq.margins(margin, self.columns, self.w_OGg)
        for part, view in self._pieces():
            own, q = now.rows(part), self.grid.unpacked(q_OGg[part])
            view.offset_OGg.copy_(
                gptq.place_start(own.ratio(view.w_OGg), q, own.zero_OG, self.grid, margins)
            )

    def scale_and_zero(self) -> tuple[Tensor, Tensor]:
        """Current scale and zero point, each (out, G) float32."""
        return self.ranges.now()[:2]

    def codes(self) -> Codes:
        """The integers, scales and zero points as they go to disk."""
        scale_OG, zero_OG, blocks = self.ranges.now()
        codes = self.grid.codes(self.kept().q_OGg, scale_OG, zero_OG, self.columns)
        if blocks is None:
            return codes
        low_OG = None if self.grid.sym else blocks.min_OG
        return codes._replace(scale_OG=scale_OG, min_OG=low_OG, unit_OS2=blocks.unit_OS2)

    def original(self) -> Tensor:
        """W (out, in), in its own dtype and memory."""
        return grids.from_groups(self.w_OGg, self.columns)

    def weight(self) -> Tensor:
        """W~ (out, in), float32; see `write` for large ones."""
        made_OGg = quantized(self.w_OGg, self.offset_OGg, self.ranges.now(), self.grid)
        return grids.from_groups(made_OGg, self.columns)

    def write(self, into_OI: Tensor, kernels: Kernels = PLAIN) -> None:
        """Put W~ into ``into_OI``, in its dtype."""
        now = self.ranges.now()
        for part, view in self._pieces(kernels.in_pieces):
            kernels.put(into_OI[part], view.w_OGg, view.offset_OGg, now.rows(part), self.grid)

    @torch.no_grad()
    def step(
        self,
        grad_OI: Tensor,
        lr: float,
        factor_lr: float,
        into_OI: Tensor,
        kernels: Kernels = PLAIN,
    ) -> None:
        """One sign step from dL/dW~ (out, in), after which ``into_OI`` holds the new W~ in its own
        dtype. ``factor_lr`` 0 leaves the scales alone."""
        if 0 in self.offset_OGg.stride():
            self.offset_OGg = self.offset_OGg.clone(memory_format=torch.contiguous_format)
        now = self.ranges.now()
        turn_OG = now.scale_OG.sign() * lr
        gradients = [
            kernels.moved(
                view.w_OGg, view.offset_OGg, now.rows(part),
                grids.to_groups(grad_OI[part], self.w_OGg.shape[-1]), turn_OG[part],
                self.grid, self.ranges.zeros,
            )
            for part, view in self._pieces(kernels.in_pieces)
        ]  # fmt: skip
        if factor_lr:
            grad_scale_OG = torch.cat([scale_OG for scale_OG, _ in gradients])
            zeros = [zero_OG for _, zero_OG in gradients if zero_OG is not None]
            grad_zero_OG = torch.cat(zeros) if zeros else None
            self.ranges.step(now.scale_OG, grad_scale_OG, grad_zero_OG, factor_lr)
        self.write(into_OI, kernels)

    def _pieces(self, small: bool = True) -> Iterator[tuple[slice, "Rounding"]]:
        if not small:
            yield slice(None), self
            return
        rows = max(1, (CHUNK if self.w_OGg.is_cpu else CHUNK_THERE) // self.columns)
        rows += -rows % self.grid.rows
        for at in range(0, len(self.w_OGg), rows):
            part = slice(at, at + rows)
            yield part, self.rows(part)

    def rows(self, part: slice) -> "Rounding":
        """The state of some rows, in the same memory."""
        view = copy.copy(self)
        view.w_OGg = self.w_OGg[part]
        view.offset_OGg = self.offset_OGg[part]
        view.ranges = self.ranges.rows(part)
        return view

    def keep(self, into: "Kept", better: Tensor) -> None:
        """Write the state into ``into`` if ``better``, a bool on the device, is true. The host does
        not wait for it."""
        now = self.ranges.now()
        for part, view in self._pieces():
            q_OGg = view._packed(now.rows(part))
            torch.where(better, q_OGg, into.q_OGg[part], out=into.q_OGg[part])
        factors_2OG = self.ranges.factors_2OG
        torch.where(better, factors_2OG, into.factors_2OG, out=into.factors_2OG)

    def kept(self) -> "Kept":
        """A copy of the state as it is now, for `keep` to write into."""
        q_OGg = torch.empty(self.w_OGg.shape, dtype=torch.uint8, device=self.w_OGg.device)
        made = Kept(q_OGg, self.ranges.factors_2OG.clone())
        self.keep(made, torch.ones((), dtype=torch.bool, device=q_OGg.device))
        return made

    def restore(self, kept: "Kept") -> None:
        """Go back to codes and factors that were kept."""
        self.ranges.factors_2OG.copy_(kept.factors_2OG)
        if 0 in self.offset_OGg.stride():
            return  # no step was taken
        self._place(kept.q_OGg)

    def _packed(self, now: Now) -> Tensor:
        zero_OG1, grid = now.zero_OG[..., None], self.grid
        code_OGg = grid.snap_(now.ratio(self.w_OGg).add_(self.offset_OGg))
        return grid.packed(code_OGg.add_(zero_OG1).clamp_(grid.low, grid.top))
