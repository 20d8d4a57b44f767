"""A block that is worse when tuned than rounded to nearest, on samples that were held out."""

import logging

import pytest
import torch
from tiny_models import FAMILIES, tiny_tokenizer

from auto_mmround.errors import UserError
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run import pipeline
from auto_mmround.run.finished import Finished


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
