"""Layers whose weights lie (in, out), as GPT-2's Conv1D: what readers make of them, and whether a
square one is compared the right way round."""

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, tiny_tokenizer

from auto_mmround import cli
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
