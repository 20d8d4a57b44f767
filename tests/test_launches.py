"""What an accelerator is asked for, counted on the stand-in: kernels started, waits of the host,
copies, bytes a weight."""

import os
from functools import partial

import accelerator
import mixtures
import pytest
import torch
from accelerator import NAME, memory, watched
from tiny_models import FAMILIES, tiny_tokenizer
from torch import nn

from auto_mmround.model import devices
from auto_mmround.model.experts import separated
from auto_mmround.numerics import descent, gptq, rounding, scale_search, sweeps
from auto_mmround.numerics.activations import rounded_inputs
from auto_mmround.numerics.descent import Descent, in_turn
from auto_mmround.numerics.float_grids import FloatGrid
from auto_mmround.numerics.grids import Grid, ranges, scale_and_zero, to_groups
from auto_mmround.numerics.moments import Moments, sums_wide
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.start import StartConfig, closed_forms
from auto_mmround.numerics.tuner import TuneConfig, TunedWeight, tune_block
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run.finished import Finished
from auto_mmround.run.layers import LayerErrors
from auto_mmround.run.pipeline import quantize

there = pytest.mark.skipif(
    accelerator.compiler() is None, reason="no C++ compiler: c++, or what CXX names"
)
HERE = torch.device(NAME, 0)
GRID = Grid(4, True)


@pytest.fixture(autouse=True)
def device():
    with accelerator.shown(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(devices.TABLE, NAME, accelerator.ROW)
        patch.setattr(os, "fsync", lambda handle: None)
        torch.manual_seed(0)
        yield


def inputs(kind, columns=320):
    """Tokens whose second moments are easy or hard to round under."""
    if kind == "few":
        return torch.randn(40, columns) * torch.exp(0.7 * torch.randn(columns))
    if kind == "alike":
        return torch.randn(2000, columns // 8).repeat(1, 8) + 0.05 * torch.randn(2000, columns)
    x_TI = torch.randn(2000, columns) + 3 * (kind == "mean")
    x_TI[:, :4] *= 100 if kind == "spike" else 1
    return x_TI @ torch.randn(columns, columns) if kind == "mixed" else x_TI


def reads(seen, line=""):
    """How often the host waits for what the device has."""
    return seen.count("wait", line) + seen.count("to host", line)


def plain(w_OI, group_size, grid):
    return scale_and_zero(*ranges(to_groups(w_OI, group_size), grid), grid)


@pytest.mark.parametrize("order", ["none", "weight", "group"])
@pytest.mark.parametrize("grid", [GRID, Grid(2, False), Grid(8, True)])
@pytest.mark.parametrize("kind", ["few", "alike", "mean", "spike", "mixed"])
def test_sweeps_round_as_columns_in_turn_do(kind, grid, order):
    w_OI, own = torch.randn(24, 320), Moments(320)
    own.add(inputs(kind))
    hessian_II, ranges_ = own.hessian(), plain(w_OI, 64, grid)
    in_turn_ = gptq.Solver(hessian_II, 64, grid, gptq.Solving(0.05, order))
    wanted_OI = in_turn_(w_OI, *ranges_)
    solver = sweeps.Sweeping(hessian_II[None], 64, grid, gptq.Solving(0.05, order))
    found_OI = solver(w_OI, *ranges_)
    if not solver.doubtful():  # a sum in another order may move what lies on an edge
        assert (found_OI != wanted_OI).float().mean() < 0.01
    assert kind == "alike" or not solver.doubtful()
    ways = (sweeps.BLOCK, solver.rounded), (descent.WIDTH, partial(in_turn, grid=grid, block=64))
    descents = [
        Descent(hessian_II[None], 64, grid, gptq.Solving(0.05, order), *way) for way in ways
    ]
    found = [(wanted_OI, ranges_[0]), *(each(w_OI, wanted_OI, *ranges_) for each in descents)]
    damped_II = hessian_II + 0.05 * hessian_II.diagonal().mean() * torch.eye(320)
    before_O, after_O, most_O = (
        loss(w_OI, q_OI, damped_II, scale_OG, ranges_[1]) for q_OI, scale_OG in found
    )
    assert (after_O <= before_O * 1.0001).all()
    if kind != "alike":  # there one column's choice is every other's
        gained, possible = (before_O - after_O).sum(), (before_O - most_O).sum()
        assert kind != "mixed" or gained > 0.95 * possible


def loss(w_OI, q_OI, hessian_II, scale_OG, zero_OG):
    """Of every row."""
    error_OI = w_OI - (q_OI - zero_OG.repeat_interleave(64, 1)) * scale_OG.repeat_interleave(64, 1)
    return ((error_OI @ hessian_II) * error_OI).sum(-1)


def test_sweeps_say_what_they_are_not_sure_of(monkeypatch):
    w_OI, own, empty = torch.randn(24, 320), Moments(320), torch.full((320, 320), torch.nan)
    own.add(inputs("mixed"))
    monkeypatch.setattr(sweeps, "SWEEPS", 3)
    how = gptq.Solving(0.05, "weight")
    both = sweeps.Sweeping(torch.stack([own.hessian(), torch.eye(320)]), 64, GRID, how)
    both(torch.cat([w_OI, w_OI]), *(x.repeat(2, 1) for x in plain(w_OI, 64, GRID)))
    assert both.doubtful().tolist() == [True, False]
    assert sweeps.Sweeping(empty[None], 64, GRID, how).doubtful().tolist() == [True]


def moments_of(x_TI, place):
    found = Moments(x_TI.shape[1], device=place)
    found.add(x_TI.to(place))
    return found


@there
@pytest.mark.parametrize("grid", [GRID, Grid(3, False), Grid(4, True, scale_range=(-32, 31))])
def test_the_start_is_that_of_the_processor_also_where_sweeps_are_not_sure(grid, monkeypatch):
    monkeypatch.setattr(descent, "WIDTH", sweeps.BLOCK)  # the same columns at a time

    def found(place, sweeps_=32):
        monkeypatch.setattr(sweeps, "SWEEPS", sweeps_)
        torch.manual_seed(1)
        group = 16 if grid.scale_range else 32
        made = {n: Rounding(torch.randn(40, 256).to(place), group, grid) for n in "abcd"}
        shared = moments_of(inputs("mixed", 256), place)
        own = {"a": shared, "b": shared, "c": moments_of(inputs("mean", 256), place)}
        closed_forms(made, own, StartConfig())
        return [each.codes().q_OI.cpu() for each in made.values()]

    wanted = found("cpu")
    for count in (32, 2):
        for one, two in zip(wanted, found(HERE, count), strict=True):
            assert (one != two).float().mean() < 0.01


@there
@pytest.mark.parametrize("again, most", [(0, 2.0), (4, 6.7)])
def test_launches_of_a_solve(again, most):
    """Five a column, if columns were rounded in turn, and 8 waits a block: 20,516 for 4,096
    columns, and as many for each of four descents."""
    w_OI = torch.randn(8, 1024)
    own = moments_of(torch.randn(1500, 1024), HERE)
    made = {"a": Rounding(w_OI.to(HERE), 128, GRID)}
    with watched() as seen:
        closed_forms(made, {"a": own}, StartConfig(again=again))
    assert seen.count("launch", "numerics/sweeps.py") < (1.4 + 0.8 * again) * 1024
    assert seen.count("launch", "numerics/scale_search.py") < 150
    assert reads(seen) == 1 and seen.count("launch") < most * 1024


@there
def test_a_weight_is_solved_in_parts_alike(monkeypatch):
    """7B's `gate`, `up` and `down` have 2.02 times as many elements as are solved at a time: two
    parts, not two and a few rows, which start as many kernels."""

    def launches(rows):
        made = {"a": Rounding(torch.randn(rows, 256).to(HERE), 64, GRID)}
        own = moments_of(torch.randn(300, 256), HERE)
        with watched() as seen:
            closed_forms(made, {"a": own}, StartConfig())
        return seen.count("launch", "numerics/sweeps.py")

    monkeypatch.setattr(sweeps, "MOST", 50 * 256)
    assert launches(101) == launches(100) < 0.7 * launches(120)


@there
def test_experts_are_solved_together():
    def launches(experts):
        made = {f"{i}": Rounding(torch.randn(8, 256).to(HERE), 64, GRID) for i in range(experts)}
        own = {name: moments_of(torch.randn(300, 256), HERE) for name in made}
        with watched() as seen:
            closed_forms(made, own, StartConfig())
        assert reads(seen) == 1
        return seen.count("launch")

    assert launches(16) - launches(1) < 15 * 80  # what each has of its own: factor and offsets


@there
@pytest.mark.parametrize("grid", [GRID, Grid(8, True), Grid(3, False)])
def test_candidates_of_the_scale_search_go_together(grid, monkeypatch):
    w_OGg, importance_Gg = torch.randn(12, 4, 32).to(HERE), torch.rand(4, 32).to(HERE)
    with watched() as seen:
        found = scale_search.search_scale(w_OGg, importance_Gg, grid)
    assert seen.count("launch") < 150
    monkeypatch.setattr(scale_search, "CHUNK", 1)  # one at a time
    with watched() as seen:
        alone = scale_search.search_scale(w_OGg, importance_Gg, grid)
    assert seen.count("launch") > 250
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(found, alone, strict=True))


@there
def test_waits_and_copies_of_a_run():
    recipe = Recipe(model="demo", dataset="demo", bits=4, iters=5, nsamples=16, seqlen=32,
                    device=NAME)  # fmt: skip
    job = jobs.prepare(recipe, jobs.load_model(recipe))
    finished, blocks = Finished(), job.plan.stages[0].depth
    with watched() as seen:
        quantize(job.loaded.model, job.recipe, job.plan, job.inputs, finished)

    def waits(*files):
        return sum(reads(seen, file) for file in files) / blocks

    assert waits("numerics/tuner.py") <= 3  # the look at nearest, and two behind the steps
    assert waits("run/layers.py") <= 1 and waits("numerics/start.py") <= 1
    assert waits("numerics/moments.py", "numerics/sweeps.py") <= 4  # second moments that rest
    assert waits("numerics/gptq.py") <= 3  # two a weight of which sweeps are not sure
    assert waits("run/block_loss.py", "numerics/rounding.py") == 0
    assert waits("run/loss_weights.py") <= 1  # the block's table, before its steps
    assert seen.count("to device", "numerics/tuner.py") == 0
    assert seen.count("to device", "run/block_loss.py") == 0
    assert seen.count("to device", "run/session.py") <= 4 * blocks  # of layers that share an input
    samples = len(job.inputs)
    assert seen.count("to host", "model/fisher.py") <= 2 * samples  # not one a layer


@there
def test_rounded_inputs_are_made_where_they_lie():
    """No table is copied in, no scale is read: of inputs, of codes, of a whole run."""
    x_TI, whole = torch.randn(4, 64).to(HERE), torch.full((1,), 0.01).to(HERE)
    with watched() as seen:
        for how in (("nvfp4", 4, 16), ("mxfp4", 4, 32), ("fp8", 8, -1), ("int", 8, -1)):
            rounded_inputs(x_TI, *how, None if how[0] in ("mxfp4", "int") else whole)
        grid = FloatGrid("nvfp4", whole=2.0)
        grid.unpacked(grid.packed(grid.snap_(x_TI.clone()).clamp_(-6, 6)))
    assert reads(seen) == seen.count("to device") == 0

    recipe = Recipe(dataset=None, bits=4, act_bits=4, data_type="nvfp4", group_size=16, iters=6,
                    nsamples=8, seqlen=12, amp=False, kv_cache_scheme="fp8", batch_size=2,
                    format="compressed_tensors", device=NAME)  # fmt: skip
    loaded = jobs.Loaded(FAMILIES["llama"].build().to(NAME), tiny_tokenizer(), None, None)
    job = jobs.prepare(recipe, loaded, dataset=FAMILIES["llama"].samples(8))
    with watched() as seen:
        quantize(loaded.model, job.recipe, job.plan, job.inputs, Finished())
    layers = len(job.plan.quantized)
    assert seen.count("to device", "run/served.py") <= 2 * layers
    assert reads(seen, "run/static_inputs.py") <= layers
    assert reads(seen, "run/kv_cache.py") <= 2 * 2  # of keys and values a layer of attention
    assert reads(seen, "run/leaves.py") <= 6 * layers + 2  # codes, and the peaks of a block
    assert seen.count("to device", "numerics/rounding.py") == 0
    assert seen.count("to device", "numerics/activations.py") == 0


@there
def test_a_routing_waits_once_not_once_an_expert():
    model = mixtures.build("qwen3_moe").to(NAME)
    ids_BT = torch.randint(3, 110, (1, 24)).to(HERE)
    with torch.no_grad(), separated(model), watched() as seen:
        model(input_ids=ids_BT, use_cache=False)
    layers = len(model.model.layers)
    assert 0 < reads(seen, "model/experts.py") <= layers
    assert seen.count("to device", "model/experts.py") == 0


@there
def test_products_of_bf16_are_summed_in_float32_where_torch_has_them(monkeypatch):
    x_TI, weight_T = torch.randn(300, 600).bfloat16(), torch.rand(300)
    here, host = Moments(600, device=HERE), Moments(600)
    with watched() as seen:
        here.add(x_TI.to(HERE), weight_T.to(HERE))
    host.add(x_TI, weight_T)
    assert "mm.dtype" in {name for _, name, _ in seen.events}
    torch.testing.assert_close(here.hessian().cpu(), host.hessian(), rtol=0.02, atol=0.005)
    assert sums_wide.__wrapped__("cuda") and not sums_wide.__wrapped__("cpu")
    monkeypatch.setattr(torch.version, "hip", "7.0")  # there it is refused
    assert not sums_wide.__wrapped__("cuda")


@there
def test_states_in_host_memory_come_by_copies_that_nobody_waits_for():
    recipe = Recipe(model="demo", dataset="demo", bits=4, iters=1, nsamples=8, seqlen=32,
                    device=NAME, offload_states=True)  # fmt: skip
    job = jobs.prepare(recipe, jobs.load_model(recipe))
    with watched() as seen:
        quantize(job.loaded.model, job.recipe, job.plan, job.inputs, Finished())
    copies = {
        kind: sum(n for (what, name, where), n in seen.events.items()
                  if what == "to device" and name == kind and "devices.py" in where)
        for kind in ("copy", "copy, non-blocking")
    }  # fmt: skip
    assert copies["copy"] == 0 and copies["copy, non-blocking"] > len(job.inputs)


@there
@pytest.mark.parametrize(
    "grid, tuned, published, more", [(GRID, 43, 70, 21), (Grid(4, False), 49, 85, 27)]
)
def test_launches_of_a_step_of_a_weight(grid, tuned, published, more, monkeypatch):
    """All of them: from a closed form, as published, for each 4 million elements more. 53 before,
    and as many for each 4 million more."""

    def launches(pieces, closed_form):
        monkeypatch.setattr(rounding, "CHUNK_THERE", 48 * 64 // pieces)
        own = Rounding(torch.randn(48, 64).to(HERE, torch.bfloat16), 32, grid)
        if closed_form:
            own.start_at(*own.scale_and_zero(), torch.zeros_like(own.offset_OGg))
        into_OI, grad_OI = torch.zeros(2, 48, 64, dtype=torch.bfloat16, device=HERE)
        own.step(grad_OI, 0.1, 0.1, into_OI)  # makes offsets that have memory
        with watched() as seen:
            own.step(grad_OI, 0.1, 0.1, into_OI)
        assert reads(seen) == seen.count("to device") == 0
        return seen.count("launch")

    assert launches(1, True) <= tuned and launches(1, False) <= published
    assert launches(4, True) - launches(1, True) <= 3 * more


@there
def test_a_sign_step_waits_for_nothing():
    layer = nn.Linear(64, 48, bias=False).to(HERE, torch.bfloat16).requires_grad_(False)
    leaf = TunedWeight(layer.weight, Rounding(layer.weight.data.clone(), 32, GRID))
    x_BTI = torch.randn(8, 16, 64, dtype=torch.bfloat16).to(HERE)
    target_BTO, one = layer(x_BTI).clone(), torch.ones(1, 16, 1).to(HERE)

    def forward(indices):
        for i in indices:
            yield layer(x_BTI[i : i + 1]), target_BTO[i : i + 1], one

    for steps in (4, 12):
        with watched() as seen:
            tune_block([leaf], forward, 8, TuneConfig(iters=steps, batch_size=2, checks=1))
        assert reads(seen) <= 2 and seen.count("to device") == 0


# ---- bytes ------------------------------------------------------------------------------------
WIDTH, INNER = 128, 344  # of Llama's proportions
SHAPES = {"q": (WIDTH, WIDTH), "k": (WIDTH, WIDTH), "v": (WIDTH, WIDTH), "o": (WIDTH, WIDTH),
          "gate": (INNER, WIDTH), "up": (INNER, WIDTH), "down": (WIDTH, INNER)}  # fmt: skip
READS = {"q": "q", "k": "q", "v": "q", "o": "o", "gate": "gate", "up": "gate", "down": "down"}
WEIGHTS = sum(rows * columns for rows, columns in SHAPES.values())


@there
def test_bytes_a_weight_at_the_start_and_in_a_step(monkeypatch):
    """Beside the model. Before: 25 and 18."""
    monkeypatch.setattr(rounding, "CHUNK_THERE", 2**11)
    monkeypatch.setattr(sweeps, "MOST", 2**14)
    own = {
        name: moments_of(torch.randn(400, SHAPES[name][1]), HERE) for name in set(READS.values())
    }
    layers = {name: nn.Linear(columns, rows, bias=False).to(HERE, torch.bfloat16)
              for name, (rows, columns) in SHAPES.items()}  # fmt: skip
    extra = sum(x.nbytes for each in own.values() for x in each.sums())
    before, peaks = memory(0).used - extra, []

    def measured(owner, name):
        inner = getattr(owner, name)

        def call(*args, **kwargs):
            accelerator.forget_peak(0)
            result = inner(*args, **kwargs)
            peaks.append((name, (memory(0).peak - before) / WEIGHTS))
            return result

        monkeypatch.setattr(owner, name, call)

    measured(Rounding, "start_from")
    measured(Rounding, "step")
    leaves = {name: TunedWeight(layer.requires_grad_(False).weight,
                                Rounding(layer.weight.data.clone(), 64, GRID))
              for name, layer in layers.items()}  # fmt: skip
    moments = {name: own[reads] for name, reads in READS.items()}
    x_TI = {columns: torch.randn(1, 4, columns).bfloat16().to(HERE) for columns in (WIDTH, INNER)}
    targets = {name: layer(x_TI[SHAPES[name][1]]) for name, layer in layers.items()}
    one = torch.ones(1, 4, 1).to(HERE)

    def forward(indices):
        for _ in indices:
            for name, layer in layers.items():
                yield layer(x_TI[SHAPES[name][1]]), targets[name], one

    errors = LayerErrors(leaves, moments)
    closed_forms({name: leaf.rounding for name, leaf in leaves.items()}, moments, StartConfig())
    errors.note("start")
    errors.rest()
    tune_block(list(leaves.values()), forward, 8,
               TuneConfig(iters=2, batch_size=1, samples=2))  # fmt: skip
    found = {kind: max(size for name, size in peaks if name == kind) for kind, _ in peaks}
    assert found["start_from"] < 8 and found["step"] < 8


def test_second_moments_are_kept_once():
    own = Moments(1024)
    assert sum(x.nbytes for x in own.sums()) < 0.63 * 4 * 1024**2
