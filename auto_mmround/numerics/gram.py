"""Closed form rounding from the second moments of a weight's inputs: scale search, GPTQ solve,
start for tuning.

With H = mean_t w_t x_t x_t^T the squared output error of a quantized weight is tr((W - W~) H (W -
W~)^T). Everything here lowers that number without a gradient: `search_scale` looks at diag(H) only,
`solve` at all of H for the given scales, `refit_scale` at all of H for the given integers.
`place_start` hands the integers to the sign descent. Shape suffixes: O out, I in, G groups a row, g
columns a group, T tokens, B columns of a block.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from auto_mmround.numerics import grids
from auto_mmround.numerics.grids import Grid

log = logging.getLogger("auto_mmround")

Order = Literal["none", "weight", "group"]
# elements of a weight searched at a time: the temporaries stay in the processor's cache
CHUNK = 2**16
# columns of H accumulated at a time: only panels on and above the diagonal are multiplied
PANEL = 256
MOST_DAMPENING = 1.0


class Moments:
    """Running second moments of a layer's inputs, float32; with ``cross`` also student x teacher
    (see `retarget`)."""

    def __init__(
        self, features: int, *, cross: bool = False, device: torch.device | str | None = None
    ):
        self._sum_II = torch.zeros(features, features, device=device)
        self._cross_II = torch.zeros(features, features, device=device) if cross else None
        self._total = torch.zeros((), device=device)

    @property
    def features(self) -> int:
        """Size of an input."""
        return len(self._sum_II)

    @property
    def crossed(self) -> bool:
        """Whether teacher inputs are seen too."""
        return self._cross_II is not None

    def sums(self) -> list[Tensor]:
        """What adds up over parts of the tokens, in its own memory."""
        return [part for part in (self._sum_II, self._cross_II, self._total) if part is not None]

    def add(self, x: Tensor, weight: Tensor | None = None, teacher: Tensor | None = None) -> None:
        """Add tokens ``x`` (..., in) with weights (...), default 1, pads 0; ``teacher``: the inputs
        W was trained on.

        Raises ValueError when ``teacher`` is given without ``cross``, or missing with it.
        """
        if (teacher is None) != (self._cross_II is None):
            raise ValueError("teacher inputs are needed with cross moments, and only with them")
        root_T1 = None if weight is None else weight.detach().reshape(-1, 1).float().sqrt()
        self._total += x.shape[:-1].numel() if weight is None else weight.detach().float().sum()
        x_TI = _rows(x, root_T1)
        with _bf16_products(all(t.dtype == torch.bfloat16 for t in (x, teacher) if t is not None)):
            for i in range(0, x_TI.shape[1], PANEL):
                self._sum_II[i : i + PANEL, i:].addmm_(x_TI[:, i : i + PANEL].t(), x_TI[:, i:])
            if self._cross_II is not None and teacher is not None:
                self._cross_II.addmm_(x_TI.t(), _rows(teacher, root_T1))

    def hessian(self) -> Tensor:
        """H = mean_t w_t x_t x_t^T, (in, in), symmetric; its diagonal is E[x^2]. Zero before the
        first token."""
        h_II = self._sum_II / self._total.clamp(min=1e-30)
        for i in range(0, len(h_II), PANEL):
            part, behind = slice(i, i + PANEL), slice(i + PANEL, None)
            upper = h_II[part, part].triu()
            h_II[part, part] = upper + upper.triu(1).t()
            h_II[behind, part] = h_II[part, behind].t()
        return h_II

    def error(self, error_OI: Tensor) -> float:
        """tr(E H E^T), summed over the outputs, as `error` gives it; to about a thousandth, and
        without making H."""
        found = torch.zeros((), device=error_OI.device)
        with _bf16_products(True):
            for i in range(0, len(self._sum_II), PANEL):
                along_OI = (
                    error_OI[:, i : i + PANEL] @ self._sum_II[i : i + PANEL, i:]
                ) * error_OI[:, i:]
                found += along_OI[:, :PANEL].sum() + 2 * along_OI[:, PANEL:].sum()  # H is symmetric
        return (found / self._total.clamp(min=1e-30)).item()

    def cross(self) -> Tensor:
        """C = mean_t w_t x_student x_teacher^T, (in, in). Raises ValueError if they were not asked
        for."""
        if self._cross_II is None:
            raise ValueError("no cross moments were accumulated")
        return self._cross_II / self._total.clamp(min=1e-30)


def _rows(x: Tensor, root_T1: Tensor | None) -> Tensor:
    """Tokens as rows in float32, times the square roots of their weights."""
    x_TI = x.detach().reshape(-1, x.shape[-1]).float()
    return x_TI if root_T1 is None else x_TI * root_T1


@contextmanager
def _bf16_products(allowed: bool) -> Iterator[None]:
    """Let float32 products read factors as bf16 and add in float32: about 2.5 times faster, exact
    for bf16 factors."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if allowed else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def retarget(w_OI: Tensor, hessian_II: Tensor, cross_II: Tensor, dampening: float = 0.01) -> Tensor:
    """The weight that makes most of the student's inputs: argmin |W' x_student - W x_teacher|^2,
    drawn towards W.

    W' = W + W (C - H)^T (H + d I)^-1 with C = E[x_student x_teacher^T], d = dampening * mean
    diag(H). A solve for W' under H then is a solve against the teacher's outputs (the aim of GPTAQ,
    arXiv 2504.02692). (out, in) float32.
    """
    diagonal_I = hessian_II.diagonal()
    damp = (dampening * diagonal_I.mean()).clamp(min=1e-30)
    damped_II = hessian_II + damp * torch.eye(len(diagonal_I), device=hessian_II.device)
    change_IO = torch.linalg.solve(damped_II, (cross_II - hessian_II) @ w_OI.float().t())
    return w_OI.float() + change_IO.t()


# --------------------------------------------------------------------------------------------------
# scale search


class Search(NamedTuple):
    """Candidates: the plain scale times ``factors``, its zero point plus ``shifts``; then rounds
    around the best."""

    factors: tuple[float, ...]
    shifts: tuple[int, ...]
    rounds: tuple[tuple[tuple[float, ...], tuple[int, ...]], ...]


def spread(low: float, high: float, count: int) -> tuple[float, ...]:
    """``count`` numbers from ``low`` to ``high``, each the same multiple of the one before."""
    return tuple(low * (high / low) ** (i / (count - 1)) for i in range(count))


def search_plan(grid: Grid) -> Search:
    """What `search_scale` tries: 22 to 46 candidates. A symmetric scale of the other sign wins
    often up to 4 bits.

    Integers move with steps of about 1 / top, so the last round's steps shrink with the bits.
    """
    fine = tuple(1 + i / (2 * grid.top) for i in (-3, -2, -1, 1, 2, 3))
    if not grid.sym:
        factors = spread(0.35, 1.0, 8)
        return Search(factors, (-1, 0, 1), ((fine, (0,)),))
    if grid.bits <= 4:
        factors = spread(0.35, 1.3, 8)
        return Search(factors + tuple(-f for f in factors), (0,), ((fine, (0,)),))
    near = tuple(1 + i / 200 for i in (-4, -3, -2, -1, 1, 2, 3, 4))
    return Search(spread(0.45, 1.15, 32), (0,), ((near, (0,)), (fine, (0,))))


class _Best(NamedTuple):
    gain_OG: Tensor
    scale_OG: Tensor
    zero_OG: Tensor


def search_scale(w_OGg: Tensor, importance: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and zero point (out, G), float32 as the file will hold them, with small sum of
    importance * (w - w~)^2.

    ``importance`` is E[x^2], (G, g) or (out, G, g); a group without any is searched unweighted.
    Candidates shrink the range, as SignRoundV2 does (arXiv 2512.04746), coarse steps first and
    finer ones around the best. But a candidate's integers are judged with the scale that fits them
    best, s = sum(iwq) / sum(iqq), which leaves the error sum(iww) - sum(iwq)^2 / sum(iqq): so a few
    candidates find more than a fine grid of scales does. Never worse than the plain scale of
    `grids.scale_and_zero`.
    """
    rows = max(1, (CHUNK if w_OGg.is_cpu else 256 * CHUNK) // w_OGg[0].numel())
    found = []
    for at in range(0, len(w_OGg), rows):
        part = importance[at : at + rows] if importance.dim() == 3 else importance
        found.append(_search(w_OGg[at : at + rows].float(), part.float(), grid, search_plan(grid)))
    return torch.cat([scale_OG for scale_OG, _ in found]), torch.cat(
        [zero_OG for _, zero_OG in found]
    )


def _search(w_OGg: Tensor, importance: Tensor, grid: Grid, plan: Search) -> tuple[Tensor, Tensor]:
    importance = torch.where(importance.sum(-1, keepdim=True) > 0, importance, 1.0)
    weighted_OGg = w_OGg * importance
    plain = grids.scale_and_zero(*grids.ranges(w_OGg, grid), grid)
    best = _Best(torch.zeros_like(plain[0]), *plain)
    for factors, shifts in ((plan.factors, plan.shifts), *plan.rounds):
        _, scale_OG, zero_OG = best
        for factor, shift in product(factors, shifts):
            zero_shifted_OG = (zero_OG + shift).clamp(grid.min_zero, grid.top)
            best = _better(
                best, w_OGg, weighted_OGg, importance, scale_OG * factor, zero_shifted_OG, grid
            )
    scale_OG = grids.storable(best.scale_OG, grid)
    # Rounding the scale to its dtype may cost more than the search has won, or the group is all
    # zeros.
    kept_OG = weighted_error(w_OGg, importance, scale_OG, best.zero_OG, grid) <= weighted_error(
        w_OGg, importance, *plain, grid
    )
    return torch.where(kept_OG, scale_OG, plain[0]), torch.where(kept_OG, best.zero_OG, plain[1])


def _better(
    best: _Best,
    w_OGg: Tensor,
    weighted_OGg: Tensor,
    importance: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    grid: Grid,
) -> _Best:
    """The better of ``best`` and the integers that a candidate scale and zero point give, group by
    group."""
    if grid.sym:
        q_OGg = (w_OGg / scale_OG[..., None]).round_().clamp_(-grid.middle, grid.top - grid.middle)
    else:
        q_OGg = (
            (w_OGg / scale_OG[..., None])
            .round_()
            .clamp_(-zero_OG[..., None], grid.top - zero_OG[..., None])
        )
    along_OG = (weighted_OGg * q_OGg).sum(-1)
    fit_OG = along_OG / q_OGg.square_().mul_(importance).sum(-1).clamp(min=1e-30)
    gain_OG = along_OG * fit_OG
    wins_OG = gain_OG > best.gain_OG
    return _Best(
        torch.where(wins_OG, gain_OG, best.gain_OG),
        torch.where(wins_OG, fit_OG, best.scale_OG),
        torch.where(wins_OG, zero_OG, best.zero_OG),
    )


def weighted_error(
    w_OGg: Tensor, importance: Tensor, scale_OG: Tensor, zero_OG: Tensor, grid: Grid
) -> Tensor:
    """sum of importance * (w - w~)^2 over each group, rounded to nearest; (out, G)."""
    scale_OG1, zero_OG1 = scale_OG[..., None], zero_OG[..., None]
    q_OGg = grids.quantize(w_OGg, 0.0, scale_OG1, zero_OG1, grid.top)
    return (w_OGg - scale_OG1 * (q_OGg - zero_OG1)).square_().mul_(importance).sum(-1)


# --------------------------------------------------------------------------------------------------
# GPTQ solve


def error(w_OI: Tensor, wq_OI: Tensor, hessian_II: Tensor) -> float:
    """tr((W - W~) H (W - W~)^T): the squared output error a token, summed over outputs."""
    error_OI = w_OI.float() - wq_OI.float()
    return ((error_OI @ hessian_II) * error_OI).sum().item()


def solve(
    w_OI: Tensor,
    hessian_II: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    group_size: int,
    grid: Grid,
    *,
    dampening: float = 0.01,
    order: Order = "none",
    block: int = 64,
) -> Tensor:
    """GPTQ (arXiv 2210.17323) with fixed scales and zero points (out, G): integers that answer for
    each other's errors.

    Returns codes (out, in) as floats, 0 .. top. Columns are rounded in turn, in ``order``: "weight"
    by falling diag(H), "group" by groups of falling sum of diag(H) and so within each; all groups
    stay where they are. With the error E = W - W~ and H = R R^T, R upper triangular, tr(E H E^T) =
    |E R|^2, and column k of E R is zero for w~_k = w_k + sum_{j<k} E_j R_jk / R_kk. Rounding that
    to the grid is GPTQ's step (QuIP, arXiv 2307.13304, section 3.2) without inverting H. Columns
    without inputs are rounded to nearest.
    """
    order_I = _order(hessian_II.diagonal(), order, group_size)
    feedback_II = _factor(hessian_II, order_I, dampening)
    if feedback_II is None:
        columns_I = torch.arange(w_OI.shape[1], device=w_OI.device) // group_size
        scale_OI, zero_OI = scale_OG.float()[:, columns_I], zero_OG.float()[:, columns_I]
        return grids.quantize(w_OI.float(), 0.0, scale_OI, zero_OI, grid.top)
    w_IO = w_OI.float().t()[order_I].contiguous()
    error_IO, q_IO = torch.empty_like(w_IO), torch.empty_like(w_IO)
    zero_GO = zero_OG.float().t().contiguous()
    groups = _Groups(scale_OG.float().t().contiguous(), -zero_GO, grid.top - zero_GO)
    group_of = (order_I // group_size).tolist()
    for i in range(0, len(w_IO), block):
        part = slice(i, i + block)
        w_BO, error_BO = w_IO[part], error_IO[part]
        target_BO = torch.addmm(w_BO, feedback_II[part, :i], error_IO[:i])
        _solve_block(
            target_BO, w_BO, feedback_II[part, part], groups, group_of[part], error_BO, q_IO[part]
        )
    q_IO += zero_GO[group_of]
    return q_IO[order_I.argsort()].t().contiguous()


class _Groups(NamedTuple):
    """Scale, and bounds of the centred integers q - z; transposed, so that a group's row is
    contiguous."""

    scale_GO: Tensor
    low_GO: Tensor
    high_GO: Tensor


def _solve_block(
    target_BO: Tensor,
    w_BO: Tensor,
    feedback_BB: Tensor,
    groups: _Groups,
    group_of: list[int],
    error_BO: Tensor,
    q_BO: Tensor,
) -> None:
    """Round the columns of one block in turn; fills ``error_BO`` and the centred ``q_BO``. Five
    passes a column."""
    rows = [table_GO.unbind() for table_GO in groups]
    columns = zip(
        target_BO.unbind(), w_BO.unbind(), error_BO.unbind(), q_BO.unbind(), group_of, strict=True
    )
    for k, (target_O, w_O, error_O, q_O, group) in enumerate(columns):
        scale_O, low_O, high_O = (row[group] for row in rows)
        if k:
            target_O.addmv_(error_BO[:k].t(), feedback_BB[k, :k])
        torch.div(target_O, scale_O, out=q_O).round_().clamp_(low_O, high_O)
        torch.addcmul(w_O, scale_O, q_O, value=-1, out=error_O)


def _order(diagonal_I: Tensor, order: Order, group_size: int) -> Tensor:
    if order == "none":
        return torch.arange(len(diagonal_I), device=diagonal_I.device)
    falling_I = diagonal_I.argsort(descending=True, stable=True)
    if order == "weight":
        return falling_I
    sum_G = grids.to_groups(diagonal_I[None], group_size)[0].sum(-1)
    place_G = sum_G.argsort(descending=True, stable=True).argsort()
    return falling_I[place_G[falling_I // group_size].argsort(stable=True)]


def _factor(hessian_II: Tensor, order_I: Tensor, dampening: float) -> Tensor | None:
    """N_kj = R_jk / R_kk, unit lower triangular, of the damped H = R R^T in the given order:
    Cholesky of H with both axes reversed makes R upper triangular. None: no luck.

    ``dampening`` is a fraction of the mean of diag(H) over the columns that have inputs; it grows
    tenfold where H is not positive definite.
    """
    diagonal_I, turned_I = hessian_II.diagonal()[order_I], order_I.flip(0)
    live_I = diagonal_I > 0
    mean = (diagonal_I.clamp(min=0).sum() / live_I.sum()).nan_to_num(1.0)
    fraction = dampening
    while True:
        damp_I = torch.where(live_I, fraction, 1.0) * mean
        damped_II = hessian_II[turned_I[:, None], turned_I]
        damped_II.diagonal().add_(damp_I.flip(0))
        upper_II, failed = torch.linalg.cholesky_ex(damped_II, upper=True)
        feedback_II = upper_II.flip(0, 1)
        root_I = feedback_II.diagonal().clone()
        if not failed and root_I.isfinite().all():
            return feedback_II.div_(root_I[:, None])
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
    hessian_II: Tensor,
    scale_OG: Tensor,
    zero_OG: Tensor,
    group_size: int,
    grid: Grid,
    unit_OG: Tensor | None = None,
) -> Tensor:
    """Scales (out, G) that fit the given integers best under all of H, group after group
    (Gauss-Seidel, one sweep).

    With u = q - z of one group, zero elsewhere, and E the current error: ds = (E H u^T) / (u H
    u^T).
    """
    scale_OG = scale_OG.float().clone()
    columns_I = torch.arange(w_OI.shape[1], device=w_OI.device) // group_size
    centred_OI = q_OI.float() - zero_OG.float()[:, columns_I]
    error_OI = w_OI.float() - centred_OI * scale_OG[:, columns_I]
    for group in range(scale_OG.shape[1]):
        part = slice(group * group_size, (group + 1) * group_size)
        u_Og = centred_OI[:, part]
        with _bf16_products(True):  # three digits of a small step are enough
            along_O = ((error_OI @ hessian_II[:, part]) * u_Og).sum(-1)
        length_O = ((u_Og @ hessian_II[part, part]) * u_Og).sum(-1)
        step_O = torch.where(length_O > 0, along_O / length_O.clamp(min=1e-30), 0.0).nan_to_num(
            0.0, 0.0, 0.0
        )
        unit_O = None if unit_OG is None else unit_OG[:, group]
        scale_OG[:, group] = grids.storable(scale_OG[:, group] + step_O, grid, unit_O)
        error_OI[:, part] = w_OI[:, part] - u_Og * scale_OG[:, group, None]
    return scale_OG


def place_start(
    w_OGg: Tensor, q_OGg: Tensor, scale_OG: Tensor, zero_OG: Tensor, grid: Grid, margin: float = 0.1
) -> Tensor:
    """Smallest offsets V (out, G, g) with clamp(round(W/s + V) + z, 0, top) = q and W/s + V
    ``margin`` off the edges.

    Edges are q - z -+ 1/2; beyond a bound of the clamp there is none. Small offsets let few sign
    steps undo a choice.
    """
    ratio_OGg = w_OGg.float() / scale_OG[..., None]
    centre_OGg = q_OGg.float() - zero_OG[..., None]
    low_OGg = torch.where(q_OGg <= 0, -torch.inf, centre_OGg - (0.5 - margin))
    high_OGg = torch.where(q_OGg >= grid.top, torch.inf, centre_OGg + (0.5 - margin))
    return torch.clamp(ratio_OGg, low_OGg, high_OGg) - ratio_OGg
