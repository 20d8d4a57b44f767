"""The state of one weight while it is tuned: rounding offsets and range factors (SignRound, arXiv 2309.05516).

The weight itself is the leaf: the module's own parameter holds the quantized values W~, the backward pass leaves
dL/dW~ on it, and `Rounding.step` turns that into signs for the offsets V and the factors analytically:

    W~ = s * (clamp(round(W/s + V) + z, 0, top) - z),   round() passes gradients straight through
    dW~/dV = s * inside        dW~/ds = (q - z) - inside * W/s        dW~/dz = -s * (1 - inside)

with ``inside`` = 1 where the clamp does nothing. The chain from (s, z) to the factors is in `_factor_gradients`.
"""

import torch
from torch import Tensor

from auto_mmround.numerics import grids
from auto_mmround.numerics.grids import Codes, Grid


def range_gradients(
    w_OGg: Tensor, offset_OGg: Tensor, scale_OG1: Tensor, zero_OG1: Tensor, grad_OGg: Tensor, top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the loss for (offset, scale, zero), given dL/dW~; shapes (O,G,g), (O,G), (O,G)."""
    ratio_OGg = w_OGg / scale_OG1
    code_OGg = (ratio_OGg + offset_OGg).round() + zero_OG1
    inside_OGg = (code_OGg >= 0) & (code_OGg <= top)
    value_OGg = code_OGg.clamp(0, top) - zero_OG1
    passed_OGg = grad_OGg * inside_OGg
    grad_scale_OG = (grad_OGg * value_OGg - passed_OGg * ratio_OGg).sum(-1)
    grad_zero_OG = ((passed_OGg - grad_OGg) * scale_OG1).sum(-1)
    return passed_OGg * scale_OG1, grad_scale_OG, grad_zero_OG


class Rounding:
    """Offsets V (float32, start 0) and factors of the smallest and largest value (start 1) of one weight.

    With V = 0 and factors 1 the weight is rounded to nearest. Factors stay in [0, 1]; V is never clamped.
    """

    def __init__(self, w_OI: Tensor, group_size: int, grid: Grid):
        self.grid = grid
        self.columns = w_OI.shape[1]
        self.w_OGg = grids.to_groups(w_OI, self.columns if group_size == -1 else group_size)
        self.low_OG, self.high_OG = grids.ranges(self.w_OGg, grid)
        self.offset_OGg = torch.zeros_like(self.w_OGg, dtype=torch.float32)
        self.low_factor_OG = torch.ones_like(self.low_OG)
        self.high_factor_OG = torch.ones_like(self.high_OG)

    def scale_and_zero(self) -> tuple[Tensor, Tensor]:
        """Current scale and zero point, each (out, G) float32."""
        return grids.scale_and_zero(self.low_OG * self.low_factor_OG, self.high_OG * self.high_factor_OG, self.grid)

    def codes(self) -> Codes:
        """The integers, scales and zero points as they go to disk."""
        scale_OG, zero_OG = self.scale_and_zero()
        q_OGg = self._quantize(scale_OG, zero_OG)
        return grids.make_codes(q_OGg, scale_OG, zero_OG, self.columns, self.grid)

    def weight(self) -> Tensor:
        """W~ (out, in), float32."""
        scale_OG, zero_OG = self.scale_and_zero()
        w_OGg = (self._quantize(scale_OG, zero_OG) - zero_OG[..., None]) * scale_OG[..., None]
        return grids.from_groups(w_OGg, self.columns)

    def step(self, grad_OI: Tensor, lr: float, factor_lr: float) -> None:
        """One sign step from dL/dW~ (out, in); ``factor_lr`` 0 leaves the ranges alone."""
        scale_OG, zero_OG = self.scale_and_zero()
        grad_OGg = grids.to_groups(grad_OI.float(), self.w_OGg.shape[-1])
        grad_offset_OGg, grad_scale_OG, grad_zero_OG = range_gradients(
            self.w_OGg.float(), self.offset_OGg, scale_OG[..., None], zero_OG[..., None], grad_OGg, self.grid.top
        )
        self.offset_OGg.sub_(grad_offset_OGg.sign_(), alpha=lr)
        if factor_lr:
            grad_low_OG, grad_high_OG = self._factor_gradients(scale_OG, zero_OG, grad_scale_OG, grad_zero_OG)
            self.low_factor_OG.sub_(grad_low_OG.sign_(), alpha=factor_lr).clamp_(0, 1)
            self.high_factor_OG.sub_(grad_high_OG.sign_(), alpha=factor_lr).clamp_(0, 1)

    def snapshot(self) -> tuple[Tensor, Tensor, Tensor]:
        """A copy of everything that steps change."""
        return self.offset_OGg.clone(), self.low_factor_OG.clone(), self.high_factor_OG.clone()

    def restore(self, snapshot: tuple[Tensor, Tensor, Tensor]) -> None:
        """Go back to a `snapshot`."""
        self.offset_OGg, self.low_factor_OG, self.high_factor_OG = (t.clone() for t in snapshot)

    def _quantize(self, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        return grids.quantize(
            self.w_OGg.float(), self.offset_OGg, scale_OG[..., None], zero_OG[..., None], self.grid.top
        )

    def _factor_gradients(
        self, scale_OG: Tensor, zero_OG: Tensor, grad_scale_OG: Tensor, grad_zero_OG: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Chain rule from (scale, zero) to the factors of the smallest and the largest value.

        Symmetric: s = -(side of larger magnitude) / M, so only that side's factor has a gradient.
        Asymmetric: s = (high*fh - low*fl) / top and z = round(-low*fl / s), straight through.
        """
        if self.grid.sym:
            low_rules_OG = -self.low_OG * self.low_factor_OG > self.high_OG * self.high_factor_OG
            zero = torch.zeros_like(grad_scale_OG)
            grad_low_OG = torch.where(low_rules_OG, -self.low_OG / self.grid.middle * grad_scale_OG, zero)
            return grad_low_OG, torch.where(low_rules_OG, zero, -self.high_OG / self.grid.middle * grad_scale_OG)
        # A zero point held by its bounds does not move.
        ideal_OG = -self.low_OG * self.low_factor_OG / scale_OG
        free_OG = (ideal_OG.round() >= self.grid.min_zero) & (ideal_OG.round() <= self.grid.top)
        grad_zero_OG = grad_zero_OG * free_OG
        total_OG = grad_scale_OG - grad_zero_OG * ideal_OG / scale_OG
        grad_low_OG = -self.low_OG / self.grid.top * total_OG - grad_zero_OG * self.low_OG / scale_OG
        return grad_low_OG, self.high_OG / self.grid.top * total_OG
