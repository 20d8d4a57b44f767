"""Whisper: what calibration hands it, what the encoder's frames weigh, and the bench on the real
one (slow)."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES
from transformers import WhisperTokenizer

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.calibration.processor import get_processor
from auto_mmround.calibration.rows import Sample
from auto_mmround.calibration.template import Message, load_template
from auto_mmround.modalities import AUDIO, PAD
from auto_mmround.model.chains import Chain
from auto_mmround.model.fisher import Fisher
from auto_mmround.model.structure import find_stages
from auto_mmround.numerics.start import collecting
from auto_mmround.recipe.files import read
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.report import card
from auto_mmround.run import pipeline, session
from auto_mmround.run.finished import Finished
from auto_mmround.run.loss_weights import Weights, modalities_of, samples_a_step
from auto_mmround.run.plan import make_plan

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "bench"))
import speech  # noqa: E402
import whisper as bench  # noqa: E402
import whisper_engines  # noqa: E402

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>",
    "<|transcribe|>",
           "<|notimestamps|>"]  # fmt: skip

# --------------------------------------------------------------------------------------------------
# calibration


def processor_for(language=None, task=None, vocabulary=40):
    vocab = {word: i for i, word in enumerate([*SPECIAL, *"abcdefghijklmnopqrstuvwxyz", "Ġ"])}
    tokenizer = WhisperTokenizer(vocab=vocab, merges=[], additional_special_tokens=SPECIAL[1:])
    tokenizer.language, tokenizer.task = language, task
    config = SimpleNamespace(vocab_size=vocabulary, decoder_start_token_id=1, eos_token_id=0)
    return get_processor("whisper", load_template("whisper", "whisper"))(
        tokenizer, None, None, config
    )


@pytest.mark.parametrize(
    "given, opening",
    [
        ({}, ["<|startoftranscript|>", "<|en|>", "<|transcribe|>", "<|notimestamps|>"]),
        ({"language": "german"}, ["<|startoftranscript|>", "<|de|>", "<|transcribe|>",
            "<|notimestamps|>"]),
        (
            {"language": "de", "task": "translate"},
            ["<|startoftranscript|>", "<|de|>", "<|translate|>", "<|notimestamps|>"],
        ),
        ({"vocabulary": 51864}, ["<|startoftranscript|>", "<|notimestamps|>"]),
    ],
)  # fmt: skip
def test_a_transcript_begins_as_whisper_writes_it(given, opening):
    family = processor_for(**given)
    assert family.tokenizer.convert_ids_to_tokens(family.opening()) == opening
    sample = Sample("a", messages=(Message("user", "<audio>\none two"),), audios=(np.zeros(9),))
    encoded = family.render(sample, load_template("whisper", "whisper"))
    assert encoded.text == " one two" and encoded.answers == ((0, 8),)


def test_frames_in_which_nothing_is_heard_are_padding():
    """Padding is the lowest value in all bands; one band above it is sound. Two columns of features
    are one frame."""
    features = torch.full((1, 8, 20), -0.5)
    features[0, 3, :7] = 0.1
    features[0, :, 12] = -0.4
    modality_F = processor_for().tower_modality({"input_features": features})
    assert modality_F.tolist() == [AUDIO] * 4 + [PAD] * 2 + [AUDIO] + [PAD] * 3


# --------------------------------------------------------------------------------------------------
# tuning


def tiny(fisher=True, frames=(AUDIO, AUDIO, AUDIO, PAD)):
    """(model, recipe, plan, inputs) of a tiny Whisper, the last quarter of its frames silent."""
    model = FAMILIES["whisper"].build().eval().requires_grad_(False)
    recipe = Recipe(
        algorithm="auto", iters=2, group_size=32, device="cpu", amp=False, batch_size=1,
        gradient_accumulate_steps=2,
        quant_nontext_module=True, fisher=fisher,
    )  # fmt: skip
    inputs = []
    for seed in range(4):
        kwargs = FAMILIES["whisper"].media["audio"](seed)
        length, count = (
            kwargs["decoder_input_ids"].shape[1],
            kwargs["input_features"].shape[-1] // 2,
        )
        kinds_F = torch.tensor(frames).repeat_interleave(count // len(frames))
        text_T, answer_T = (
            torch.zeros(length, dtype=torch.int8),
            torch.ones(length, dtype=torch.bool),
        )
        inputs.append(ModelInput(str(seed), kwargs, text_T, answer_T, kinds_F))
    return model, recipe, make_plan(model, recipe), inputs


def test_cross_attention_reads_the_quantized_encoder(monkeypatch):
    """After the encoder's stage the decoder's calls are captured again: they hold what the
    quantized encoder gives."""
    model, recipe, plan, inputs = tiny()
    seen = []
    real = session.capture
    monkeypatch.setattr(
        session, "capture", lambda *args, **more: seen.append(real(*args, **more)) or seen[-1]
    )
    before = model.get_encoder()(inputs[0].kwargs["input_features"]).last_hidden_state
    pipeline.quantize(model, recipe, plan, inputs, Finished())
    after = model.get_encoder()(inputs[0].kwargs["input_features"]).last_hidden_state
    text = plan.stages[-1].path
    states = [next(v for v in (*call.args,
        *call.kwargs.values()) if torch.is_tensor(v) and v.shape == before.shape)
              for call in (chains[text].calls[0][0] for chains in seen)]  # fmt: skip
    assert len(seen) == 2 and not torch.allclose(before, after)
    torch.testing.assert_close(states[0], before)
    torch.testing.assert_close(states[1], after)


def test_silence_and_sinks_weigh_what_their_gradients_say():
    """Errors: frames by kind, the first tokens by place."""
    _, _, plan, inputs = tiny()
    encoder, _ = plan.stages
    rng = torch.Generator().manual_seed(0)
    table = {
        name: torch.rand(9, 64, generator=rng) for stage in plan.stages for name in stage.blocks
    }
    weights = Weights(modalities_of(inputs), Fisher(table))
    heard = Chain(encoder, hidden=[torch.zeros(1, 16, 64)], sample=[0])
    block = encoder.blocks[-1]
    errors = weights.of_errors(heard, block).of([0], heard.hidden[0].shape[:2])
    torch.testing.assert_close(
        errors[0, 0] / errors[0, -1], table[block][AUDIO] / table[block][PAD]
    )


def test_second_moments_weigh_a_layers_own_tokens():
    """In cross attention they are the encoder's frames; padding of text counts nothing; without
    Fisher all count 1."""
    _, _, plan, inputs = tiny()
    _, text = plan.stages
    length = len(inputs[0].modality_T)
    said = Chain(text, hidden=[torch.zeros(1, length, 64)], sample=[0])
    frames_N, words_N = torch.rand(16), torch.rand(length)
    own, cross = f"{text.blocks[0]}.self_attn.k_proj", f"{text.blocks[0]}.encoder_attn.k_proj"
    weights = Weights(
        modalities_of(inputs), Fisher(tokens={own: {0: words_N}, cross: {0: frames_N}})
    )
    spoken_N = (inputs[0].modality_T != PAD).float()
    torch.testing.assert_close(weights.of_tokens(said, own)[0], words_N * spoken_N)
    torch.testing.assert_close(weights.of_tokens(said, cross)[0], frames_N)
    torch.testing.assert_close(
        Weights(modalities_of(inputs), Fisher()).of_tokens(said, own)[0], spoken_N
    )
    heard = Chain(plan.stages[0], hidden=[torch.zeros(1, 16, 64)], sample=[0])
    assert Weights(modalities_of(inputs), Fisher()).of_tokens(heard, "any")[0].eq(1).all()


def test_moments_take_the_weights_that_are_as_many_as_the_tokens():
    layer = torch.nn.ModuleDict(
        {
            "own": torch.nn.Linear(4, 2),
            "cross": torch.nn.Linear(4, 2),
            "pooled": torch.nn.Linear(4, 2),
        }
    )
    x, y, z = torch.randn(1, 3, 4), torch.randn(1, 5, 4), torch.randn(1, 2, 4)
    weights = {"own": torch.tensor([1.0, 0.0, 2.0]), "cross": torch.tensor([1.0, 1.0, 1.0, 0.0,
        0.0]),
               "pooled": torch.ones(3)}  # fmt: skip
    with torch.no_grad(), collecting(dict(layer.named_children()), weights.get) as collected:
        for name, value in (("own", x), ("cross", y), ("pooled", z)):
            layer[name](value)
    found = {name: moments.hessian() for name, moments in collected.moments().items()}
    torch.testing.assert_close(found["own"], (x[0].t() * torch.tensor([1.0, 0.0, 2.0])) @ x[0] / 3)
    torch.testing.assert_close(found["cross"], y[0, :3].t() @ y[0, :3] / 3)
    torch.testing.assert_close(found["pooled"], z[0].t() @ z[0] / 2)


@pytest.mark.parametrize(
    "stage, tokens, algorithm, asked, samples",
    [
        ("encoder", 1500, "auto", 8, 2),
        ("encoder", 1500, "auto", 4, 1),
        ("vision", 16, "auto", 8, 8),
        ("vision", 9000, "auto", 8, 1),
        ("text", 0, "auto", 8, 8),
        ("text", 1024, "auto", 8, 8),
        ("text", 2048, "auto", 8, 4),
        ("text", 2048, "auto", 4, 2),
        ("text", 2048, "sign_round", 8, 8),
        ("encoder", 1500, "sign_round", 8, 8),
    ],
)
def test_a_step_sees_no_more_tokens_than_it_needs(stage, tokens, algorithm, asked, samples):
    recipe = Recipe(algorithm=algorithm, batch_size=1, gradient_accumulate_steps=asked)
    assert samples_a_step(recipe, tokens, stage) == samples


# --------------------------------------------------------------------------------------------------
# bench


def test_the_recipe_has_the_settings_of_the_released_card():
    recipe = from_mapping(read(ROOT / "scripts" / "recipes" / "whisper_w4a16_g64.toml"))
    found = (
        recipe.bits,
        recipe.group_size,
        recipe.sym,
        recipe.algorithm,
        recipe.dampening,
        recipe.actorder,
        recipe.nsamples,
    )
    assert found == (4, 64, True, "gptq", 0.01, "weight", 1024)
    model = FAMILIES["whisper"].build()
    plan = make_plan(model, replace(recipe, group_size=32))
    assert {stage.path for stage in plan.stages} == {stage.path for stage in find_stages(model)}
    assert "proj_out" in plan.kept and not any("proj_out" in name for name in plan.quantized)


def test_test_sentences_are_many_and_not_calibrated_on():
    lines = [line for text in speech.sentences(per_clip=1) for line in [text]]
    assert len(set(lines)) >= 60
    read_aloud = " ".join(speech.passages(64))
    assert not any(line.rstrip(".") in read_aloud for line in lines)
    assert all(len(text.split()) <= speech.PASSAGE for text in speech.passages(64))


def test_missing_speech_programs_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="apt-get install flite espeak-ng"):
        speech.speak(tmp_path, "flite-slt", ["one"])
    with pytest.raises(SystemExit, match="flite-NAME"):
        speech.speak(tmp_path, "siri", ["one"])


def result(errors, kl=0.1):
    voices = {"a": {"errors": errors, "words": [10] * len(errors), "kl": [kl] * len(errors)}}
    return {"voices": voices, "seconds": 1.0, "cpu_seconds": 1.0, "peak_gb": 1.0}


def test_the_table_gives_rates_and_intervals_of_differences():
    same, worse = result([1, 0, 2, 1] * 5), result([2, 1, 3, 2] * 5)
    assert bench.rate(list(same["voices"].values())) == 10
    assert bench.interval(same, worse) == (10.0, 10.0)
    low, high = bench.interval(same, result([0, 1, 3, 2] * 5))
    assert -10 < low < 5 < high <= 10
    lines = bench.table(
        {("-", "full precision"): same, ("W4g64", "gptq"): worse, ("W4g64", "auto"): same}
    )
    assert len({line.count("|") for line in lines}) == 1
    assert "+10.00 to +10.00" in lines[3] and "-10.00 to -10.00" in lines[4]


@pytest.mark.parametrize("method", ["compressed-tensors", "auto-round", None])
def test_the_cards_code_unpacks_compressed_tensors_when_it_loads_them(method):
    """Transcribing calls the encoder alone first, where Transformers has not unpacked them yet."""
    config = {"num_mel_bins": 8} | (
        {"quantization_config": {"quant_method": method}} if method else {}
    )
    found = {
        "name": "w",
        "verify": [{"status": "right", "engine": "transformers", "version": None}],
    }
    (made,) = card._deployments(found, config, "audio")
    compile(made["code"], "card", "exec")
    assert ("dequantize=True" in made["code"]) == (
        method == "compressed-tensors"
    ) and 'model="w"' in made["code"]


# --------------------------------------------------------------------------------------------------
# real ones


@pytest.fixture(scope="module")
def exported(request, tmp_path_factory):
    """Whisper base rounded to W4A16, group 64, and six spoken sentences."""
    model = request.config.getoption("--whisper")
    if model is None or not shutil.which("flite"):
        pytest.skip("make test-engines WHISPER=DIR; apt-get install flite")
    folder = tmp_path_factory.mktemp("whisper")
    job = {
        "model": model,
        "method": "rtn",
        "bits": 4,
        "group_size": 64,
        "calibration": "demo",
        "samples": 1,
    }
    bench.quantized(job | {"folder": str(folder / "w4")})
    texts = speech.sentences(per_clip=2)[:3]
    return folder / "w4", speech.speak(folder / "speech", "flite-slt", texts), len(texts)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_engines_hear_what_our_reader_hears(exported, engine):
    folder, table, count = exported
    if engine == "vllm" and not (ROOT / ".engines" / "vllm").exists():
        pytest.skip("scripts/engines.sh vllm installs the engine")
    ours = whisper_engines.transcripts(folder, [table], "ours")
    theirs = whisper_engines.transcripts(folder, [table], engine)
    assert len(ours) == len(theirs) == count
    wanted, found = (whisper_engines.rates([table], heard)[table.stem] for heard in (ours, theirs))
    assert wanted < 30 and abs(wanted - found) < 5
    assert (
        json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]
        == "compressed-tensors"
    )
