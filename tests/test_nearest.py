"""A block that is worse when tuned than rounded to nearest, on samples that were held out."""

import logging

import pytest
import torch
from tiny_models import FAMILIES, tiny_tokenizer

from auto_mmround.errors import UserError
from auto_mmround.numerics.grids import Grid
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.tuner import TunedWeight, TuneResult, mean_error
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run import pipeline
from auto_mmround.run.finished import Finished
from auto_mmround.run.nearest import Nearest, errors_by_sample


def run(louder=1.0, **options):
    """What a run of a tiny model finished, and the model. louder: the second block's MLP."""
    made = FAMILIES["llama"]
    recipe = Recipe(dataset=None, group_size=32, nsamples=16, seqlen=12, amp=False, **options)
    loaded = jobs.Loaded(made.build(), tiny_tokenizer(), None, None)
    with torch.no_grad():
        for parameter in loaded.model.model.layers[1].mlp.parameters():
            parameter *= louder
    job = jobs.prepare(recipe, loaded, dataset=made.samples(16))
    finished = Finished()
    pipeline.quantize(loaded.model, job.recipe, job.plan, job.inputs, finished)
    return finished, loaded.model


def spoilt(roundings, moments, config):
    """A start at three times the scales."""
    for rounding in roundings.values():
        scale_OG, zero_OG = rounding.scale_and_zero()
        rounding.start_at(3 * scale_OG, zero_OG, rounding.offset_OGg)


@pytest.mark.parametrize("iters", [0, 1])
def test_what_is_worse_than_nearest_is_not_kept(monkeypatch, caplog, iters):
    nearest, expected = run(algorithm="rtn")
    monkeypatch.setattr(pipeline, "starting", lambda how: spoilt)
    options = {"algorithm": "auto", "iters": iters, "lr": 1e-6} if iters else {"algorithm": "gptq"}
    with caplog.at_level(logging.WARNING):
        found, model = run(**options)
    assert found.codes.keys() == nearest.codes.keys()
    for name, codes in found.codes.items():
        assert torch.equal(codes.q_OI, nearest.codes[name].q_OI)
        assert torch.equal(codes.scale_OG, nearest.codes[name].scale_OG)
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, expected.get_submodule(name).weight)
    for block, report in found.reports.items():
        assert report.end == report.nearest < report.start and report.best_iter == 0
        assert f"{block}: stays rounded to nearest" in caplog.text
        for errors in report.layers.values():
            assert errors["end"] == errors["nearest"] < errors["start"]


@pytest.mark.parametrize(
    ("by_sample", "kept"),
    [
        (([9.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0]), True),  # one has most of the error
        (([9.0, 3.0, 1.0, 3.0], [2.0, 2.0, 2.0, 2.0]), True),
        (([9.0, 3.0, 4.0, 3.0], [2.0, 2.0, 2.0, 2.0]), False),
        (([9.0, 0.0], [2.0, 0.0]), True),
        (([3.0, 4.0], [2.0, 2.0]), False),
        (([3.0], [2.0]), False),
    ],
)
def test_one_sample_alone_does_not_undo_a_block(by_sample, kept, caplog):
    weight = torch.nn.Parameter(torch.randn(8, 64), requires_grad=False)
    leaf = TunedWeight(weight, Rounding(weight.data.clone(), 32, Grid(3, True)))
    before = leaf.rounding
    leaf.refresh()
    rounded_OI = weight.clone()

    def errors():
        return by_sample[torch.equal(weight, rounded_OI)]

    nearest = Nearest.of({"w": leaf}, 2.0, errors)
    scale_OG, zero_OG = before.scale_and_zero()
    before.start_at(3 * scale_OG, zero_OG, before.offset_OGg)
    leaf.refresh()
    tuned_OI, result = weight.clone(), TuneResult(11.0, sum(by_sample[0]) / len(by_sample[0]), 5)
    found, back = nearest.at_worst(result, {"w": leaf}, "block")
    assert back != kept and ("stays rounded" in caplog.text) != kept
    assert torch.equal(weight, tuned_OI if kept else rounded_OI)
    wanted_OG = (3 if kept else 1) * scale_OG
    torch.testing.assert_close(leaf.codes().scale_OG.float(), wanted_OG, rtol=1e-3, atol=0.0)
    assert found == (result if kept else TuneResult(11.0, 2.0, 0))


def test_errors_by_sample_have_the_mean_of_all():
    errors = torch.tensor([1.0, 2.0, 6.0])

    def forward(indices):
        for i in indices:
            yield errors[i].sqrt().expand(1, 4, 2), torch.zeros(1, 4, 2), torch.ones(1, 4, 2)

    assert errors_by_sample(forward, [0, 1, 2]) == pytest.approx([1.0, 2.0, 6.0])
    assert mean_error(forward, [0, 1, 2], 2) == pytest.approx(3.0)


def test_what_is_better_is_kept(caplog):
    found, _ = run(algorithm="gptq", fisher=False)
    assert "stays rounded" not in caplog.text
    assert all(report.end < report.nearest for report in found.reports.values())
    for report in found.reports.values():
        assert all(errors["end"] == errors["start"] for errors in report.layers.values())


def test_the_last_parameters_are_kept_where_they_are_asked_for(monkeypatch):
    monkeypatch.setattr(pipeline, "starting", lambda how: spoilt)
    found, _ = run(iters=1, lr=1e-6, not_use_best_mse=True)
    assert all(report.end > report.nearest for report in found.reports.values())


@pytest.mark.parametrize("options", [{"iters": 1}, {"algorithm": "gptq"}])
def test_a_block_whose_error_overflows_stays_rounded_to_nearest(options, caplog):
    nearest, _ = run(1e9, algorithm="rtn")
    found, _ = run(1e9, **options)
    assert "model.layers.1: its held-out error is inf" in caplog.text
    assert "model.layers.0: " not in caplog.text
    for name, codes in found.codes.items():
        same = torch.equal(codes.q_OI, nearest.codes[name].q_OI)
        assert same == name.startswith("model.layers.1.")
    errors = found.reports["model.layers.1"].layers["model.layers.1.self_attn.v_proj"]
    assert errors["end"] == errors["nearest"] != errors["start"]


def test_outputs_that_are_no_numbers_are_said():
    with pytest.raises(UserError, match="holds NaN or infinity: mend the model's weights"):
        run(1e14)
