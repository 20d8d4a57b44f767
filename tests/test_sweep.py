"""The sweep over Transformers' classes: some of them in every run, all of them marked slow; and
what it has found."""

import importlib
import logging
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import FAMILIES, tiny_tokenizer

from auto_mmround.errors import UserError
from auto_mmround.families import PLAIN, calibrates, swept
from auto_mmround.model.capture import capture
from auto_mmround.model.passes import run_model
from auto_mmround.model.structure import find_stages
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run.plan import OTHER_FORM, SHARED, make_plan

SCRIPTS = Path(__file__).parents[1] / "scripts"
# What people use, but for the families of `tiny_models`, which go further in `test_families`.
USED = [
    *PLAIN,
    "Qwen3_5ForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "T5Gemma2ForConditionalGeneration",
    "BartForConditionalGeneration",
    "T5ForConditionalGeneration",
    "ModernBertDecoderForCausalLM",
    "FSMTForConditionalGeneration",
    "KyutaiSpeechToTextForConditionalGeneration",
    "ZambaForCausalLM",
    "OlmoForCausalLM",
    "Mamba2ForCausalLM",
]


@pytest.fixture(scope="module")
def sweep():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("sweep_families")
    finally:
        sys.path.remove(str(SCRIPTS))


@pytest.mark.parametrize("name", USED)
def test_classes_that_people_use(name, sweep):
    case = next(case for case in sweep.cases() if case.architecture == name)
    known = {}
    sweep.go(case, lambda key, value: known.setdefault(key, []).append(value))
    assert known["ways"]


def test_the_table_of_plain_families_says_what_the_sweep_saw(sweep):
    rows = {row.architecture: row for row in swept()}
    cases = {case.architecture: case for case in sweep.cases()}
    for name, family in PLAIN.items():
        row, kinds = rows[name], family.calibrates
        assert row.verdict == "passed" and calibrates(sweep.build(cases[name])) == kinds
        assert set(row.ways) >= {"text"} & set(kinds) | ({"media"} if kinds != ("text",) else set())
        assert (*dict.fromkeys(row.stages),) == family.stages, name


def made(sweep, name):
    case = next(case for case in sweep.cases() if case.architecture == name)
    return sweep.build(case)


STAGES = {
    "Florence2ForConditionalGeneration": (["encoder"], "model.language_model.decoder.layers"),
    "T5Gemma2ForConditionalGeneration": (["encoder", "vision"], "model.decoder.layers"),
    "SeamlessM4TForSpeechToText": (["audio"], "text_decoder.layers"),
    "BltForCausalLM": ([], "model.local_decoder.layers"),
    "ModernBertDecoderForCausalLM": ([], "model.layers"),
    "ParakeetForCTC": ([], "encoder.layers"),
}


@pytest.mark.parametrize("name", STAGES)
def test_the_text_makes_the_logits_and_towers_are_named_by_what_they_read(name, sweep):
    towers, text = STAGES[name]
    stages = find_stages(made(sweep, name))
    assert (stages[-1].name, stages[-1].path) == ("text", text)
    assert set(towers) <= {stage.name for stage in stages[:-1]}
    assert ("vision" in {stage.name for stage in stages}) <= (
        name.startswith("Flor") or "vision" in towers
    )


def test_weights_that_several_blocks_use_stay(sweep):
    plan = make_plan(made(sweep, "ZambaForCausalLM"), Recipe(group_size=32))
    shared = {name for name, reason in plan.kept.items() if reason == SHARED}
    assert shared and all(".shared_transf." in name for name in shared)
    assert not any(".shared_transf." in name for name in plan.quantized)


def test_what_engines_fuse_stays_together(sweep):
    """Mistral Large 4 turns q and k of its tower while loading, and v not."""
    recipe = Recipe(group_size=32, quant_nontext_module=True)
    kept = make_plan(made(sweep, "MistralLarge4ForConditionalGeneration"), recipe).kept
    tower = {name.rpartition(".")[2]: why for name, why in kept.items() if "vision_tower" in name}
    assert {tower[name] for name in ("q_proj", "k_proj", "v_proj")} == {OTHER_FORM}


def test_a_loop_is_captured_anew(sweep):
    """HRM runs its blocks several times; later passes begin with what earlier ones gave."""
    model = made(sweep, "HrmTextForCausalLM")
    inputs = sweep.samples(model)["text"]
    stages = find_stages(model)
    assert all(chain.live for chain in capture(model, stages, inputs).values())


def omni(tmp_path, kinds):
    family = FAMILIES["qwen2_5_omni_thinker"]
    family.save(tmp_path / "model", tiny_tokenizer())
    recipe = Recipe(
        model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), group_size=32, iters=1,
        nsamples=2, seqlen=12, amp=False, device="cpu", quant_nontext_module=True,
    )  # fmt: skip
    rows = [family.media[kind](seed) for kind in kinds for seed in range(2)]
    return jobs.prepare(recipe, jobs.load_model(recipe), dataset=rows or family.samples()[:2])


def test_towers_that_no_sample_reaches_stay_and_are_named(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        job = omni(tmp_path, ["image"])
    assert [stage.name for stage in job.plan.stages] == ["vision", "text"]
    assert "audio_tower.layers: no calibration sample reaches this audio stage" in caplog.text
    kept = {name for name, why in job.plan.kept.items() if why.startswith("no calibration sample")}
    assert kept and all(name.startswith("model.audio_tower.") for name in kept)
    (out,) = jobs.run(job)
    assert out.is_dir()


def test_an_unreached_audio_stage_asks_for_sound(tmp_path):
    job = omni(tmp_path, [])
    with pytest.raises(UserError, match=r"audio input, e\.g\. --dataset MLCommons/peoples_speech"):
        jobs.run(job)


def test_an_encoder_decoder_reads_plain_text(sweep, tmp_path):
    made(sweep, "T5ForConditionalGeneration").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    recipe = Recipe(
        model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), group_size=32, iters=1,
        nsamples=2, seqlen=12, amp=False, device="cpu", quant_nontext_module=True,
    )  # fmt: skip
    rows = [" ".join(f"w{5 + (i * 7 + seed) % 90}" for i in range(14)) for seed in range(2)]
    job = jobs.prepare(recipe, jobs.load_model(recipe), dataset=rows)
    given = job.inputs[0].kwargs
    assert given["decoder_input_ids"][0, 1:].tolist() == given["input_ids"][0, :-1].tolist()
    assert [stage.name for stage in job.plan.stages] == ["encoder", "text"]
    assert jobs.run(job)[0].is_dir()


@pytest.mark.parametrize("name", ["ParakeetForCTC", "WhisperForConditionalGeneration"])
def test_a_model_that_reads_no_words_refuses_text_in_one_line(name, sweep, tmp_path):
    made(sweep, name).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    recipe = Recipe(
        model=str(tmp_path / "model"), output_dir=str(tmp_path / "out"), group_size=32, iters=1,
        nsamples=2, seqlen=12, amp=False, device="cpu",
    )  # fmt: skip
    rows = [" ".join(f"w{5 + i}" for i in range(14))] * 2
    with pytest.raises(UserError, match="no words"):
        jobs.prepare(recipe, jobs.load_model(recipe), dataset=rows)


def test_what_a_model_draws_is_the_same_in_each_pass():
    family = FAMILIES["llama"]
    model, inputs = family.build(), family.samples()[0]
    model.get_input_embeddings().register_forward_hook(
        lambda m, a, out: out + torch.randn_like(out)
    )
    torch.manual_seed(5)
    first = run_model(model, inputs).logits
    drawn = torch.rand(1)
    assert torch.equal(run_model(model, inputs).logits, first)
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), drawn)  # the caller's own numbers go on


@pytest.mark.slow
def test_no_class_is_wrong_or_ends_in_a_traceback(sweep, tmp_path):
    rows = list(sweep.sweep(sweep.cases(), 2, tmp_path))
    odd = [row for row in rows if row.verdict in ("wrong", "traceback")]
    assert not odd, "\n".join(f"{row.architecture}: {row.line}" for row in odd)
    passed = [row for row in rows if row.verdict == "passed"]
    assert len(passed) >= 0.9 * len([row for row in rows if row.verdict != "not built"])
