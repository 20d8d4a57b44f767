"""The analytic step against autograd, and the invariants of the published method."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nearest import round_to_nearest

from auto_mmround.numerics import grids
from auto_mmround.numerics import rounding as rounding_module
from auto_mmround.numerics.grids import Grid
from auto_mmround.numerics.rounding import Rounding

GRIDS = [
    Grid(bits, sym, min_zero=low)
    for bits in (2, 3, 4, 8)
    for sym, low in ((True, 0), (False, 0), (False, 1))
]


def straight_through(x):
    # exactly an integer, so the clamp sees no rounding noise
    return x.detach().round() + (x - x.detach())


def inclusive_clamp(x, low, high):
    """The published clamp lets gradients pass at its bounds; torch.clamp no longer does (seen with
    2.14)."""
    return torch.where((x >= low) & (x <= high), x, x.detach().clamp(low, high))


def state_of(rounding):
    """A copy of everything that steps change."""
    return rounding.offset_OGg.clone(), rounding.ranges.factors_2OG.clone()


def assert_steps_as_autograd(rounding, weight, leaves, least):
    """A step goes against autograd's gradients of the leaves, where those are above the least."""
    grad = torch.randn_like(weight)
    expected = torch.autograd.grad(weight, leaves, grad)
    before = state_of(rounding)
    rounding.step(grad, 1e-3, 1e-3, torch.empty_like(grad))
    for old, new, slope in zip(before, state_of(rounding), expected):  # or offsets alone
        clear = slope.abs() > least
        assert clear.float().mean() > 0.5
        assert torch.equal((old - new)[clear].sign(), slope[clear].sign())


def reference(rounding, offset, low_factor, high_factor):
    """W~ by the published formulas with a straight-through round, for autograd (float32, scale
    dtype float32)."""
    grid, low, high = (
        rounding.grid,
        rounding.ranges.low_OG * low_factor,
        rounding.ranges.high_OG * high_factor,
    )
    if grid.sym:
        scale = torch.where(-low > high, -low, -high) / grid.middle
        zero = torch.full_like(scale, grid.middle)
    else:
        scale = (high - low) / grid.top
        zero = inclusive_clamp(straight_through(-low / scale), grid.min_zero, grid.top)
    scale, zero = scale[..., None], zero[..., None]
    code = inclusive_clamp(straight_through(rounding.w_OGg / scale + offset) + zero, 0, grid.top)
    return grids.from_groups((code - zero) * scale, rounding.columns)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(GRIDS), st.sampled_from([(8, 16), (5, 12), (7, 7)]))
def test_analytic_step_is_the_autograd_step(seed, grid, shape):
    g, columns = shape
    torch.manual_seed(seed)
    w = torch.randn(3, columns) + 0.3 * torch.randn(1)
    rounding = Rounding(w, g, grid._replace(scale_dtype=torch.float32))
    rounding.offset_OGg = torch.empty(rounding.w_OGg.shape).uniform_(-0.6, 0.6)
    rounding.ranges.factors_2OG.uniform_(0.5, 1)
    leaves = [t.clone().requires_grad_() for t in state_of(rounding)]
    weight = reference(rounding, leaves[0], *leaves[1])
    torch.testing.assert_close(weight, rounding.weight(), rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(weight)
    expected = torch.autograd.grad(weight, leaves, grad)
    before = state_of(rounding)
    rounding.step(grad, 1e-3, 1e-3, torch.empty_like(grad))
    for old, new, slope in zip(before, state_of(rounding), expected):
        moved = old - new
        # Factors in the stack of two are held in [0, 1].
        clear = (
            (slope.abs() > 1e-4) & (new > 0) & (new < 1) if len(slope) == 2 else slope.abs() > 1e-6
        )
        assert torch.equal(moved[clear].sign(), slope[clear].sign())


@pytest.mark.parametrize(
    "bits, g, scale_range", [(2, 16, (0, 15)), (4, 32, (0, 63)), (3, 16, (-32, 31))]
)
def test_super_blocks_step_as_autograd_does(bits, g, scale_range):
    """Scales and minima are multiples of a unit; gradients pass straight through to the factor of
    both."""
    torch.manual_seed(1)
    grid = Grid(bits, sym=scale_range[0] < 0, scale_range=scale_range)
    rounding = Rounding(torch.randn(3, 512), g, grid)
    rounding.offset_OGg = torch.empty(rounding.w_OGg.shape).uniform_(-0.6, 0.6)
    rounding.ranges.factors_2OG.uniform_(0.7, 1.3)
    offset, factors = (t.clone().requires_grad_() for t in state_of(rounding))
    first, now = rounding.ranges.blocks, rounding.ranges.now().blocks

    def held(free, value):
        return (value + (free - free.detach()))[..., None]

    scale = held(first.scale_OG * factors[0], now.scale_OG)
    low = held(first.min_OG * factors[0], now.min_OG)
    zero = grid.middle if grid.sym else 0
    code = inclusive_clamp(
        straight_through((rounding.w_OGg + low) / scale + offset) + zero, 0, grid.top
    )
    weight = ((code - zero) * scale - low).flatten(1)
    torch.testing.assert_close(weight, rounding.weight(), rtol=1e-5, atol=1e-5)
    assert_steps_as_autograd(rounding, weight, (offset, factors), 1e-3)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("columns, g", [(64, 16), (50, 16), (33, -1)])
def test_start_is_round_to_nearest(grid, columns, g):
    w = torch.randn(6, columns)
    rounding, codes = Rounding(w, g, grid), round_to_nearest(w, g, grid)
    assert torch.equal(rounding.codes().q_OI, codes.q_OI)
    assert torch.equal(rounding.weight(), grids.dequantize(codes))
    error = (grids.dequantize(codes) - w).abs()
    scale = codes.scale_OG.abs().float().repeat_interleave(codes.group_size, 1)[:, :columns]
    # Half a step, plus what the half-precision scale, the rounded zero point and a full-range top
    # code cost.
    assert (error <= 1.02 * scale + 1e-6).all() and codes.zero_OG.min() >= grid.min_zero


def test_full_range_puts_the_largest_on_the_first_code():
    w = torch.randn(64, 32)
    codes = round_to_nearest(w, 32, Grid(4, True))
    largest = w.abs().argmax(1)
    assert (codes.q_OI[torch.arange(64), largest] == 0).all()
    assert (codes.scale_OG < 0).any() and (codes.scale_OG > 0).any()


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("value", [0.0, 1e-9, 1.0, -1.0])
def test_constant_groups(grid, value):
    codes = round_to_nearest(torch.full((2, 16), value), 8, grid)
    w = grids.dequantize(codes)
    assert w.isfinite().all() and (w - value).abs().max() <= max(1e-5, abs(value) * 0.34)
    assert codes.zero_OG.min() >= grid.min_zero


def test_reach_of_the_published_schedule():
    rounding = Rounding(torch.randn(4, 8), 8, Grid(4, True, torch.float32))
    for step in range(200):
        rounding.step(torch.ones(4, 8), (1 - step / 200) / 200, 0.0, torch.empty(4, 8))
    assert rounding.offset_OGg.abs().max() == pytest.approx(0.5025, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(GRIDS))
def test_scale_factor_step_is_the_autograd_step(seed, grid):
    torch.manual_seed(seed)
    grid = grid._replace(scale_dtype=torch.float32)
    rounding = Rounding(torch.randn(3, 16), 8, grid)
    scale, zero = rounding.scale_and_zero()
    rounding.start_at(scale * 0.9, zero, torch.empty(3, 2, 8).uniform_(-0.6, 0.6))
    offset, factor = (t.clone().requires_grad_() for t in state_of(rounding))
    s, z = (scale * 0.9 * factor[0])[..., None], zero[..., None]
    code = inclusive_clamp(straight_through(rounding.w_OGg / s + offset) + z, 0, grid.top)
    weight = grids.from_groups((code - z) * s, 16)
    torch.testing.assert_close(weight, rounding.weight())
    if grid.factor_rate:
        assert_steps_as_autograd(rounding, weight, (offset, factor), 1e-4)
        return
    assert_steps_as_autograd(rounding, weight, (offset,), 1e-4)
    assert torch.equal(rounding.ranges.factors_2OG, factor.detach())


@pytest.mark.parametrize("closed_form", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
def test_a_step_in_pieces_is_the_step_at_once(grid, closed_form, monkeypatch):
    torch.manual_seed(0)
    w_OI, grads = torch.randn(13, 24), torch.randn(5, 13, 24)
    results = []
    for chunk in (24, 48, 2**18):  # one row, two rows, all rows at a time
        monkeypatch.setattr(rounding_module, "CHUNK", chunk)
        state, into_OI = Rounding(w_OI, 8, grid), torch.empty(13, 24)
        if closed_form:
            state.start_at(*state.scale_and_zero(), torch.zeros_like(state.offset_OGg))
        for grad_OI in grads:
            state.step(grad_OI, 0.2, 0.05, into_OI)
        assert torch.equal(into_OI, state.weight())
        results.append((into_OI, *state_of(state)))
    assert not torch.equal(results[0][0], Rounding(w_OI, 8, grid).weight())
    assert all(
        torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True)
    )
