"""Tasks of `eval` on small local sets: answers of the bundled model, transcripts of a tiny
Whisper."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch

from auto_mmround import cli
from auto_mmround.checkpoint.loader import load_any
from auto_mmround.errors import UserError
from auto_mmround.evaluate import tasks
from auto_mmround.evaluate.evaluate import evaluate
from auto_mmround.evaluate.held_out import HELD_OUT, held_out
from auto_mmround.evaluate.prompts import Data, answer, clips, openings, questions
from auto_mmround.evaluate.scoring import error_rates, normaliser
from auto_mmround.model.loading import load

needs_jiwer = pytest.mark.skipif(
    not importlib.util.find_spec("jiwer"), reason="jiwer is in the extra `eval`"
)
needs_sound = pytest.mark.skipif(
    not importlib.util.find_spec("soundfile"), reason="soundfile is in the extra `audio`"
)


@pytest.fixture(scope="module")
def own_answers(demo, tmp_path_factory):
    """A set whose expected answers are the model's own, but for the last row."""
    folder = tmp_path_factory.mktemp("sets") / "pictures"
    shutil.copytree(HELD_OUT / "images", folder / "images")
    rows = json.loads((HELD_OUT / "vqa.json").read_text())[:4]
    (folder / "easy.json").write_text(json.dumps(rows))
    for row, prompt in zip(rows, questions(demo, Data(str(folder / "easy.json"))), strict=True):
        row["conversations"][-1]["value"] = answer(demo, prompt)
    rows[1]["conversations"][-1]["value"] = rows[1]["conversations"][-1]["value"].upper()
    rows[3]["conversations"][-1]["value"] = "no such thing"
    (folder / "easy.json").write_text(json.dumps(rows))
    return folder / "easy.json"


def test_vqa_counts_exact_and_relaxed_matches(demo, own_answers):
    found = tasks.question_answering(tasks.Setting({"quantized": demo}, Data(str(own_answers))))
    assert [(s.benchmark, s.split, s.metric, s.quantized, s.count) for s in found.scores] == [
        ("pictures", "easy", "exact match", 50.0, 4),
        ("pictures", "easy", "relaxed match", 75.0, 4),
    ]


def test_an_answer_is_asked_once_for_all_tasks(demo, own_answers, monkeypatch):
    asked = []
    monkeypatch.setattr(tasks, "answer", lambda loaded, prompt: asked.append(prompt.id) or "so")
    found = tasks.run(
        ["vqa", "samples"], tasks.Setting({"quantized": demo}, Data(str(own_answers)))
    )
    assert len(asked) == 4 and len(found.samples) == 4
    sample = found.samples[0]
    assert sample["answers"] == {"quantized": "so"} and sample["images"][0].startswith(
        "data:image/png;base64,"
    )
    assert "<image>" not in sample["question"]


def test_answers_are_measured_on_the_rows_of_the_teacher_forced_figures(demo):
    data = Data(limit=5)
    forced = {sample.id for sample in held_out(demo, "demo", limit=5)}
    assert {prompt.id for prompt in questions(demo, data)} <= forced
    texts = openings(demo, data)
    assert {prompt.id for prompt in texts} <= forced and all(
        p.kwargs["input_ids"].shape[1] <= 48 for p in texts
    )


def test_teacher_forced_scores_carry_all_roles(demo):
    found = tasks.teacher_forced(
        tasks.Setting({"reference": demo, "quantized": demo}, Data(limit=2))
    )
    assert all(score.recovery == 100 for score in found.scores) and len(found.scores) == 2
    assert found.figures["quantized"].kl["text"] == pytest.approx(0, abs=1e-6)
    assert (
        json.loads(json.dumps(found.as_dict()))["figures"]["reference"]["agreement"]["image"] == 1
    )


def test_float32_tells_damage_from_rounding_on_the_way(tmp_path, capsys):
    given = ["--model", "demo", "--bits", "8", "--iters", "0", "--format", "auto_round"]
    assert cli.main([*given, "--output_dir", str(tmp_path)]) == 0
    (folder,) = tmp_path.glob("demo-w8*")
    for dtype in ([], ["--model_dtype", "float32"], ["--model_dtype", "float32"]):
        asked = ["eval", "--model", str(folder), "--reference", "demo", "--limit", "4"]
        assert cli.main([*asked, *dtype]) == 0
    own, wide = json.loads((folder / "eval.json").read_text())["evaluations"]  # one a question
    assert (own["model_dtype"], wide["model_dtype"]) == (None, "float32")
    assert wide["reference_dtype"] == "FP32" and own["reference_dtype"] == "BF16"
    text = [record["figures"]["quantized"]["kl"]["text"] for record in (own, wide)]
    assert 0 < text[1] < text[0] / 2
    for name in ("demo", str(folder)):  # alike, whatever is asked for
        assert load_any(name, dtype="float16").model.dtype == torch.float32
    capsys.readouterr()
    assert cli.main(["eval", "--model", str(folder), "--model_dtype", "float31"]) == 2
    assert "model_dtype 'float31' is unknown" in capsys.readouterr().err


@pytest.mark.parametrize(
    "names, reference, word",
    [
        ("vqaa", False, "did you mean vqa"),
        ("poetry", False, "lm_eval:NAME"),
        ("kl", False, "--reference"),
        (" , ", False, "empty"),
    ],
)
def test_wrong_task_names(names, reference, word):
    with pytest.raises(UserError, match=word):
        tasks.parse(names, reference)


def test_a_missing_package_is_named_before_a_model_is_loaded(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for names, extra in (("wer", "[eval]"), ("lm_eval:lambada", "[lm-eval]")):
        with pytest.raises(UserError, match="pip install") as error:
            evaluate("no such model", Data(), names=names)
        assert extra in str(error.value)


@pytest.mark.parametrize("name", ["vqa", "wer"])
def test_a_set_without_fitting_rows_is_refused(demo, name, tmp_path):
    (tmp_path / "text.jsonl").write_text('{"text": "only words here"}\n')
    with pytest.raises(UserError, match="has no row with"):
        tasks.TASKS[name].run(
            tasks.Setting({"quantized": demo}, Data(str(tmp_path / "text.jsonl")))
        )


def test_plain_text_gives_continuations_as_samples(demo, tmp_path):
    (tmp_path / "text.jsonl").write_text(
        '{"text": "In the beginning God created the heaven and the earth."}\n'
    )
    found = tasks.side_by_side(
        tasks.Setting({"quantized": demo}, Data(str(tmp_path / "text.jsonl")))
    )
    (sample,) = found.samples
    assert sample["expected"] is None and sample["images"] == [] and sample["answers"]["quantized"]


def test_eval_with_tasks_prints_json(own_answers, capsys):
    command = [
        "eval",
        "--model",
        "demo",
        "--tasks",
        "vqa,samples",
        "--dataset",
        str(own_answers),
        "--json",
    ]
    assert cli.main([*command, "--device", "cpu"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["scores"][0]["quantized"] == 50 and record["scores"][0]["recovery"] is None
    assert record["tasks"] == ["vqa", "samples"] and len(record["samples"]) == 4


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    """A tiny Whisper with random weights: plumbing only."""
    from transformers import (
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperProcessor,
        WhisperTokenizer,
    )

    folder = tmp_path_factory.mktemp("whisper")
    words = ["<|endoftext|>", "<|startoftranscript|>", *"abcdefghijklmnopqrstuvwxyz", "Ġ"]
    tokenizer = WhisperTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    torch.manual_seed(1)
    config = WhisperConfig(
        vocab_size=len(words), d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_target_positions=24,
        decoder_start_token_id=1, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        suppress_tokens=None,
        begin_suppress_tokens=None, num_mel_bins=8,
    )  # fmt: skip
    WhisperForConditionalGeneration(config).save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer).save_pretrained(folder)
    return load(str(folder))


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """Three clips at two rates with their texts, and a row without sound that doesn't count."""
    import soundfile

    folder = tmp_path_factory.mktemp("speech") / "tones"
    folder.mkdir()
    rows = [{"text": "no sound here"}]
    for i, (rate, seconds, text) in enumerate(
        [(16000, 1, "one two"), (8000, 2, "three"), (16000, 1, "four five")]
    ):
        time_T = np.arange(rate * seconds) / rate
        soundfile.write(folder / f"{i}.wav", 0.3 * np.sin(2 * np.pi * 220 * (i + 1) * time_T), rate)
        rows.append({"id": f"clip{i}", "audio": f"{i}.wav", "transcription" if i else "text": text})
    (folder / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "dev.jsonl"


@needs_jiwer
@needs_sound
def test_word_error_rate_is_that_of_the_models_own_transcripts(whisper, spoken):
    found = tasks.speech(
        tasks.Setting({"reference": whisper, "quantized": whisper}, Data(str(spoken)))
    )
    assert [(s.benchmark, s.split, s.metric, s.count) for s in found.scores] == [
        ("tones", "dev", "WER", 3),
        ("tones", "dev", "CER", 3),
    ]
    prompts = clips(whisper, Data(str(spoken)))
    heard = []
    for prompt in prompts:
        ids = whisper.model.generate(
            prompt.kwargs["input_features"], do_sample=False, max_new_tokens=20
        )
        heard.append(whisper.tokenizer.decode(ids[0], skip_special_tokens=True))
    wanted = error_rates(["one two", "three", "four five"], heard, normaliser("en"))
    assert tuple(score.quantized for score in found.scores) == pytest.approx(wanted)
    assert all(score.lower_is_better and score.recovery == 100 for score in found.scores)


@needs_sound
def test_speech_has_samples_too(whisper, spoken):
    found = tasks.side_by_side(tasks.Setting({"quantized": whisper}, Data(str(spoken))))
    assert [sample["expected"] for sample in found.samples] == ["one two", "three", "four five"]
    assert all(sample["question"].endswith("s of speech") for sample in found.samples)


@needs_sound
def test_clips_are_resampled_and_named(whisper, spoken):
    prompts = clips(whisper, Data(str(spoken), limit=None))
    assert [p.id for p in prompts] == ["clip0", "clip1", "clip2"]
    assert [p.question for p in prompts] == [
        "1.0 s of speech",
        "2.0 s of speech",
        "1.0 s of speech",
    ]
    assert all(p.kwargs["input_features"].shape == (1, 8, 3000) for p in prompts)


@needs_sound
def test_a_damaged_clip_is_one_line(whisper, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF nothing")
    (tmp_path / "set.jsonl").write_text('{"audio": "a.wav", "text": "hello"}\n')
    with pytest.raises(UserError, match=r"a\.wav"):
        clips(whisper, Data(str(tmp_path / "set.jsonl")))
