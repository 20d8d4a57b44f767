"""`gptq.solve` where starting a kernel takes longer than what it does: a block of columns
is rounded at once, again and again, until no integer moves.

Column k of a block answers for the errors of those before it. If all are rounded with the errors of
the last sweep, the first k columns are right after k sweeps; on all second moments seen so far
nothing moves after 8 to 20. What has stopped moving is what rounding in turn gives; what has not
is told, so that the caller can solve it in turn. Weights of one shape go together (experts).

Shapes: N weights, O out, I in, G groups a row, B columns of a block.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from auto_mmround.numerics import gptq
from auto_mmround.numerics.grids import Points

BLOCK, SWEEPS = 128, 32
MOST = 2**25  # elements of weights that are worked on at a time


class Sweeping:
    """Second moments of N weights, factorized; solves weights (N * O, I) under them."""

    def __init__(
        self, hessians: Sequence[Tensor], group_size: int, grid: Points, how: gptq.Solving
    ):
        self._group_size, self._grid = group_size, grid
        orders = [gptq.column_order(h.diagonal(), how.order, group_size) for h in hessians]
        found = [gptq.factor(*each, how.dampening) for each in zip(hessians, orders, strict=True)]
        self._order_NI = torch.stack(orders)
        factors = [feedback_II for feedback_II, _ in found]
        self._feedback_NII = torch.stack(factors) if len(found) > 1 else factors[0][None]
        self._sound_N = torch.stack([sound for _, sound in found])
        self._moving_N = torch.zeros(len(found), device=hessians[0].device)

    def rows(self, columns: int) -> int:
        """How many to solve at a time."""
        rows = max(len(self._order_NI), MOST // columns)
        return rows + -rows % self._grid.rows

    def doubtful(self) -> Tensor:
        """bool (N,), on the device: second moments without a factor, and weights with integers that
        still moved in the last sweep."""
        return ~self._sound_N | (self._moving_N > 0)

    def __call__(self, w_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        """Codes (N * O, I) as floats, unpacked."""
        shape = len(self._order_NI), -1
        scale_NGO, zero_NGO = (x.float().unflatten(0, shape).mT for x in (scale_OG, zero_OG))
        place_NIO = self._order_NI[..., None].expand(-1, -1, scale_NGO.shape[2])
        w_NIO = w_OI.unflatten(0, shape).mT.gather(1, place_NIO)
        error_NIO, q_NIO = torch.empty_like(w_NIO), torch.empty_like(w_NIO)
        for i in range(0, w_NIO.shape[1], BLOCK):
            part = slice(i, i + BLOCK)
            group_NBO = place_NIO[:, part] // self._group_size
            zero_NBO = zero_NGO.gather(1, group_NBO)
            answers = self._feedback_NII[:, part, :i], error_NIO[:, :i]
            self._block(
                w_NIO[:, part],
                torch.baddbmm(w_NIO[:, part], *answers),
                self._feedback_NII[:, part, part].tril(-1),
                (
                    scale_NGO.gather(1, group_NBO),
                    self._grid.low - zero_NBO,
                    self._grid.top - zero_NBO,
                ),
                error_NIO[:, part],
                q_NIO[:, part],
            )
            q_NIO[:, part] += zero_NBO
        back_NIO = self._order_NI.argsort(-1)[..., None].expand_as(place_NIO)
        return q_NIO.gather(1, back_NIO).mT.flatten(0, 1)

    def _block(
        self,
        w_NBO: Tensor,
        target_NBO: Tensor,
        among_NBB: Tensor,
        grid_NBO: tuple[Tensor, Tensor, Tensor],
        error_NBO: Tensor,
        q_NBO: Tensor,
    ) -> None:
        """Round the columns of one block; fills errors and centred codes. grid_NBO: scales, and
        bounds of the codes. Four kernels a sweep: the nearest integer is the floor half a step
        up."""
        scale_NBO, *bounds = grid_NBO
        target_NBO = target_NBO.add(scale_NBO, alpha=self._grid.sweep_shift)
        answer_NBO, last_NBO = target_NBO, q_NBO
        sweeps = min(SWEEPS, w_NBO.shape[1] + 1)  # behind that nothing can move
        for sweep in range(sweeps):
            if sweep:
                answer_NBO = torch.baddbmm(target_NBO, among_NBB, error_NBO)
                last_NBO = q_NBO.clone() if sweep == sweeps - 1 else q_NBO
            self._grid.sweep(answer_NBO, scale_NBO, q_NBO).clamp_(*bounds)
            torch.addcmul(w_NBO, scale_NBO, q_NBO, value=-1, out=error_NBO)
        self._moving_N += (q_NBO != last_NBO).sum((1, 2))
