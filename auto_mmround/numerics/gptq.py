"""For given scales, integers that answer for each other's errors under all of H (GPTQ). For given
integers, refitted scales. And the offsets from which sign steps start.

Shapes: O out, I in, G groups a row, g columns a group, B columns of a block, W of some blocks.
"""

import logging
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from auto_mmround.numerics import grids, pieces
from auto_mmround.numerics.grids import Points
from auto_mmround.numerics.moments import Hessian, bf16_products, hessian_diagonal, hessian_rows

log = logging.getLogger("auto_mmround")

Order = Literal["none", "weight", "group"]

MOST_DAMPENING = 1.0
TURNED = 256  # rows that change places at a time
WIDER = 4  # blocks; products of one take 1.4 times as long
AHEAD = 512  # columns of E H at a time, of wide layers: narrow products take up to twice as long
# The parts of its multiples behind the point lie evenly between 0 and 1, however many there are.
GOLDEN = 0.6180339887498949


def retarget(w_OI: Tensor, hessian_II: Tensor, cross_II: Tensor, dampening: float = 0.01) -> Tensor:
    """The weight that gives the teacher's outputs best from the student's inputs: argmin |W'
    x_student - W x_teacher|^2, drawn towards W. (out, in) float32.

    W' = W + W (C - H)^T (H + d I)^-1 with C = E[x_student x_teacher^T], d = dampening * mean
    diag(H). A solve for W' under H is then a solve against the teacher's outputs (the aim of GPTAQ,
    arXiv 2504.02692).
    """
    diagonal_I = hessian_II.diagonal()
    damp = (dampening * diagonal_I.mean()).clamp(min=1e-30)
    damped_II = hessian_II + damp * torch.eye(len(diagonal_I), device=hessian_II.device)
    change_IO = torch.linalg.solve(damped_II, (cross_II - hessian_II) @ w_OI.float().t())
    return w_OI.float() + change_IO.t()


class Solving(NamedTuple):
    """dampening: is added to H's diagonal, as a share of its mean. order: of the columns. "weight":
    by falling diag(H). "group": groups by falling sum of diag(H), columns of a group by falling
    diag(H). block: columns at a time."""

    dampening: float = 0.01
    order: Order = "none"
    block: int = 64


PLAINLY = Solving()


class Solver:
    """GPTQ (arXiv 2210.17323) under second moments (in, in), which are factorized once.

    Columns are rounded in turn; groups stay in their places. Let E = W - W~ and H = R R^T with R
    upper triangular. Then tr(E H E^T) = |E R|^2, and column k of E R is zero for w~_k = w_k +
    sum_{j<k} E_j R_jk / R_kk. Rounding this to the grid is GPTQ's step without inverting H (QuIP,
    arXiv 2307.13304, section 3.2). Columns without inputs are rounded to nearest.
    """

    def __init__(self, hessian: Hessian, group_size: int, grid: Points, how: Solving = PLAINLY):
        self._group_size, self._grid, self._block = group_size, grid, how.block
        self._order_I = column_order(hessian_diagonal(hessian), how.order, group_size)
        self._feedback_II = _damped(hessian, self._order_I, how.dampening)

    def __call__(self, w_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor) -> Tensor:
        """Integers under fixed scales and zero points (out, G) that answer for each other's errors:
        codes (out, in) as floats, unpacked."""
        if (feedback_II := self._feedback_II) is None:
            scale_OI, zero_OI = (
                _spread(x_OG.float(), self._group_size, w_OI.shape[1])
                for x_OG in (scale_OG, zero_OG)
            )
            return grids.quantize(w_OI.float(), 0.0, scale_OI, zero_OI, self._grid)
        w_IO = _as_columns(w_OI.float(), self._order_I)
        error_IO, q_IO = torch.empty_like(w_IO), torch.empty_like(w_IO)
        groups = _Groups.of(scale_OG, zero_OG, self._grid)
        group_I = self._order_I // self._group_size
        for wide, parts in _blocks(len(w_IO), self._block):
            answers = feedback_II[wide, : wide.start], error_IO[: wide.start]
            target_WO = torch.addmm(w_IO[wide], *answers)
            for part, target_BO in zip(parts, target_WO.split(self._block), strict=True):
                before = slice(wide.start, part.start)
                target_BO.addmm_(feedback_II[part, before], error_IO[before])
                round_in_turn(
                    target_BO, w_IO[part], feedback_II[part, part], groups.at(group_I[part]),
                    self._grid, error_IO[part], q_IO[part],
                )  # fmt: skip
        return _as_rows(q_IO.add_(groups.zero_GO.index_select(0, group_I)), self._order_I)


# `index_select` takes a fraction of the time that an index in brackets takes on a processor.
def _as_columns(x_OI: Tensor, order_I: Tensor) -> Tensor:
    """A copy (in, out), with the columns in the order of rounding."""
    return x_OI.t().contiguous().index_select(0, order_I)


def _as_rows(x_IO: Tensor, order_I: Tensor) -> Tensor:
    """(out, in), with the columns in their own places again."""
    return x_IO.index_select(0, order_I.argsort()).t().contiguous()


def _spread(x_OG: Tensor, group_size: int, columns: int) -> Tensor:
    """(.., out, in): each column has its group's number."""
    return grids.from_groups(x_OG[..., None].expand(*x_OG.shape, group_size), columns)


def _blocks(columns: int, block: int) -> Iterator[tuple[slice, list[slice]]]:
    """W columns that are brought up to date with all others at once, and the blocks among them."""
    for first in range(0, columns, WIDER * block):
        wide = slice(first, min(first + WIDER * block, columns))
        starts = range(wide.start, wide.stop, block)
        yield wide, [slice(i, min(i + block, wide.stop)) for i in starts]


class _Groups(NamedTuple):
    """Scales, zero points, and bounds of the centred integers q - z. Transposed, so that a group's
    row is contiguous."""

    scale_GO: Tensor
    zero_GO: Tensor
    low_GO: Tensor
    high_GO: Tensor

    @classmethod
    def of(cls, scale_OG: Tensor, zero_OG: Tensor, grid: Points) -> "_Groups":
        """From the scales and zero points (out, G) of a weight."""
        scale_GO, zero_GO = (x_OG.float().t().contiguous() for x_OG in (scale_OG, zero_OG))
        return cls(scale_GO, zero_GO, grid.low - zero_GO, grid.top - zero_GO)

    def at(self, group_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scales and bounds (B, O) of some columns."""
        return self.scale_GO[group_B], self.low_GO[group_B], self.high_GO[group_B]


def round_in_turn(
    target_BO: Tensor,
    w_BO: Tensor,
    feedback_BB: Tensor,
    groups_BO: tuple[Tensor, Tensor, Tensor],
    grid: Points,
    error_BO: Tensor,
    q_BO: Tensor,
) -> None:
    """Round the columns of one block in turn, and write ``error_BO`` and the centred ``q_BO``. A
    column takes five passes."""
    feedback_BB = feedback_BB.contiguous()
    rows = [x_BO.unbind() for x_BO in (target_BO, w_BO, error_BO, q_BO, *groups_BO)]
    for k, (target_O, w_O, error_O, q_O, scale_O, low_O, high_O) in enumerate(zip(*rows)):
        if k:
            target_O.addmv_(error_BO[:k].t(), feedback_BB[k, :k])
        grid.snap_(torch.div(target_O, scale_O, out=q_O)).clamp_(low_O, high_O)
        torch.addcmul(w_O, scale_O, q_O, value=-1, out=error_O)


def column_order(diagonal_I: Tensor, order: Order, group_size: int) -> Tensor:
    """The columns in the order of rounding, see `Solving`."""
    if order == "none":
        return torch.arange(len(diagonal_I), device=diagonal_I.device)
    falling_I = diagonal_I.argsort(descending=True, stable=True)
    if order == "weight":
        return falling_I
    sum_G = grids.to_groups(diagonal_I[None], group_size)[0].sum(-1)
    place_G = sum_G.argsort(descending=True, stable=True).argsort()
    return falling_I[place_G[falling_I // group_size].argsort(stable=True)]


def factor(hessian: Hessian, order_I: Tensor, dampening: float) -> tuple[Tensor, Tensor]:
    """N_kj = R_jk / R_kk, unit lower triangular, of the damped H = R R^T in the given order; and
    whether the factorization went well, a bool on the device, for which the host does not wait.

    Both axes of H are reversed for Cholesky, which makes R upper triangular. ``dampening`` is a
    fraction of the mean of diag(H) over the columns that have inputs.
    """
    diagonal_I, turned_I = hessian_diagonal(hessian)[order_I], order_I.flip(0)
    live_I = diagonal_I > 0
    mean = (diagonal_I.clamp(min=0).sum() / live_I.sum()).nan_to_num(1.0)
    damp_I = torch.where(live_I, dampening, 1.0) * mean
    # Symmetric; turned it lies as LAPACK has it, so that the factor takes its place.
    feedback_II = torch.empty(len(order_I), len(order_I), device=order_I.device)
    place_I = turned_I.argsort()
    for first in range(0, len(order_I), TURNED):
        part = slice(first, first + TURNED)
        turned_PI = hessian_rows(hessian, part).index_select(1, turned_I)
        feedback_II.index_copy_(0, place_I[part], turned_PI)
    feedback_II = feedback_II.t()
    feedback_II.diagonal().add_(damp_I.flip(0))
    failed = torch.zeros((), dtype=torch.int32, device=order_I.device)
    torch.linalg.cholesky_ex(feedback_II, upper=True, out=(feedback_II, failed))
    _turn(feedback_II)
    root_I = feedback_II.diagonal().clone()
    return feedback_II.div_(root_I[:, None]), (failed == 0) & root_I.isfinite().all()


def _turn(a_II: Tensor) -> None:
    """Reverse both axes, in place: for a wide layer a copy takes more than a gigabyte."""
    size, half = len(a_II), len(a_II) // 2
    for i in range(0, half, TURNED):
        j = min(i + TURNED, half)
        top, bottom = a_II[i:j], a_II[size - j : size - i]
        kept = top.flip(0, 1)
        top.copy_(bottom.flip(0, 1))
        bottom.copy_(kept)
    if size % 2:
        a_II[half] = a_II[half].flip(0)


def _damped(hessian: Hessian, order_I: Tensor, dampening: float) -> Tensor | None:
    """The `factor`, with dampening that grows tenfold until it goes well. None if it never does."""
    fraction = dampening
    while True:
        feedback_II, sound = factor(hessian, order_I, fraction)
        if sound:
            return feedback_II
        log.warning("second moments are not positive definite with dampening %g", fraction)
        fraction = max(10 * fraction, 1e-3)
        if fraction > MOST_DAMPENING:
            log.warning(
                "no dampening up to %g helped: the weight is rounded to nearest", MOST_DAMPENING
            )
            return None


def refit_scale(
    w_OI: Tensor,
    q_OI: Tensor,
    hessian: Hessian,
    scale_OG: Tensor,
    zero_OG: Tensor,
    group_size: int,
    grid: Points,
    unit_OG: Tensor | None = None,
) -> Tensor:
    """Scales (out, G) that fit the given integers best under all of H, group after group
    (Gauss-Seidel, one sweep).

    With u = q - z of one group, zero elsewhere, and E the current error: ds = (E H u^T) / (u H
    u^T). All arguments may have a dimension more in front, of weights with second moments each.
    """
    scale_OG = scale_OG.float().clone()
    columns = w_OI.shape[-1]
    centred_OI = q_OI.float() - _spread(zero_OG.float(), group_size, columns)
    error_OI = w_OI.float() - centred_OI * _spread(scale_OG, group_size, columns)
    together = max(1, min(AHEAD, columns // 16) // group_size)
    for first in range(0, scale_OG.shape[-1], together):
        ahead = slice(first * group_size, (first + together) * group_size)
        hessian_AI = hessian_rows(hessian, ahead)
        with bf16_products(True):  # three digits of a small step are enough
            along_OA = error_OI @ hessian_AI.mT
        for group in range(first, min(first + together, scale_OG.shape[-1])):
            part = slice(group * group_size, (group + 1) * group_size)
            u_Og, behind = centred_OI[..., part], slice(part.stop, ahead.stop)
            hessian_gI = hessian_AI[..., part.start - ahead.start : part.stop - ahead.start, :]
            length_O = ((u_Og @ hessian_gI[..., part]) * u_Og).sum(-1)
            along_O = (along_OA[..., : u_Og.shape[-1]] * u_Og).sum(-1)
            unit_O = None if unit_OG is None else unit_OG[..., group]
            scale_OG[..., group] = fitted(scale_OG[..., group], along_O, length_O, grid, unit_O)
            now_Og = w_OI[..., part] - u_Og * scale_OG[..., group, None]
            along_OA = along_OA[..., group_size:]
            if along_OA.shape[-1]:
                moved_Og = now_Og - error_OI[..., part]
                with bf16_products(True):
                    along_OA += moved_Og @ hessian_gI[..., behind]
            error_OI[..., part] = now_Og
    return scale_OG


def fitted(
    scale_O: Tensor, along_O: Tensor, length_O: Tensor, grid: Points, unit_O: Tensor | None = None
) -> Tensor:
    """Scales (..., out) of a group plus their best change, ``along`` / ``length``, as the file can
    hold them: E H u^T and u H u^T, see `refit_scale`."""
    along_O, length_O = (pieces.over_rows(x_O, grid.rows, -1) for x_O in (along_O, length_O))
    step_O = torch.where(length_O > 0, along_O / length_O.clamp(min=1e-30), 0.0)
    return grid.storable(scale_O + step_O.nan_to_num(0.0, 0.0, 0.0), unit_O)


def place_start(
    ratio_OGg: Tensor, q_OGg: Tensor, zero_OG: Tensor, grid: Points, margin: float | Tensor = 0.1
) -> Tensor:
    """Smallest offsets V (out, G, g) with clamp(round(W/s + V) + z, low, top) = q, where W/s + V
    stays ``margin`` steps away from the edges. q: unpacked. ratio: W/s.

    Edges are half a step from q - z. There is none beyond a bound of the clamp. Small offsets let
    few sign steps undo a choice.
    """
    centre_OGg = q_OGg.float() - zero_OG[..., None]
    below, above = grid.gaps(centre_OGg)
    low_OGg = torch.where(q_OGg <= grid.low, -torch.inf, centre_OGg - below * (0.5 - margin))
    high_OGg = torch.where(q_OGg >= grid.top, torch.inf, centre_OGg + above * (0.5 - margin))
    return torch.clamp(ratio_OGg, low_OGg, high_OGg) - ratio_OGg


def margins(mean: float, columns: int, w_OGg: Tensor) -> Tensor:
    """Margins (G, g) for `place_start`, each column its own, from .2 to 2 times the mean.

    Factors move scales from the first sign step on, and integers change a few at a time. Where none
    moves, all that lie at one margin would change in one step, each as if the others stayed.
    """
    share_I = torch.arange(columns, dtype=torch.float32, device=w_OGg.device) * GOLDEN % 1.0
    return grids.to_groups(mean * (0.2 + 1.8 * share_I[None]), w_OGg.shape[-1])[0]
