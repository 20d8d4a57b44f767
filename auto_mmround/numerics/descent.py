"""Rounds behind the solve: some groups at a time, codes are rounded once more on the errors of all
others, and scales are fitted to them.

Shapes: N weights, O out, I in, G groups a row, W columns of some groups.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from auto_mmround.numerics import gptq
from auto_mmround.numerics.grids import Points
from auto_mmround.numerics.moments import Hessian, hessian_diagonal, hessian_rows

WIDTH = 256  # columns at a time: one product tells how all others answer for their errors


class Span(NamedTuple):
    """Some columns of a round. error and u, the codes less their zero points, are written.

    target: the weights plus the answers for all errors as they were. slope: half of the loss's
    slope in the errors, over H_kk. among: the answers that these columns have for each other. own:
    their H_kk."""

    w_NWO: Tensor
    target_NWO: Tensor
    slope_NWO: Tensor
    among_NWW: Tensor
    own_NW: Tensor
    scale_NWO: Tensor
    zero_NWO: Tensor
    error_NWO: Tensor
    u_NWO: Tensor

    def change(self, moved_NWO: Tensor) -> Tensor:
        """The change of the slope where these errors have moved."""
        return torch.baddbmm(moved_NWO, self.among_NWW, moved_NWO)


class Descent:
    """Rounds under the second moments (N, I, I) of N weights of one shape, or (I, I) of one.

    width: columns at a time. rounded: rounds them, see `in_turn`, and returns the change of their
    slope. fits: whether scales are fitted; those of groups wider than ``width`` are not.
    """

    def __init__(
        self,
        hessian: Hessian,
        group_size: int,
        grid: Points,
        how: gptq.Solving,
        width: int,
        rounded: Callable[[Span], Tensor],
    ):
        self._hessian, self._group_size, self._grid = hessian, group_size, grid
        self._damp_N1 = how.dampening * hessian_diagonal(hessian).mean(-1).reshape(-1, 1)
        self.fits = group_size <= width
        self._wide = width // group_size * group_size if self.fits else width
        self._rounded = rounded

    def __call__(
        self,
        w_OI: Tensor,
        q_OI: Tensor,
        scale_OG: Tensor,
        zero_OG: Tensor,
        unit_OG: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Codes (N * out, in) as floats, and scales (N * out, G), after one more round.

        While all else stays, the best value of column k is w_k + sum_{j != k} E_j H_jk / H_kk, and
        the best scale is that of `gptq.refit_scale`. So tr(E H E^T) of the damped H never grows:
        descent by coordinates, as in CDQuant (arXiv 2406.17542). unit_OG: scales are integers
        times these.
        """
        size, width = self._group_size, w_OI.shape[1]
        w_NIO, scale_NGO, zero_NGO = map(self._columns, (w_OI, scale_OG, zero_OG))
        unit_NGO = None if unit_OG is None else self._columns(unit_OG)
        group_I = torch.arange(width, device=w_OI.device) // size
        u_NIO = self._columns(q_OI).sub_(zero_NGO.index_select(1, group_I))
        error_NIO = torch.addcmul(w_NIO, scale_NGO.index_select(1, group_I), u_NIO, value=-1)
        for first in range(0, width, self._wide):
            part = slice(first, min(first + self._wide, width))
            answers_NWI, own_NW = _answers(self._hessian, part, self._damp_N1)
            target_NWO = torch.baddbmm(w_NIO[:, part], answers_NWI, error_NIO)
            slope_NWO = (target_NWO - w_NIO[:, part]).add_(error_NIO[:, part])
            scale_NWO, zero_NWO = (
                table_NGO.index_select(1, group_I[part]) for table_NGO in (scale_NGO, zero_NGO)
            )
            span = Span(
                w_NIO[:, part], target_NWO, slope_NWO, answers_NWI[:, :, part].contiguous(), own_NW,
                scale_NWO, zero_NWO, error_NIO[:, part], u_NIO[:, part],
            )  # fmt: skip
            slope_NWO += self._rounded(span)
            if self.fits:
                groups = slice(first // size, -(-part.stop // size))
                unit = None if unit_NGO is None else unit_NGO[:, groups]
                self._refit(span, scale_NGO[:, groups], unit)
        q_OI = u_NIO.add_(zero_NGO.index_select(1, group_I)).mT.flatten(0, 1)
        return q_OI, scale_NGO.mT.flatten(0, 1)

    def _columns(self, x_OI: Tensor) -> Tensor:
        """A copy (N, in, out), in float32."""
        x_NIO = x_OI.unflatten(0, (len(self._damp_N1), -1)).mT
        return x_NIO.to(torch.float32, memory_format=torch.contiguous_format, copy=True)

    def _refit(self, span: Span, scale_NGO: Tensor, unit_NGO: Tensor | None) -> None:
        """Write the scales that fit the codes best, group after group."""
        own_NW1 = span.own_NW[..., None]
        hessian_NWW, along_NWO = span.among_NWW * own_NW1, span.slope_NWO * own_NW1
        hessian_NWW.diagonal(dim1=1, dim2=2).copy_(span.own_NW)
        for group, scale_NO in enumerate(scale_NGO.unbind(1)):
            part = slice(group * self._group_size, (group + 1) * self._group_size)
            u_NgO, behind = span.u_NWO[:, part], slice(part.stop, None)
            length_NO = (hessian_NWW[:, part, part] @ u_NgO).mul_(u_NgO).sum(1)
            along_NO = (along_NWO[:, part] * u_NgO).sum(1)
            unit_NO = None if unit_NGO is None else unit_NGO[:, group]
            scale_NO.copy_(gptq.fitted(scale_NO, along_NO, length_NO, self._grid, unit_NO))
            now_NgO = torch.addcmul(span.w_NWO[:, part], scale_NO[:, None], u_NgO, value=-1)
            if part.stop < along_NWO.shape[1]:
                moved_NgO = now_NgO - span.error_NWO[:, part]
                along_NWO[:, behind].baddbmm_(hessian_NWW[:, behind, part], moved_NgO)
            span.error_NWO[:, part] = now_NgO


def _answers(hessian: Hessian, part: slice, damp_N1: Tensor) -> tuple[Tensor, Tensor]:
    """H_kj / H_kk (N, W, in), 0 for j = k: how the columns of a part answer for the error of column
    j. And H_kk (N, W), damped. A column without second moments answers for nothing."""
    answers_WI = hessian_rows(hessian, part).clone()
    answers_NWI = answers_WI.view(len(damp_N1), *answers_WI.shape[-2:])
    own_NWW = answers_NWI[:, :, part]
    own_NW = (own_NWW.diagonal(dim1=1, dim2=2) + damp_N1).clamp(min=1e-30)
    answers_NWI /= own_NW[..., None]
    own_NWW.diagonal(dim1=1, dim2=2).zero_()
    return answers_NWI.nan_to_num_(0.0, 0.0, 0.0), own_NW


def in_turn(span: Span, grid: Points, block: int) -> Tensor:
    """Round columns of one weight in turn, ``block`` at a time."""
    (w_WO, target_WO, _, among_WW, _, scale_WO, zero_WO, error_WO, u_WO) = (x[0] for x in span)
    before_WO, earlier_WW = error_WO.clone(), among_WW.tril()
    target_WO.addmm_(earlier_WW, before_WO, alpha=-1)
    low_WO, high_WO = grid.low - zero_WO, grid.top - zero_WO
    for first in range(0, len(w_WO), block):
        part = slice(first, first + block)
        target_WO[part].addmm_(earlier_WW[part, :first], error_WO[:first])
        gptq.round_in_turn(
            target_WO[part], w_WO[part], earlier_WW[part, part],
            (scale_WO[part], low_WO[part], high_WO[part]), grid, error_WO[part], u_WO[part],
        )  # fmt: skip
    return span.change((error_WO - before_WO)[None])
