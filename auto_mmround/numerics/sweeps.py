"""`gptq.solve` for accelerators, where the start of a kernel takes longer than its work. A block of
columns is rounded at once, again and again, until no integer moves.

Column k of a block answers for the errors of the columns before it. Every sweep rounds all columns
with the errors of the last sweep, so the first k columns are right after k sweeps. On all second
moments seen so far nothing moves after 8 to 20 sweeps. Integers that have stopped moving are those
of rounding in turn. `doubtful` tells the weights whose integers still move, so that the caller can
solve them in turn. Weights of one shape (experts) go together.

Shapes: N weights, O out, I in, G groups a row, B columns of a block.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from auto_mmround.numerics import gptq
from auto_mmround.numerics.descent import Span
from auto_mmround.numerics.grids import Points

BLOCK, SWEEPS = 128, 32
FEW = 16  # sweeps where few integers move
MOST = 2**25  # elements of weights that are worked on at a time, about


class Sweeping:
    """Second moments of N weights (N, I, I), factorized; solves weights (N * O, I) under them."""

    def __init__(self, hessian_NII: Tensor, group_size: int, grid: Points, how: gptq.Solving):
        self._group_size, self._grid = group_size, grid
        each = hessian_NII.unbind()
        orders = [gptq.column_order(h.diagonal(), how.order, group_size) for h in each]
        factored = [gptq.factor(*both, how.dampening) for both in zip(each, orders, strict=True)]
        self._order_NI = torch.stack(orders)
        factors = [feedback_II for feedback_II, _ in factored]
        self._feedback_NII = torch.stack(factors) if len(factored) > 1 else factors[0][None]
        self._sound_N = torch.stack([sound for _, sound in factored])
        self._moving_N = torch.zeros(len(factored), device=hessian_NII.device)

    def doubtful(self) -> Tensor:
        """bool (N,), on the device: True for second moments without a factor, and for weights with
        integers that still moved in the last sweep."""
        return ~self._sound_N | (self._moving_N > 0)

    def __call__(self, w_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        """Codes (N * O, I) as floats, unpacked."""
        w_NIO = self._columns(w_OI)
        error_NIO, q_NIO = torch.empty_like(w_NIO), torch.empty_like(w_NIO)
        for part, tables_NBO in self._blocks(scale_OG, zero_OG):
            answers = self._feedback_NII[:, part, : part.start], error_NIO[:, : part.start]
            self._moving_N += self._block(
                w_NIO[:, part],
                torch.baddbmm(w_NIO[:, part], *answers),
                self._feedback_NII[:, part, part].tril(-1),
                tables_NBO,
                error_NIO[:, part],
                q_NIO[:, part],
            )
            q_NIO[:, part] += tables_NBO[1]
        return self._rows(q_NIO)

    def rounded(self, span: Span) -> Tensor:
        """Round some columns of a descent, and return the change of their slope. Columns answer for
        the errors of the sweep before, so they may go too far: a row that is not better keeps its
        old codes."""
        error_NWO, u_NWO = span.error_NWO, span.u_NWO
        before_NWO, kept_NWO = error_NWO.clone(), u_NWO.clone()
        earlier_NWW = span.among_NWW.tril()
        span.target_NWO.baddbmm_(earlier_NWW, before_NWO, alpha=-1)
        tables_NWO = span.scale_NWO, span.zero_NWO
        self._block(span.w_NWO, span.target_NWO, earlier_NWW, tables_NWO, error_NWO, u_NWO, FEW)
        change_NWO = span.change(moved_NWO := error_NWO - before_NWO)
        rise_NWO = torch.add(change_NWO, span.slope_NWO, alpha=2).mul_(moved_NWO)
        better_N1O = rise_NWO.mul_(span.own_NW[..., None]).sum(1, keepdim=True) < 0
        error_NWO.copy_(torch.where(better_N1O, error_NWO, before_NWO))
        u_NWO.copy_(torch.where(better_N1O, u_NWO, kept_NWO))
        return change_NWO.mul_(better_N1O)

    def _columns(self, x_OI: Tensor) -> Tensor:
        """(N, I, O), columns in the order of rounding."""
        x_NIO = x_OI.unflatten(0, (len(self._order_NI), -1)).mT
        return x_NIO.gather(1, self._order_NI[..., None].expand_as(x_NIO))

    def _rows(self, x_NIO: Tensor) -> Tensor:
        """(N * O, I), columns in the order of the weight."""
        back_NI = self._order_NI.argsort(-1)
        return x_NIO.gather(1, back_NI[..., None].expand_as(x_NIO)).mT.flatten(0, 1)

    def _blocks(
        self, scale_OG: Tensor, zero_OG: Tensor
    ) -> Iterator[tuple[slice, tuple[Tensor, Tensor]]]:
        """Columns that are rounded at once; their scales and zero points (N, B, O)."""
        tables = [x.float().unflatten(0, (len(self._order_NI), -1)).mT for x in (scale_OG, zero_OG)]
        for i in range(0, self._order_NI.shape[1], BLOCK):
            part = slice(i, i + BLOCK)
            group_NB1 = (self._order_NI[:, part] // self._group_size)[..., None]
            group_NBO = group_NB1.expand(-1, -1, tables[0].shape[2])
            yield part, (tables[0].gather(1, group_NBO), tables[1].gather(1, group_NBO))

    def _block(
        self,
        w_NBO: Tensor,
        target_NBO: Tensor,
        among_NBB: Tensor,
        tables_NBO: tuple[Tensor, Tensor],
        error_NBO: Tensor,
        q_NBO: Tensor,
        known: int = 0,
    ) -> Tensor:
        """Round the columns of one block, and write their errors and q - z. Returns (N,): how many
        integers moved in the last sweep. A sweep takes four kernels, because the nearest integer is
        the floor of half a step more.

        known: number of sweeps if the errors hold values at the start; 0: they hold none, and all
        sweeps are made."""
        scale_NBO, zero_NBO = tables_NBO
        bounds = self._grid.low - zero_NBO, self._grid.top - zero_NBO
        target_NBO = target_NBO.add(scale_NBO, alpha=self._grid.sweep_shift)
        answer_NBO, last_NBO = target_NBO, q_NBO
        sweeps = min(known or SWEEPS, w_NBO.shape[1] + 1)  # behind that nothing can move
        for sweep in range(sweeps):
            if sweep or known:
                answer_NBO = torch.baddbmm(target_NBO, among_NBB, error_NBO)
                last_NBO = q_NBO.clone() if sweep == sweeps - 1 else q_NBO
            self._grid.sweep(answer_NBO, scale_NBO, q_NBO).clamp_(*bounds)
            torch.addcmul(w_NBO, scale_NBO, q_NBO, value=-1, out=error_NBO)
        return (q_NBO != last_NBO).sum((1, 2))
