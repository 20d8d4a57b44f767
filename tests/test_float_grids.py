"""Float grids under the solvers and the sign steps of integers: the same questions, written out."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from nearest import round_to_nearest
from tiny_models import FAMILIES, tiny_tokenizer

from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.model.loading import load
from auto_mmround.numerics import gptq, grids, pieces, scale_search, start
from auto_mmround.numerics import rounding as rounding_module
from auto_mmround.numerics.float_grids import float_grid
from auto_mmround.numerics.moments import Moments, output_error
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.start import StartConfig, closed_form, closed_forms
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.run import job as jobs
from auto_mmround.run.plan import grid_of

# data type, group size, rows that share a scale
KINDS = [
    ("nvfp4", 16, 1), ("mxfp4", 32, 1), ("mxfp8", 32, 1), ("fp8", -1, 1), ("fp8", 128, 128),
    ("fp8", 0, 1),
]  # fmt: skip
SHAPES = [(3, 256), (5, 200), (130, 300), (1, 33)]


def points(kind):
    """Every number of the grid, sorted."""
    bits = 8 if kind in ("fp8", "mxfp8") else 4
    found = grids.levels(torch.arange(2**bits, dtype=torch.uint8), bits)
    return found[found.isfinite()].unique()


def nearest_by_looking(x, table):
    """The nearest number of a table, all distances written out; of two the one whose place in the
    table, counted from zero, is even."""
    distance = (x[..., None] - table).abs()
    best = distance.amin(-1, keepdim=True)
    place = torch.arange(len(table)) - len(table) // 2
    tied = torch.where(distance == best, (place % 2).float(), torch.inf)
    return table[tied.argmin(-1)]


def weight(rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(rows, 1, generator=generator).exp2() * 0.03
    return torch.randn(rows, columns, generator=generator) * spread


def rounding_of(w_OI, kind, size):
    return Rounding(w_OI, size, float_grid(kind, size, w_OI.abs().max()))


def moments_of(columns, tokens=2000, seed=1):
    """Of inputs that hang together, with some loud channels."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns // 4 + 1, generator=generator)
    x = x @ mix[: columns // 4 + 1] + 0.1 * torch.randn(tokens, columns, generator=generator)
    x[:, ::17] *= 4
    found = Moments(columns)
    found.add(x)
    return found


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["nvfp4", "fp8"]), st.floats(-12, 10))
def test_snapping_is_the_nearest_number(seed, kind, size):
    generator = torch.Generator().manual_seed(seed)
    table, grid = points(kind), float_grid(kind, -1, torch.tensor(1.0))
    middles = (table[1:] + table[:-1]) / 2
    x = torch.cat([torch.randn(500, generator=generator) * 2.0**size, table, middles])
    found = grid.snap_(x.clone()).clamp(grid.low, grid.top)
    assert torch.equal(found, nearest_by_looking(x, table))
    assert torch.equal(grid.unpacked(grid.packed(found)), found)
    below, above = grid.gaps(table)
    assert torch.equal(below[1:], table.diff()) and torch.equal(above[:-1], table.diff())


def straight_through(rounding, offset, factor):
    """W~ with a straight-through rounding to a looked-up number, for autograd."""
    grid, ranges = rounding.grid, rounding.ranges
    free = ranges.scale_OG * factor
    held = grid.storable(free.detach())
    scale = (held + (free - free.detach()))[..., None]
    x = rounding.w_OGg / scale + offset
    table = points(grid.data_type)
    step = table[-1] - table[-2]  # half a step beyond the last number still rounds to it
    inside = x.detach().abs() <= table[-1] + step / 2
    code = nearest_by_looking(x.detach(), table)
    return grids.from_groups((code + (x - x.detach()) * inside) * scale, rounding.columns)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(KINDS), st.sampled_from(SHAPES[1:]))
def test_the_step_is_the_autograd_step(seed, kind, shape):
    name, size, rows = kind
    rounding = rounding_of(weight(*shape, seed), name, size)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(rounding.w_OGg.shape, generator=generator) - 0.5
    ratio = rounding.w_OGg / rounding.scale_and_zero()[0][..., None]
    rounding.offset_OGg = noise * rounding.grid.spacing(ratio)
    factor_OG = 0.8 + 0.4 * torch.rand(-(-shape[0] // rows), ratio.shape[1], generator=generator)
    factor_OG = factor_OG.repeat_interleave(rows, 0)[: shape[0]]
    rounding.ranges.factors_2OG[0] = factor_OG
    offset = rounding.offset_OGg.clone().requires_grad_()
    factor = factor_OG.clone().requires_grad_()
    made = straight_through(rounding, offset, factor)
    torch.testing.assert_close(made, rounding.weight(), rtol=1e-6, atol=1e-9)
    grad = torch.randn(made.shape, generator=generator)
    slope, factor_slope = torch.autograd.grad(made, (offset, factor), grad)
    factor_slope = pieces.over_rows(factor_slope, rows)
    x = rounding.w_OGg / rounding.scale_and_zero()[0][..., None] + rounding.offset_OGg
    rounding.step(grad, 1e-2, 1e-2, torch.empty_like(grad))
    moved = offset.detach() - rounding.offset_OGg
    wanted = 1e-2 * slope.sign() * rounding.grid.spacing(x)
    torch.testing.assert_close(moved, wanted, rtol=1e-2, atol=1e-5)
    turned = factor_OG - rounding.ranges.factors_2OG[0]
    clear = factor_slope.abs() > 1e-4 * factor_slope.abs().max()
    rate = 1e-2 * rounding.grid.factor_rate
    torch.testing.assert_close(turned[clear], rate * factor_slope[clear].sign(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name, size, rows", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_exported_is_what_was_tuned(name, size, rows, shape):
    """Through start, steps, the best so far and back to it; scales that the file holds."""
    w_OI = weight(*shape)
    rounding = rounding_of(w_OI, name, size)
    nearest = round_to_nearest(w_OI, size, rounding.grid)
    for part in ("q_OI", "scale_OG"):
        assert torch.equal(getattr(rounding.codes(), part), getattr(nearest, part))
    assert torch.equal(rounding.weight(), grids.dequantize(nearest))
    closed_form([rounding], moments_of(shape[1]), StartConfig())
    into = torch.empty(shape)
    for _ in range(3):
        rounding.step(torch.randn(shape), 0.1, 0.1, into)
        assert torch.equal(into, grids.dequantize(rounding.codes()))
    kept, best = rounding.kept(), into.clone()
    for _ in range(3):
        rounding.step(torch.randn(shape), 0.3, 0.1, into)
    assert not torch.equal(into, best)
    rounding.restore(kept)
    assert torch.equal(rounding.weight(), best)
    assert torch.equal(grids.dequantize(rounding.codes()), best)
    codes = rounding.codes()
    if name == "nvfp4":
        assert torch.equal(codes.scale_OG.to(torch.float8_e4m3fn).float(), codes.scale_OG)
    elif name.startswith("mx"):
        assert bool((torch.frexp(codes.scale_OG).mantissa == 0.5).all())
    elif rows > 1:
        for at in range(0, shape[0], rows):
            block_OG = codes.scale_OG[at : at + rows]
            assert torch.equal(block_OG, block_OG[:1].expand_as(block_OG))


@pytest.mark.parametrize("name, size, rows", KINDS)
def test_searched_scales_are_never_worse_and_the_solve_is_better(name, size, rows):
    w_OI, moments = weight(130, 384), moments_of(384)
    h_II = moments.hessian()
    grid = float_grid(name, size, w_OI.abs().max())
    group = 384 if size == -1 else size
    w_OGg, importance = grids.to_groups(w_OI, group), grids.to_groups(h_II.diagonal()[None], group)
    found = scale_search.search_scale(w_OGg, importance[0], grid)

    def error(scales):
        each_OG = scale_search.weighted_error(w_OGg, importance[0], *scales, grid)
        return pieces.over_rows(each_OG, rows)

    assert torch.equal(grid.storable(found[0]), found[0])
    assert (error(found) <= error(grid.plain(w_OGg)) * (1 + 1e-5)).all()
    searched = grids.quantize(w_OGg, 0.0, found[0][..., None], found[1][..., None], grid)
    rounding = Rounding(w_OI, size, grid)
    errors = [output_error(w_OI, rounding.weight(), h_II)]
    errors.append(output_error(w_OI, grids.from_groups(searched * found[0][..., None], 384), h_II))
    closed_form([rounding], moments, StartConfig())
    errors.append(output_error(w_OI, rounding.weight(), h_II))
    assert errors[2] < 0.8 * errors[0] and errors[1] < 1.001 * errors[0]


def test_blocks_of_nvfp4_choose_between_6_and_4():
    """A block [4, 3, 3, ..] lies on the grid as it is, and not where its largest number becomes
    6."""
    w_OI = torch.tensor([4.0, *[3.0] * 15, 6.0, *[2.0] * 15, 24.0, *[1.0] * 15])[None]
    grid = float_grid("nvfp4", 16, torch.tensor(24.0))
    w_OGg = grids.to_groups(w_OI, 16)
    plain, found = grid.plain(w_OGg)[0], scale_search.search_scale(w_OGg, torch.ones(3, 16), grid)
    assert found[0][0, 0] / plain[0, 0] == pytest.approx(1.5, rel=0.07)
    error = scale_search.weighted_error(w_OGg, torch.ones(3, 16), *found, grid)
    assert (
        error[0, 0]
        < 0.1
        * scale_search.weighted_error(w_OGg, torch.ones(3, 16), *grid.plain(w_OGg), grid)[0, 0]
    )


@pytest.mark.parametrize("name, size, rows", KINDS)
def test_stacked_weights_are_solved_as_each_alone(name, size, rows):
    moments, weights = moments_of(256), {n: weight(m, 256, m) for n, m in (("a", 128), ("b", 40))}
    peak = max(w.abs().max() for w in weights.values())
    grid = float_grid(name, size, peak)
    together = {n: Rounding(w, size, grid) for n, w in weights.items()}
    closed_forms(together, dict.fromkeys(weights, moments), StartConfig())
    for n, w in weights.items():
        alone = Rounding(w, size, grid)
        closed_form([alone], moments, StartConfig())
        assert torch.equal(alone.codes().q_OI, together[n].codes().q_OI)
        assert torch.equal(alone.weight(), together[n].weight())


@pytest.mark.parametrize("name, size, rows", KINDS)
def test_a_step_in_pieces_is_the_step_at_once(name, size, rows, monkeypatch):
    w_OI, grads = weight(300, 64), torch.randn(4, 300, 64)
    results = []
    for chunk in (64, 2**18):
        monkeypatch.setattr(rounding_module, "CHUNK", chunk)
        state, into_OI = rounding_of(w_OI, name, size), torch.empty(300, 64)
        for grad_OI in grads:
            state.step(grad_OI, 0.2, 0.05, into_OI)
        assert torch.equal(into_OI, state.weight())
        results.append(into_OI)
    assert torch.equal(*results)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["nvfp4", "mxfp8"]), st.floats(0, 0.3))
def test_placed_offsets_give_the_codes_off_the_edge(seed, name, margin):
    """Also codes that lie far from the weight, as those that answer for others do; so far that
    float32 still knows the edge."""
    generator = torch.Generator().manual_seed(seed)
    grid, table = float_grid(name, 16, torch.tensor(1.0)), points(name)
    scale_OG = torch.rand(4, 3, generator=generator) + 0.5
    size = grid.top * torch.rand(4, 3, 1, generator=generator)
    w_OGg = torch.randn(4, 3, 16, generator=generator) * scale_OG[..., None] * size
    q_OGg = table[torch.randint(len(table), w_OGg.shape, generator=generator)]
    zero_OG = torch.zeros_like(scale_OG)
    offset = gptq.place_start(w_OGg / scale_OG[..., None], q_OGg, zero_OG, grid, margin)
    near = (q_OGg * scale_OG[..., None] - w_OGg).abs() < 0.2 * grid.top
    given_back = grids.quantize(w_OGg, offset, scale_OG[..., None], zero_OG[..., None], grid)
    kept = offset.to(grid.offset_dtype).float()
    again = grids.quantize(w_OGg, kept, scale_OG[..., None], zero_OG[..., None], grid)
    if margin > 0.01:
        assert torch.equal(given_back[near], q_OGg[near])
        assert torch.equal(again[near], q_OGg[near])


@pytest.mark.parametrize(
    "name, size", [("mxfp4", 32), ("mxfp8", 32), ("fp8", 0), ("fp8", -1), ("nvfp4", 16)]
)
def test_where_no_scale_moves_codes_change_a_few_at_a_time(name, size):
    """A step of MXFP4 changed no code for five steps, then all that the solve had moved at once,
    and the error became many times as large."""
    w_OI = weight(48, 256)
    rounding = rounding_of(w_OI, name, size)
    closed_form([rounding], moments_of(256), StartConfig())
    before, into, grad = rounding.kept().q_OGg, torch.empty_like(w_OI), rounding.weight() - w_OI
    shares = []
    for step in range(10):
        rounding.step(grad, 0.02 * (1 - step / 20), 0.02, into)
        now = rounding.kept().q_OGg
        shares.append((now != before).float().mean().item())
        before = now
    assert sum(shares) > 0.05 and max(shares) < 0.3 * sum(shares)


@pytest.mark.parametrize("name, size", [("fp8", -1), ("nvfp4", 16)])
def test_scales_of_floats_stay_behind_a_solve(name, size):
    """From round to nearest they move."""
    w_OI = weight(48, 256)
    for solved in (False, True):
        rounding = rounding_of(w_OI, name, size)
        if solved:
            closed_form([rounding], moments_of(256), StartConfig())
        assert scales_move(rounding) != solved


@pytest.mark.parametrize(
    "grid, moves",
    [(grids.Grid(2, True), True), (grids.Grid(3, False), False), (grids.Grid(4, True), False),
     (grids.Grid(4, False), False), (grids.Grid(8, True), False),
     (grids.Grid(4, True, scale_range=(-32, 31)), True)],
)  # fmt: skip
def test_scales_of_three_bits_and_more_stay_behind_a_solve(grid, moves):
    """A factor's step of .02 is .16 steps of the largest code of 4 bits, and 2.5 of 8 bits': no
    step was better than the start. From round to nearest ranges move; K types have units."""
    w_OI = weight(48, 256)
    rounding = Rounding(w_OI, 64, grid)
    assert scales_move(rounding)
    rounding = Rounding(w_OI, 64, grid)
    closed_form([rounding], moments_of(256), StartConfig())
    assert scales_move(rounding) == moves


def scales_move(rounding):
    """Whether a sign step moves factors."""
    before = rounding.ranges.factors_2OG.clone()
    rounding.step(torch.randn(48, 256), 0.02, 0.02, torch.empty(48, 256))
    return not torch.equal(rounding.ranges.factors_2OG, before)


@pytest.mark.parametrize("again", [0, 4])
@pytest.mark.parametrize("name, size, rows", KINDS)
def test_sweeps_find_what_the_solve_in_turn_finds(name, size, rows, again):
    """As accelerators solve: experts of one shape together, but not where their rows would share a
    scale. Behind descents few codes differ, for the same error."""
    config = StartConfig(again=again)
    moments = [moments_of(256, seed=seed) for seed in (1, 2)]
    weights = [weight(40, 256, seed) for seed in (1, 2)]
    grid = float_grid(name, size, torch.stack(weights).abs().max())
    alone, swept = ([Rounding(w_OI, size, grid) for w_OI in weights] for _ in range(2))
    for rounding, own in zip(alone, moments, strict=True):
        closed_form([rounding], own, config)
    stacks = [start._Stack([rounding], own) for rounding, own in zip(swept, moments, strict=True)]
    batches = start._batches(stacks)
    assert len(batches) == (1 if rows == 1 else 2)
    doubtful = torch.cat([start._place(batch, config, in_sweeps=True) for batch in batches])
    assert not doubtful.all()
    for one, two, doubted in zip(alone, swept, doubtful.tolist(), strict=True):
        same = (one.codes().q_OI == two.codes().q_OI).float().mean()
        assert doubted or again or same > 0.99  # of fine grids many codes are nearly as good
        assert torch.equal(grids.dequantize(two.codes()), two.weight())
    for one, two, own, w_OI in zip(alone, swept, moments, weights, strict=True):
        errors = [output_error(w_OI, each.weight(), own.hessian()) for each in (one, two)]
        assert errors[1] == pytest.approx(errors[0], rel=0.01)


@pytest.mark.parametrize("scheme", ["NVFP4", "MXFP4A16", "MXFP8", "FP8", "FP8_TENSOR"])
@pytest.mark.parametrize("algorithm", ["auto", "gptq", "sign_round"])
def test_a_run_writes_what_it_tuned(scheme, algorithm, tmp_path):
    FAMILIES["llama"].save(tmp_path / "model", tiny_tokenizer())
    base = Recipe(
        model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), device="cpu", amp=False,
        format="compressed_tensors", algorithm=algorithm, nsamples=8, seqlen=12,
        iters=30 if algorithm == "sign_round" else 3,
    )  # fmt: skip
    recipe = from_mapping({"scheme": scheme}, base=base)
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=FAMILIES["llama"].samples())
    (folder,) = jobs.run(job)
    tuned, read = job.loaded.model.state_dict(), from_quantized(folder).model.state_dict()
    assert tuned.keys() == read.keys() and all(torch.equal(tuned[n], read[n]) for n in tuned)
    nearest = {}
    for name, planned in job.plan.quantized.items():
        w_OI = load(str(tmp_path / "model")).model.get_submodule(name).weight
        codes = round_to_nearest(w_OI, planned.group_size, grid_of(planned, w_OI.abs().max()))
        nearest[name] = torch.equal(grids.dequantize(codes), tuned[f"{name}.weight"].float())
    assert nearest and not all(nearest.values())
    for block in json.loads((folder / "run.json").read_text())["blocks"]:
        assert block["end"] <= block["start"]
