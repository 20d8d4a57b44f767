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
from auto_mmround.numerics.grids import Points

BLOCK, SWEEPS = 128, 32
FEW = 16  # sweeps where few integers move
MOST = 2**25  # elements of weights that are worked on at a time, about


class Sweeping:
    """Second moments of N weights (N, I, I), factorized; solves weights (N * O, I) under them."""

    def __init__(self, hessian_NII: Tensor, group_size: int, grid: Points, how: gptq.Solving):
        self._group_size, self._grid, self._hessian_NII = group_size, grid, hessian_NII
        self._dampening = how.dampening
        each = hessian_NII.unbind()
        orders = [gptq.column_order(h.diagonal(), how.order, group_size) for h in each]
        factored = [gptq.factor(*both, how.dampening) for both in zip(each, orders, strict=True)]
        self._order_NI = torch.stack(orders)
        factors = [feedback_II for feedback_II, _ in factored]
        self._feedback_NII = torch.stack(factors) if len(factored) > 1 else factors[0][None]
        self._sound_N = torch.stack([sound for _, sound in factored])
        self._moving_N = torch.zeros(len(factored), device=hessian_NII.device)

    def rows(self, rows: int, columns: int) -> int:
        """How many of so many rows to solve at a time: parts are alike, since a small one starts as
        many kernels, and up to an eighth over `MOST`."""
        parts = -(-rows * columns // (MOST + MOST // 8))
        each = max(len(self._order_NI), -(-rows // parts))
        return each + -each % self._grid.rows

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
        return self._rows(q_NIO)

    def descend(self, w_OI: Tensor, q_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        """`gptq.descend` of codes (N * O, I). Columns answer for the errors of the sweep before, so
        they may go too far: a block of a row that is not better keeps its old codes."""
        w_NIO, q_NIO = self._columns(w_OI), self._columns(q_OI)
        error_NIO = torch.empty_like(w_NIO)
        for part, (scale_NBO, zero_NBO) in self._blocks(scale_OG, zero_OG):
            error_NIO[:, part] = w_NIO[:, part] - scale_NBO * (q_NIO[:, part] - zero_NBO)
        damp_N1 = self._dampening * self._hessian_NII.diagonal(dim1=1, dim2=2).mean(-1)[:, None]
        for part, tables_NBO in self._blocks(scale_OG, zero_OG):
            rows_NBI = self._hessian_NII.take_along_dim(self._order_NI[:, part, None], 1)
            rows_NBI = rows_NBI.take_along_dim(self._order_NI[:, None], 2)
            answers_NBI, own_NB = gptq.answers(rows_NBI, part.start, damp_N1)
            among_NBB, w_NBO = answers_NBI[:, :, part], w_NIO[:, part]
            target_NBO = torch.baddbmm(w_NBO, answers_NBI, error_NIO)
            before_NBO, kept_NBO = error_NIO[:, part].clone(), q_NIO[:, part].clone()
            slope_NBO = (target_NBO - w_NBO).add_(before_NBO)  # half of dL/dE, over H_kk
            earlier_NBB = among_NBB.tril()
            target_NBO.baddbmm_(earlier_NBB, before_NBO, alpha=-1)
            self._block(
                w_NBO, target_NBO, earlier_NBB, tables_NBO, error_NIO[:, part], q_NIO[:, part], FEW
            )
            moved_NBO = error_NIO[:, part] - before_NBO
            rise_NBO = torch.baddbmm(moved_NBO, among_NBB, moved_NBO).add_(slope_NBO, alpha=2)
            rise_N1O = rise_NBO.mul_(moved_NBO).mul_(own_NB[..., None]).sum(1, keepdim=True)
            error_NIO[:, part] = torch.where(rise_N1O < 0, error_NIO[:, part], before_NBO)
            q_NIO[:, part] = torch.where(rise_N1O < 0, q_NIO[:, part], kept_NBO)
        return self._rows(q_NIO)

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
        """Round the columns of one block, and write their errors and codes. Returns (N,): how many
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
        moved_N = (q_NBO != last_NBO).sum((1, 2))
        q_NBO += zero_NBO
        return moved_N
