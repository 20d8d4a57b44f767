"""The output head is solved on what the last norm gives, and kept where the KL of words falls."""

from dataclasses import replace

import pytest
import torch
from test_served import first_blocks, served, tuned
from test_undone import samples, tiny_llama
from tiny_models import FAMILIES

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.numerics.tuner import held_out_split
from auto_mmround.recipe.recipe import Recipe

RECIPE = Recipe(
    bits=4, group_size=16, format="compressed_tensors", iters=2, batch_size=4, amp=False,
    quant_lm_head=True,
)  # fmt: skip


def words(model, head, inputs):
    """Log probabilities at all positions, with another head's weight."""
    with torch.no_grad():
        hidden = [model.model(**sample.kwargs).last_hidden_state[0] for sample in inputs]
        return torch.cat([torch.nn.functional.linear(x, head).log_softmax(-1) for x in hidden])


def divergence(wanted, own):
    return (wanted.exp() * (wanted - own)).sum(-1).mean().item()


@pytest.mark.parametrize("bits", [4, 8])
def test_it_is_better_than_nearest_and_what_the_report_says(bits):
    model, inputs = tiny_llama(2), samples(24)
    original = model.lm_head.weight.clone()
    recipe = replace(RECIPE, layer_config={"lm_head": {"bits": bits}})
    finished, _ = tuned(model, inputs, recipe)
    report = finished.reports["outside the blocks"]
    held = [inputs[i] for i in held_out_split(24)[1]]
    wanted = words(model, original, held)
    assert report.end == pytest.approx(divergence(wanted, words(model, model.lm_head.weight, held)),
                                       rel=1e-3)  # fmt: skip
    nearest = tiny_llama(2)
    tuned(nearest, inputs, replace(recipe, algorithm="rtn"))
    plain = divergence(wanted, words(model, nearest.lm_head.weight, held))
    assert report.nearest == pytest.approx(plain, rel=1e-3)
    assert report.end < (0.9 if bits == 4 else 1.0) * report.nearest
    assert finished.codes["lm_head"].bits == bits


def test_it_sees_rounded_inputs_of_its_own_and_of_the_blocks():
    model, inputs = tiny_llama(2), samples(24)
    original = model.lm_head.weight.clone()
    finished, plan = tuned(model, inputs, replace(RECIPE, act_bits=8))
    held = [inputs[i] for i in held_out_split(24)[1]]
    with torch.no_grad(), served(model, plan):
        hidden = [model.model(**sample.kwargs).last_hidden_state[0] for sample in held]
        own = torch.cat([model.lm_head(x).log_softmax(-1) for x in hidden])
        wanted = torch.cat([(x @ original.T).log_softmax(-1) for x in hidden])
    end = finished.reports["outside the blocks"].end
    assert end == pytest.approx(divergence(wanted, own), rel=1e-3)


def test_a_run_that_goes_on_gives_the_same_head():
    whole, _ = tuned(tiny_llama(2), samples(), RECIPE)
    half = first_blocks(whole, 2)
    tuned(tiny_llama(2), samples(), RECIPE, half)
    for one, other in zip(whole.codes["lm_head"][:3], half.codes["lm_head"][:3], strict=True):
        assert torch.equal(one, other)


def test_where_something_comes_behind_the_head_it_is_rounded_to_nearest():
    family = FAMILIES["gemma3n_text"]
    model = family.build()
    model.config.final_logit_softcapping = 3.0
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone(), requires_grad=False)
    inputs = [
        ModelInput(str(i), kwargs, kind_T := torch.zeros(n, dtype=torch.int8), kind_T == 0)
        for i, kwargs in enumerate(family.samples(4))
        for n in [kwargs["input_ids"].shape[1]]
    ]
    finished, _ = tuned(model, inputs, replace(RECIPE, algorithm="gptq"))
    assert finished.reports["outside the blocks"].nearest is None
