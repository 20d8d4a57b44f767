"""The planner: that it counts what a run does, leaves the model alone, and refuses what can't
work."""

from dataclasses import replace
from itertools import count

import pytest
import torch

from auto_mmround import cli
from auto_mmround.console import show_estimate
from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.numerics.grids import Grid
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.tuner import (
    TuneConfig,
    TunedWeight,
    held_out_split,
    looked_at,
    tune_block,
)
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import estimate as planner
from auto_mmround.run import job as jobs
from auto_mmround.run.writing_cost import check_disk

RECIPE = Recipe(
    model="demo", dataset="demo-text", iters=4, nsamples=16, seqlen=64, batch_size=4, device="cpu"
)


@pytest.fixture(scope="module")
def job():
    return jobs.prepare(RECIPE, jobs.load_model(RECIPE))


def ticks():
    """A clock on which every piece of work takes one second."""
    return map(float, count()).__next__


def test_the_model_stays_and_pieces_are_counted(job):
    before = {name: tensor.clone() for name, tensor in job.loaded.model.state_dict().items()}
    short = planner.estimate(job, clock=ticks())
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in job.loaded.model.state_dict().items()
    )
    assert list(short.seconds) == ["capture", "Fisher information", "text blocks", "writing"]
    # a second for each of 16 samples
    assert short.seconds["capture"] == pytest.approx(16, rel=0.05)
    more = planner.estimate(replace(job, recipe=replace(job.recipe, iters=10)), clock=ticks())
    # Four samples through a block take a second, and so do two steps of four samples less two looks
    # at them: at least a quarter of that. Six steps more, in each of five blocks; and five looks,
    # not four, at two held-out samples.
    difference = more.seconds["text blocks"] - short.seconds["text blocks"]
    assert difference == pytest.approx(5 * (6 * 0.125 + 1 * 2 * 0.25), rel=0.05)
    assert short.fits and not short.advice
    # 16 steps of 4 samples, 20 of 8 and 60 of 8: more than 4 of 4; those of the recipe are its own
    assert sum(short.seconds.values()) < short.presets["light"] < short.presets["default"]
    own = replace(job, recipe=replace(job.recipe, iters=None, batch_size=None, preset="best"))
    best = planner.estimate(own, clock=ticks())
    assert best.presets["best"] == pytest.approx(sum(best.seconds.values()))


def test_compiling_is_counted_apart_and_once_a_kind(job, monkeypatch):
    made, tick = [], count()

    def counting(graph, inputs):
        made.append(graph)
        return graph.forward

    def clock():  # on which every compilation takes 100 seconds
        return float(next(tick)) + 100 * len(made)

    torch.compiler.reset()
    monkeypatch.setitem(devices.TABLE, "cpu", replace(devices.TABLE["cpu"], compiler=counting))
    recipe = replace(job.recipe, enable_torch_compile=True)
    found = planner.estimate(replace(job, recipe=recipe), clock=clock)
    assert made and found.seconds["compiling"] == pytest.approx(100 * len(made), rel=0.1)
    plain = planner.estimate(job, clock=ticks())
    assert found.seconds["text blocks"] == pytest.approx(plain.seconds["text blocks"], rel=0.1)


def test_sizes_are_those_of_the_files(job, tmp_path):
    recipe = replace(
        job.recipe, algorithm="rtn", format="auto_round,auto_awq", output_dir=str(tmp_path)
    )
    plain = jobs.prepare(recipe, job.loaded)
    found = planner.estimate(plain)
    for folder, size in zip(jobs.run(plain), found.sizes.values(), strict=True):
        assert sum(path.stat().st_size for path in folder.rglob("*")) == pytest.approx(
            size, rel=0.05
        )


@pytest.mark.parametrize(("steps", "expected"), [(1, 1), (3, 3), (5, 5), (8, 4), (20, 5), (33, 5)])
def test_held_out_samples_are_looked_at_as_often_as_counted(steps, expected):
    weight = TunedWeight(
        torch.nn.Parameter(torch.randn(4, 8)), Rounding(torch.randn(4, 8), 8, Grid(4, True))
    )
    train, held = held_out_split(16)
    looks = []

    def forward(indices):
        if list(indices) == held:
            looks.append(1)
        yield torch.ones(1, 1, 8) @ weight.parameter.t(), torch.zeros(1, 1, 4), torch.ones(1, 1, 1)

    assert len(held) == 2 and not set(held) & set(train)
    tune_block([weight], forward, 16, TuneConfig(iters=steps, batch_size=4))
    assert (
        len(looks)
        == 1 + expected
        == 1 + sum(looked_at(step, steps) for step in range(1, steps + 1))
    )


def test_what_cannot_work_is_refused_with_flags(job, monkeypatch, tmp_path):
    found = planner.Estimate(
        {"blocks": 60.0},
        memory=9 * 10**9,
        free_memory=8 * 10**9,
        sizes={"a": 10},
        free_disk=20,
        used=(16, 16),
    )
    advice = list(planner._advice(job, found, states=4 * 10**9))
    assert not found.fits and advice[0] == f"--nsamples {int(16 * (1 - 1 / 3.6))}"
    assert "--batch_size 1 --gradient_accumulate_steps 4" in advice
    with pytest.raises(
        UserError, match=r"does not fit \(9\.0 GB .* try --nsamples 11; or"
    ) as caught:
        show_estimate(replace(found, advice=tuple(advice)))
    assert "\n" not in str(caught.value)
    usage = planner.shutil.disk_usage(tmp_path)._replace(free=10**6)
    monkeypatch.setattr(planner.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(UserError, match="MB are free there"):
        check_disk(job)


def test_plan_prints_the_estimate_where_a_dataset_is_named(capsys, tmp_path):
    words = (
        "plan --model demo --dataset demo-text --iters 1 --nsamples 8 --seqlen 64 --device cpu"
        " --format auto_round,fake --output_dir"
    )
    assert cli.main([*words.split(), str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "minutes after loading" in printed and "at the peak" in printed and "are free" in printed
    assert not (tmp_path / "out").exists()
