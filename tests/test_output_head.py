"""The output head is solved on what the last norm gives, and kept where the KL of words falls."""

from dataclasses import replace

import pytest
import torch
from test_served import first_blocks, served, tuned
from test_undone import samples, tiny_llama
from tiny_models import FAMILIES, tiny_tokenizer
from transformers import UMT5Config, UMT5ForConditionalGeneration

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.errors import UserError
from auto_mmround.model.head import untie
from auto_mmround.numerics.tuner import held_out_split
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.run import job as jobs
from auto_mmround.run.staying import cost_of_untying
from auto_mmround.verify.proof import prove
from auto_mmround.verify.static import check

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
        ModelInput(str(i), kwargs, modality_T := torch.zeros(n, dtype=torch.int8), modality_T == 0)
        for i, kwargs in enumerate(family.samples(4))
        for n in [kwargs["input_ids"].shape[1]]
    ]
    finished, _ = tuned(model, inputs, replace(RECIPE, algorithm="gptq"))
    assert finished.reports["outside the blocks"].nearest is None


@pytest.mark.parametrize("name", ["gemma3_text", "qwen2_vl"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"stream": True}, {"layer_config": {"lm_head": {"bits": 8}}}, {"algorithm": "rtn"},
     {"format": "auto_round"}, {"scheme": "NVFP4"}],
    ids=str,
)  # fmt: skip
def test_a_head_that_is_the_embedding_is_untied_on_request(name, changes, tmp_path):
    family = FAMILIES[name]
    tied = family.build()
    for config in {id(c): c for c in (tied.config, tied.config.get_text_config())}.values():
        config.tie_word_embeddings = True
    tied.tie_weights()
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    save(family, tied, tmp_path / "model")
    base = replace(
        RECIPE, model=str(tmp_path / "model"), output_dir=str(tmp_path), device="cpu",
        group_size=32, nsamples=8, seqlen=12,
    )  # fmt: skip
    recipe = from_mapping(changes, base=base)
    with pytest.raises(UserError, match="give it one of its own with --untie_lm_head"):
        jobs.planned(recipe, jobs.load_model(recipe))
    recipe = replace(recipe, untie_lm_head=True)
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=family.samples(8))
    (line,) = cost_of_untying(job.loaded, job.plan)
    assert line.startswith("lm_head gets a weight of its own: 0.0 MB more in the files")
    (made,) = jobs.run(job, prove=prove)
    assert not [finding for finding in check(made) if finding.severity == "error"]
    read = from_quantized(made).model
    head, words = read.get_output_embeddings().weight, read.get_input_embeddings().weight
    assert torch.equal(words, tied.get_input_embeddings().weight)
    assert not torch.equal(head, words) and (head - words).norm() < 0.2 * words.norm()
    assert torch.equal(head, job.loaded.model.get_output_embeddings().weight)


def save(family, model, folder):
    family.save(folder, tiny_tokenizer())
    model.save_pretrained(folder)


def test_a_class_that_computes_otherwise_with_a_head_of_its_own_keeps_it():
    sizes = dict(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model = UMT5ForConditionalGeneration(UMT5Config(**sizes, tie_word_embeddings=True))
    assert model.lm_head.weight is model.shared.weight
    with pytest.raises(UserError, match="untie_lm_head: UMT5ForConditionalGeneration scales what"):
        untie(model)
    assert model.lm_head.weight is model.shared.weight and model.config.tie_word_embeddings


def test_untying_is_said_to_need_a_quantized_head():
    with pytest.raises(UserError, match="untie_lm_head is for a head that is quantized"):
        Recipe(untie_lm_head=True)
