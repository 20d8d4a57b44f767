"""Layers whose weights lie (in, out), as GPT-2's Conv1D: what readers make of them, and whether a
square one is compared the right way round."""

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_tokenizer

from auto_mmround import AutoRoundMLLM, UserError, cli
from auto_mmround.verify import static

SQUARE = "transformer.h.0.attn.c_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turned") / "model"
    FAMILIES["gpt2"].save(folder, tiny_tokenizer())
    return folder


def command(model, out, fmt, *more):
    words = ["--model", str(model), "--output_dir", str(out), "--iters", "0", "--format", fmt]
    return [*words, "--device", "cpu", *more]


def test_a_square_weight_is_compared_with_the_source_as_it_lies_there(model, tmp_path):
    assert cli.main(command(model, tmp_path, "auto_round", "--group_size", "32")) == 0
    (made,) = tmp_path.iterdir()
    assert [f for f in static.check(made, model) if f.severity == "error"] == []
    other = tmp_path / "other"
    other.mkdir()
    for path in model.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(model / "model.safetensors")
    tensors[f"{SQUARE}.weight"] = tensors[f"{SQUARE}.weight"].t().contiguous()
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    wrong = [f for f in static.check(made, other) if f.severity == "error"]
    assert [f.where for f in wrong] == [f"{SQUARE}.weight"] and "correlation" in wrong[0].message


W4 = ("--group_size", "32")
REFUSED = [
    ("compressed_tensors", W4, "parameters were made up"),
    ("compressed_tensors", ("--scheme", "FP8"), "parameters were made up"),
    ("compressed_tensors", ("--scheme", "W8A8"), "parameters were made up"),
    ("auto_gptq", W4, "normal_"),
    ("auto_awq", W4, "has_been_replaced"),
    ("auto_round", ("--scheme", "MXFP4"), "in_features"),
]


@pytest.mark.parametrize("fmt, more, said", REFUSED)
def test_what_transformers_would_not_load_is_refused(fmt, more, said, model, tmp_path, capfd):
    words = command(model, tmp_path, fmt, *more)
    assert cli.main(words) == 2
    line = capfd.readouterr().err.splitlines()[-1]  # a warning may come first
    assert "weights that lie (in, out)" in line and said in line
    assert list(tmp_path.iterdir()) == []
    eight = "--scheme" in more and fmt == "compressed_tensors"  # vLLM turns them once more
    assert cli.main(["plan", *words, "--engines", "vllm"]) == (2 if eight else 0)
    assert cli.main(["plan", *words, "--engines", "sglang"]) == 0


def test_mlx_says_what_its_reader_does(model, tmp_path, capfd):
    words = command(model, tmp_path, "mlx", *W4)
    assert cli.main(["plan", *words]) == 0
    assert "takes no mlx with weights that lie (in, out)" in capfd.readouterr().out
    assert cli.main(["plan", *words, "--engines", "mlx"]) == 2


def test_a_folder_for_another_engine_is_right_with_a_warning(model, tmp_path):
    words = command(model, tmp_path, "compressed_tensors", *W4, "--engines", "vllm")
    assert cli.main(words) == 0
    (made,) = tmp_path.iterdir()
    (found,) = static.check(made)
    assert found.severity == "warning" and "Transformers names it" in found.message
    assert "(and 7 more)" in found.message


def test_openvino_is_refused_before_anything_is_tuned(model, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("auto_mmround.export.openvino.format.ENVIRONMENT", tmp_path / "python")
    (tmp_path / "python").touch()
    assert cli.main(command(model, tmp_path / "out", "openvino", *W4)) == 2
    assert "c_attn lies (in, out)" in capfd.readouterr().err
    rounded = AutoRoundMLLM(str(model), bits=4, group_size=32, iters=0, device="cpu")
    rounded.quantize()
    with pytest.raises(UserError, match=r"c_attn lies \(in, out\)"):
        rounded.save_quantized(str(tmp_path / "saved"), format="openvino")
