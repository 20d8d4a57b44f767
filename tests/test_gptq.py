"""Moments, scale search, GPTQ solve and start: against slow references and the properties that
callers rely on."""

import logging
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nearest import round_to_nearest
from torch import Tensor

from auto_mmround.numerics import gptq, grids, scale_search
from auto_mmround.numerics.descent import WIDTH, Descent, in_turn
from auto_mmround.numerics.float_grids import FloatGrid
from auto_mmround.numerics.grids import Grid
from auto_mmround.numerics.moments import PANEL, Moments, output_error

FLOATS = [FloatGrid("nvfp4"), FloatGrid("mxfp4")]
GRIDS = [Grid(bits, sym) for bits in (2, 3, 4, 8) for sym in (True, False)]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def weight(rows: int, columns: int, seed: int = 0, heavy: bool = False) -> Tensor:
    w_OI = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return 0.02 * (w_OI.sign() * w_OI.abs() ** 2.5 if heavy else w_OI)


def inputs(tokens: int, features: int, seed: int = 0, uneven: float = 0.5) -> Tensor:
    """Correlated Gaussian tokens: spectrum 1/i, channels of different size."""
    generator = torch.Generator().manual_seed(seed + 1000)
    basis_II = torch.linalg.qr(torch.randn(features, features, generator=generator))[0]
    x_TI = (
        torch.randn(tokens, features, generator=generator)
        / torch.arange(1, features + 1).sqrt()
        @ basis_II
    )
    return x_TI * torch.exp(uneven * torch.randn(features, generator=generator))


def moments(x_TI: Tensor) -> Tensor:
    running = Moments(x_TI.shape[1])
    running.add(x_TI)
    return running.hessian()


def solve(w_OI, hessian, scale_OG, zero_OG, *how) -> Tensor:
    return gptq.Solver(hessian, *how)(w_OI, scale_OG, zero_OG)


def plain(w_OI: Tensor, group_size: int, grid: Grid) -> tuple[Tensor, Tensor]:
    return grids.scale_and_zero(*grids.ranges(grids.to_groups(w_OI, group_size), grid), grid)


def values(q_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_size: int) -> Tensor:
    return (q_OI - zero_OG.repeat_interleave(group_size, 1)) * scale_OG.repeat_interleave(
        group_size, 1
    )


def slow_gptq(w_OI, hessian_II, scale_OG, zero_OG, group_size, grid, dampening, order_I) -> Tensor:
    """The published algorithm, column by column with the Cholesky factor of the inverse,
    float64."""
    hessian_II = hessian_II.double().clone()
    dead_I = hessian_II.diagonal() == 0
    mean = hessian_II.diagonal()[~dead_I].mean()
    hessian_II += torch.diag(torch.where(dead_I, 1.0, dampening) * mean)
    upper_II = torch.linalg.cholesky(torch.linalg.inv(hessian_II[order_I][:, order_I]), upper=True)
    left_OI = w_OI.double()[:, order_I].clone()
    q_OI = torch.empty_like(left_OI)
    for k, column in enumerate(order_I.tolist()):
        scale_O, zero_O = (
            scale_OG[:, column // group_size].double(),
            zero_OG[:, column // group_size].double(),
        )
        q_OI[:, column] = ((left_OI[:, k] / scale_O).round() + zero_O).clamp(0, grid.top)
        error_O = (left_OI[:, k] - scale_O * (q_OI[:, column] - zero_O)) / upper_II[k, k]
        left_OI[:, k:] -= error_O[:, None] * upper_II[k, k:]
    return q_OI


# --------------------------------------------------------------------------------------------------
# moments


@pytest.mark.parametrize("features", [24, PANEL + 40])
def test_moments_are_the_weighted_mean_of_outer_products(features):
    x_BTI, weight_BT = torch.randn(3, 50, features), torch.rand(3, 50)
    weight_BT[:, -7:] = 0  # pads
    running = Moments(features)
    running.add(x_BTI[:2], weight_BT[:2])
    running.add(x_BTI[2:], weight_BT[2:])
    expected_II = torch.einsum("bt,bti,btj->ij", weight_BT, x_BTI, x_BTI) / weight_BT.sum()
    torch.testing.assert_close(running.hessian(), expected_II, atol=1e-5, rtol=1e-4)
    assert torch.equal(running.hessian(), running.hessian().t())


@pytest.mark.parametrize("features", [24, PANEL, 2 * PANEL + 40])
def test_rows_of_second_moments_are_those_of_the_whole(features):
    running = Moments(features)
    running.add(torch.randn(50, features))
    whole_II = running.hessian()
    torch.testing.assert_close(running.diagonal(), whole_II.diagonal(), rtol=0.0, atol=0.0)
    edges = {0, 1, 7, features // 2, PANEL - 1, PANEL, PANEL + 9, features - 1, features}
    for start in edges:
        for stop in edges:
            part = slice(start, max(start, stop))
            assert torch.equal(running.rows(part), whole_II[part])
    assert torch.equal(running.rows(slice(features - 3, features + 99)), whole_II[-3:])


@pytest.mark.parametrize("order", ["none", "weight", "group"])
def test_half_of_the_second_moments_serves_as_well_as_the_whole(order):
    grid, how = Grid(3, False), gptq.Solving(0.05, order)
    w_OI, running = weight(48, 600), Moments(600)
    running.add(inputs(900, 600))
    whole_II, ranges = running.hessian(), plain(w_OI, 40, grid)
    round_, found = partial(in_turn, grid=grid, block=how.block), []
    for hessian in (running, whole_II):
        q_OI = solve(w_OI, hessian, *ranges, 40, grid, how)
        scale_OG = gptq.refit_scale(w_OI, q_OI, hessian, *ranges, 40, grid)
        one_round = Descent(hessian, 40, grid, how, WIDTH, round_)
        found.append([q_OI, scale_OG, *one_round(w_OI, q_OI, scale_OG, ranges[1])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bf16_inputs_are_added_up_in_float32_and_the_precision_setting_survives():
    before = torch.get_float32_matmul_precision()
    x_TI = torch.randn(4096, 32).bfloat16()
    exact_II = (x_TI.double().t() @ x_TI.double() / len(x_TI)).float()
    torch.testing.assert_close(moments(x_TI), exact_II, atol=2e-6, rtol=2e-6)
    assert torch.get_float32_matmul_precision() == before


def test_moments_do_not_keep_a_graph_and_are_zero_at_first():
    running = Moments(4)
    assert not running.hessian().any()
    running.add(torch.randn(3, 4, requires_grad=True))
    assert not running.hessian().requires_grad


def test_teacher_inputs_go_with_cross_moments_only():
    with pytest.raises(ValueError, match="cross"):
        Moments(4).add(torch.ones(1, 4), teacher=torch.ones(1, 4))
    with pytest.raises(ValueError, match="cross"):
        Moments(4).cross()


def test_retarget_brings_the_student_nearer_to_the_teachers_output():
    teacher_TI, w_OI = inputs(400, 16), weight(8, 16)
    student_TI = teacher_TI @ (
        torch.eye(16) + 0.1 * torch.randn(16, 16, generator=torch.Generator().manual_seed(1))
    )
    running = Moments(16, cross=True)
    running.add(student_TI, teacher=teacher_TI)
    target_TO = teacher_TI @ w_OI.t()

    def distance(candidate_OI):
        return (student_TI @ candidate_OI.t() - target_TO).square().sum()

    exact_OI = gptq.retarget(w_OI, running.hessian(), running.cross(), dampening=1e-6)
    assert distance(exact_OI) < 1e-4 * distance(w_OI)
    assert distance(gptq.retarget(w_OI, running.hessian(), running.cross())) < distance(w_OI)
    same = Moments(16, cross=True)
    same.add(teacher_TI, teacher=teacher_TI)
    torch.testing.assert_close(gptq.retarget(w_OI, same.hessian(), same.cross()), w_OI)


# --------------------------------------------------------------------------------------------------
# scale search


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("heavy", [False, True])
def test_search_is_never_worse_than_the_plain_scale(grid, heavy):
    w_OGg = grids.to_groups(weight(24, 128, heavy=heavy), 32)
    importance_Gg = torch.rand(4, 32) ** 3
    found, before = (
        scale_search.search_scale(w_OGg, importance_Gg, grid),
        plain(w_OGg.flatten(1), 32, grid),
    )
    better_OG = scale_search.weighted_error(w_OGg, importance_Gg, *found, grid)
    worse_OG = scale_search.weighted_error(w_OGg, importance_Gg, *before, grid)
    assert (better_OG <= worse_OG).all()
    assert better_OG.sum() < (0.9 if grid.bits < 8 else 1.0) * worse_OG.sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("heavy", [False, True])
def test_search_matches_the_fine_grid_of_two_hundred_scales(bits, heavy):
    grid = Grid(bits, True)
    w_OGg, importance_Gg = (
        grids.to_groups(weight(64, 512, heavy=heavy), 128),
        torch.rand(4, 128) + 0.1,
    )
    low_OG, high_OG = w_OGg.amin(-1), w_OGg.amax(-1)
    largest_OG = torch.where(-low_OG > high_OG, low_OG, high_OG)
    step, span = (0.01, 90) if bits == 2 else (0.0075 * grid.middle, 100)
    zero_OG = torch.full_like(low_OG, grid.middle)
    full_OG = torch.stack(
        [
            scale_search.weighted_error(
                w_OGg,
                importance_Gg,
                grids.storable(-largest_OG / (grid.middle - step * i), grid),
                zero_OG,
                grid,
            )
            for i in range(-span, span + 1)
        ]
    ).amin(0)
    found_OG = scale_search.weighted_error(
        w_OGg, importance_Gg, *scale_search.search_scale(w_OGg, importance_Gg, grid), grid
    )
    assert found_OG.sum() <= 1.001 * full_OG.sum()


@pytest.mark.parametrize("heavy", [False, True])
def test_asymmetric_search_matches_a_grid_of_ranges(heavy):
    grid = Grid(3, False)
    w_OGg, importance_Gg = (
        grids.to_groups(weight(48, 256, heavy=heavy), 64),
        torch.rand(4, 64) + 0.1,
    )
    low_OG, high_OG = grids.ranges(w_OGg, grid)
    full_OG = torch.stack(
        [
            scale_search.weighted_error(
                w_OGg,
                importance_Gg,
                *grids.scale_and_zero(low_OG * a / 20, high_OG * b / 20, grid),
                grid,
            )
            for a in range(6, 21)
            for b in range(6, 21)
        ]
    ).amin(0)
    found_OG = scale_search.weighted_error(
        w_OGg, importance_Gg, *scale_search.search_scale(w_OGg, importance_Gg, grid), grid
    )
    assert found_OG.sum() <= 1.003 * full_OG.sum()


@pytest.mark.parametrize("bits", [2, 4])
def test_asymmetric_search_keeps_to_the_smallest_zero_point_and_positive_scales(bits):
    grid = Grid(bits, False, min_zero=1)
    # all positive: the free zero point would be 0
    w_OGg = grids.to_groups(weight(16, 64).abs(), 32)
    scale_OG, zero_OG = scale_search.search_scale(w_OGg, torch.ones(2, 32), grid)
    assert (
        (zero_OG >= 1).all()
        and (zero_OG <= grid.top).all()
        and torch.equal(zero_OG, zero_OG.round())
    )
    assert (scale_OG > 0).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_searched_scales_are_what_the_file_holds(grid):
    w_OGg = grids.to_groups(weight(8, 64), 32)
    w_OGg[0, 0] = 0  # a group of zeros
    scale_OG, _ = scale_search.search_scale(w_OGg, torch.rand(2, 32), grid)
    assert torch.equal(scale_OG, scale_OG.half().float())
    assert (scale_OG.abs() >= grid.bounds[0]).all()


def test_search_is_the_same_in_chunks_for_each_row_and_without_importance(monkeypatch):
    grid, w_OGg, importance_Gg = (
        Grid(3, True),
        grids.to_groups(weight(20, 64), 32),
        torch.rand(2, 32),
    )
    whole = scale_search.search_scale(w_OGg, importance_Gg, grid)
    monkeypatch.setattr(scale_search, "CHUNK", 200)
    chunked = scale_search.search_scale(w_OGg, importance_Gg.expand(20, 2, 32), grid)
    assert all(torch.equal(a, b) for a, b in zip(whole, chunked, strict=True))
    blank = scale_search.search_scale(w_OGg, torch.zeros(2, 32), grid)
    assert torch.equal(blank[0], scale_search.search_scale(w_OGg, torch.ones(2, 32), grid)[0])


def test_search_uses_both_signs():
    scale_OG, _ = scale_search.search_scale(
        grids.to_groups(weight(32, 128), 32), torch.ones(4, 32), Grid(2, True)
    )
    assert (scale_OG < 0).any() and (scale_OG > 0).any()


# --------------------------------------------------------------------------------------------------
# solve


def solved_error(w_OI, hessian_II, scale_OG, zero_OG, group_size, grid, order="none"):
    q_OI = solve(w_OI, hessian_II, scale_OG, zero_OG, group_size, grid, gptq.Solving(order=order))
    return output_error(w_OI, values(q_OI, scale_OG, zero_OG, group_size), hessian_II)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", ["none", "weight"])
@pytest.mark.parametrize("block", [7, 16, 64])
def test_solve_equals_the_published_algorithm(grid, order, block):
    w_OI, hessian_II = weight(12, 64, seed=grid.bits), moments(inputs(300, 64))
    scale_OG, zero_OG = plain(w_OI, 16, grid)
    order_I = (
        hessian_II.diagonal().argsort(descending=True) if order == "weight" else torch.arange(64)
    )
    expected_OI = slow_gptq(w_OI, hessian_II, scale_OG, zero_OG, 16, grid, 0.01, order_I)
    q_OI = solve(
        w_OI, hessian_II, scale_OG, zero_OG, 16, grid, gptq.Solving(order=order, block=block)
    )
    assert torch.equal(q_OI.double(), expected_OI)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_uncorrelated_inputs_are_rounded_to_nearest(grid):
    w_OI = weight(12, 64)
    codes = round_to_nearest(w_OI, 16, grid)
    q_OI = solve(w_OI, torch.diag(torch.rand(64) + 0.1), *plain(w_OI, 16, grid), 16, grid)
    assert torch.equal(q_OI.to(torch.uint8), codes.q_OI)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_solve_halves_the_error_on_correlated_inputs(grid):
    w_OI, hessian_II = weight(32, 128), moments(inputs(1000, 128))
    scale_OG, zero_OG = plain(w_OI, 32, grid)
    nearest = output_error(w_OI, grids.dequantize(round_to_nearest(w_OI, 32, grid)), hessian_II)
    assert solved_error(w_OI, hessian_II, scale_OG, zero_OG, 32, grid) < 0.6 * nearest


def test_order_by_weight_helps_on_uneven_channels():
    grid, total = Grid(3, True), {"none": 0.0, "weight": 0.0}
    for seed in range(4):
        w_OI, hessian_II = weight(32, 128, seed), moments(inputs(1000, 128, seed, uneven=1.0))
        for order in total:
            total[order] += solved_error(
                w_OI, hessian_II, *plain(w_OI, 32, grid), 32, grid, order=order
            )
    assert total["weight"] < 0.9 * total["none"]


def test_search_then_solve_then_refit_each_lower_the_error():
    grid, w_OI, hessian_II = Grid(3, True), weight(32, 128), moments(inputs(1000, 128))
    alone = solved_error(w_OI, hessian_II, *plain(w_OI, 32, grid), 32, grid)
    importance_Gg = hessian_II.diagonal().reshape(-1, 32)
    scale_OG, zero_OG = scale_search.search_scale(grids.to_groups(w_OI, 32), importance_Gg, grid)
    q_OI = solve(w_OI, hessian_II, scale_OG, zero_OG, 32, grid)
    refit_OG = gptq.refit_scale(w_OI, q_OI, hessian_II, scale_OG, zero_OG, 32, grid)
    both, after = (
        output_error(w_OI, values(q_OI, s_OG, zero_OG, 32), hessian_II)
        for s_OG in (scale_OG, refit_OG)
    )
    assert after < both < alone
    assert torch.equal(refit_OG, refit_OG.half().float())


@pytest.mark.parametrize("size", [8, 16, 64])  # products of two groups at once, and of one
def test_refit_fits_each_group_to_the_errors_of_all_others(size):
    grid, w_OI, hessian_II = (
        Grid(3, False, torch.float32),
        weight(16, 256),
        moments(inputs(900, 256)),
    )
    scale_OG, zero_OG = plain(w_OI, size, grid)
    q_OI = solve(w_OI, hessian_II, scale_OG, zero_OG, size, grid)
    wanted_OG, u_OI = scale_OG.double(), (q_OI - zero_OG.repeat_interleave(size, 1)).double()
    for group in range(256 // size):
        u_OGg = torch.zeros_like(u_OI)
        u_OGg[:, group * size : (group + 1) * size] = u_OI[:, group * size : (group + 1) * size]
        under_OI = u_OGg @ hessian_II.double()
        error_OI = w_OI - u_OI * wanted_OG.repeat_interleave(size, 1)
        wanted_OG[:, group] += (error_OI * under_OI).sum(1) / (u_OGg * under_OI).sum(1)
    found_OG = gptq.refit_scale(w_OI, q_OI, hessian_II, scale_OG, zero_OG, size, grid)
    torch.testing.assert_close(found_OG.double(), wanted_OG, rtol=1e-3, atol=0.0)
    assert not torch.equal(found_OG, scale_OG)


def descent(hessian_II, size, grid, how=gptq.PLAINLY, width=WIDTH):
    in_turn_ = partial(in_turn, grid=grid, block=how.block)
    return Descent(hessian_II[None], size, grid, how, width, in_turn_)


def slow_round(w_OI, q_OI, hessian_II, scale_OG, zero_OG, size, grid, width) -> tuple[Tensor, ...]:
    """Every code of ``width`` columns in turn set to the best of all that the grid has, and then
    every scale of them to the best there is, the others as they are."""
    q_OI, scale_OG, own = q_OI.clone(), scale_OG.clone(), torch.arange(grid.low, grid.top + 1.0)
    hessian_II = hessian_II.double()
    for first in range(0, w_OI.shape[1], width):
        for k in range(first, first + width):
            tried = q_OI.repeat(len(own), 1, 1)
            tried[..., k] = own[:, None]
            error = w_OI - torch.stack([values(q, scale_OG, zero_OG, size) for q in tried])
            q_OI[:, k] = own[((error.double() @ hessian_II) * error).sum(-1).argmin(0)]
        for group in range(first // size, (first + width) // size if width >= size else 0):
            u_OI = torch.zeros_like(q_OI)
            part = slice(group * size, (group + 1) * size)
            u_OI[:, part] = q_OI[:, part] - zero_OG[:, group, None]
            under_OI = u_OI.double() @ hessian_II
            error_OI = w_OI - values(q_OI, scale_OG, zero_OG, size)
            step_O = (error_OI * under_OI).sum(1) / (u_OI * under_OI).sum(1)
            scale_OG[:, group] = grid.storable(scale_OG[:, group] + step_O.float())
    return q_OI, scale_OG


@pytest.mark.parametrize("grid", GRIDS[:4])
@pytest.mark.parametrize(("block", "width"), [(1, 16), (7, 32), (64, 48), (64, 8)])
def test_a_round_sets_each_code_and_scale_to_the_best_for_the_others(grid, block, width):
    w_OI, hessian_II = weight(6, 96), moments(inputs(500, 96))
    scale_OG, zero_OG = plain(w_OI, 16, grid)
    q_OI = solve(w_OI, hessian_II, scale_OG, zero_OG, 16, grid)
    one_round = descent(hessian_II, 16, grid, gptq.Solving(0.0, "none", block), width)
    found_OI, found_OG = one_round(w_OI, q_OI, scale_OG, zero_OG)
    wanted_OI, wanted_OG = slow_round(w_OI, q_OI, hessian_II, scale_OG, zero_OG, 16, grid, width)
    assert torch.equal(found_OI, wanted_OI) and not torch.equal(found_OI, q_OI)
    torch.testing.assert_close(found_OG, wanted_OG, rtol=1e-3, atol=0.0)
    assert one_round.fits == (width >= 16) == (not torch.equal(found_OG, scale_OG))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([*GRIDS, *FLOATS]), st.sampled_from([16, 48, 256]), st.integers(0, 50))
def test_a_round_never_raises_the_error(grid, width, seed):
    w_OI, x_TI = weight(8, 64, seed), inputs(100, 64, seed)
    x_TI[:, 5] = 0
    hessian_II = moments(x_TI)
    size = 16
    if isinstance(grid, FloatGrid):
        scale_OG, zero_OG = grid.plain(grids.to_groups(w_OI, size))
    else:
        scale_OG, zero_OG = plain(w_OI, size, grid)
    how = gptq.Solving(0.01, block=24)
    q_OI = solve(w_OI, hessian_II, scale_OG, zero_OG, size, grid, how)
    damped_II = hessian_II + 0.01 * hessian_II.diagonal().mean() * torch.eye(64)
    one_round, errors = descent(hessian_II, size, grid, how, width), []
    for _ in range(3):
        errors.append(output_error(w_OI, values(q_OI, scale_OG, zero_OG, size), damped_II))
        q_OI, scale_OG = one_round(w_OI, q_OI, scale_OG, zero_OG)
        assert q_OI.min() >= grid.low and q_OI.max() <= grid.top
    assert errors[1] <= errors[0] * (1 + 1e-5) and errors[2] <= errors[1] * (1 + 1e-5)


def test_second_moments_that_say_nothing_leave_codes_nearest():
    w_OI, empty = weight(4, 32), torch.full((32, 32), torch.nan)
    scale_OG, zero_OG = plain(w_OI, 16, GRIDS[0])
    nearest_OI = solve(w_OI, torch.eye(32), scale_OG, zero_OG, 16, GRIDS[0])
    found_OI, found_OG = descent(empty, 16, GRIDS[0])(w_OI, nearest_OI, scale_OG, zero_OG)
    assert torch.equal(found_OI, nearest_OI) and torch.equal(found_OG, scale_OG)


def test_columns_without_inputs_are_rounded_to_nearest_and_disturb_no_other():
    grid, x_TI, w_OI = Grid(4, True), inputs(300, 32), weight(8, 32)
    x_TI[:, [3, 20]] = 0
    hessian_II, ranges = moments(x_TI), plain(w_OI, 16, grid)
    changed_OI = w_OI.clone()
    changed_OI[:, 3] *= -0.5
    one, other = (solve(w, hessian_II, *ranges, 16, grid) for w in (w_OI, changed_OI))
    live_I = torch.arange(32) != 3
    assert torch.equal(one[:, live_I], other[:, live_I])
    nearest_OI = round_to_nearest(w_OI, 16, grid).q_OI
    assert torch.equal(one[:, [3, 20]].to(torch.uint8), nearest_OI[:, [3, 20]])
    unseen = solve(w_OI, torch.zeros(32, 32), *ranges, 16, grid)
    assert torch.equal(unseen.to(torch.uint8), nearest_OI)


def test_dampening_grows_and_the_last_resort_is_rounding_to_nearest(caplog):
    grid, w_OI = Grid(4, True), weight(8, 32)
    ranges, nearest_OI = plain(w_OI, 16, grid), round_to_nearest(w_OI, 16, grid).q_OI
    with caplog.at_level(logging.WARNING, "auto_mmround"):
        solve(
            w_OI,
            moments(inputs(300, 32)) - 0.02 * torch.eye(32),
            *ranges,
            16,
            grid,
            gptq.Solving(0),
        )
        assert "dampening" in caplog.text and "nearest" not in caplog.text
        broken = solve(w_OI, torch.full((32, 32), torch.nan), *ranges, 16, grid)
    assert "rounded to nearest" in caplog.text
    assert torch.equal(broken.to(torch.uint8), nearest_OI)


def test_solve_is_deterministic_and_leaves_its_arguments_alone():
    grid, w_OI, hessian_II = Grid(2, False), weight(16, 64), moments(inputs(300, 64))
    scale_OG, zero_OG = plain(w_OI, 16, grid)
    arguments = (w_OI, hessian_II, scale_OG, zero_OG)
    copies = [t.clone() for t in arguments]
    results = [solve(*arguments, 16, grid, gptq.Solving(order="weight")) for _ in range(2)]
    assert torch.equal(*results)
    assert all(torch.equal(a, b) for a, b in zip(arguments, copies, strict=True))


# --------------------------------------------------------------------------------------------------
# start


@settings(max_examples=150, deadline=None)
@given(
    bits=st.integers(2, 8),
    sym=st.booleans(),
    margin=st.floats(0.01, 0.5),
    spread=st.floats(0.01, 300),
    scale=st.floats(1e-4, 1.0),
    seed=st.integers(0, 2**31),
)
def test_start_gives_back_the_integers_with_the_smallest_offsets(
    bits, sym, margin, spread, scale, seed
):
    generator, grid = torch.Generator().manual_seed(seed), Grid(bits, sym)
    scale_OG = torch.full((3, 2), scale) * torch.randint(0, 2, (3, 2), generator=generator).mul(
        2
    ).sub(1)
    zero_OG = torch.full((3, 2), float(grid.middle))
    if not sym:
        zero_OG = torch.randint(0, grid.top + 1, (3, 2), generator=generator).float()
    w_OGg = torch.randn(3, 2, 8, generator=generator) * spread * scale
    q_OGg = torch.randint(0, grid.top + 1, (3, 2, 8), generator=generator).float()
    offset_OGg = gptq.place_start(w_OGg / scale_OG[..., None], q_OGg, zero_OG, grid, margin)
    scale_OG1, zero_OG1 = scale_OG[..., None], zero_OG[..., None]
    assert torch.equal(grids.quantize(w_OGg, offset_OGg, scale_OG1, zero_OG1, grid), q_OGg)

    ratio_OGg, centre_OGg = w_OGg / scale_OG1, q_OGg - zero_OG1
    shifted_OGg = ratio_OGg + offset_OGg
    slack = 1e-3  # float32 at |W/s| up to some thousands
    inner_OGg = (q_OGg > 0) & (q_OGg < grid.top)
    assert ((shifted_OGg - centre_OGg).abs()[inner_OGg] <= 0.5 - margin + slack).all()
    moved_OGg = offset_OGg.abs() > slack  # what moved, moved just to the margin's edge
    assert ((shifted_OGg - centre_OGg).abs()[moved_OGg] >= 0.5 - margin - slack).all()
    beyond_OGg = ((q_OGg == 0) & (ratio_OGg < centre_OGg)) | (
        (q_OGg == grid.top) & (ratio_OGg > centre_OGg)
    )
    assert not offset_OGg[beyond_OGg].any()


@pytest.mark.parametrize("size", [1, 6, 7, 600])
def test_the_factor_takes_the_place_of_the_matrix(size):
    draw = torch.Generator().manual_seed(size)
    x = torch.randn(2 * size, size, generator=draw)
    hessian, order = x.t() @ x / len(x), torch.randperm(size, generator=draw)
    kept = hessian.clone()
    feedback, sound = gptq.factor(hessian, order, 0.01)
    assert sound and torch.equal(hessian, kept)
    damped = hessian[order[:, None], order]
    damped += 0.01 * damped.diagonal().mean() * torch.eye(size)
    root = torch.linalg.cholesky(damped.flip(0, 1), upper=True).flip(0, 1)
    torch.testing.assert_close(feedback, root / root.diagonal()[:, None])
