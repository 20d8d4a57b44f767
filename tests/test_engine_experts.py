"""A mixture of experts in real engines: their logits against the decoded weights. llama.cpp has no
row: GGUF files with experts are refused when the plan is made."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import mixtures
import pytest
import torch
from asking import run_engine, run_transformers
from safetensors.torch import load_file, save_file
from tiny_models import tiny_texts, tiny_tokenizer

from auto_mmround import cli
from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.evaluate.metrics import logits_of
from auto_mmround.verify.engines import python_of

ROOT = Path(__file__).parents[1]
IDS = torch.randint(3, 110, (1, 24), generator=torch.Generator().manual_seed(1))
KINDS = ("qwen3_moe", "glm4_moe")
# Whose checkpoints call the stacks otherwise than Transformers.
RENAMED = ("granitemoe", "aria", "aria_text", "inkling2_text")
# Whose own files stack them, mixed and with biases.
STACKED = ("gpt_oss",)


def exported(kind: str, engine: str, fmt: str, place: Path, *more: str) -> Path:
    mixtures.build(kind).save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")
    words = ["--model", str(place / "model"), "--output_dir", str(place / "out"), "--format", fmt]
    given = ["--iters", "0", "--group_size", "32", "--device", "cpu", "--engines", engine]
    assert cli.main([*words, *given, *more]) == 0
    (folder,) = (place / "out").iterdir()
    return folder


def spread(result, folder: Path) -> float:
    """The difference to the decoded weights, relative to their logits' deviation."""
    assert result.ok, result.error
    wanted = logits_of(from_quantized(folder, dtype="float32").model, {"input_ids": IDS})
    return ((result.logits[0].reshape(wanted.shape) - wanted).std() / wanted.std()).item()


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--ignore", "re:.*experts.*")])
@pytest.mark.parametrize("kind", [*KINDS, *RENAMED, *STACKED])
def test_transformers_reads_experts(kind, more, tmp_path):
    if more and kind in STACKED:
        pytest.skip("refused: AutoRound takes apart what is stored as one")
    folder = exported(kind, "transformers", "auto_round", tmp_path, *more)
    result = run_transformers(
        folder,
        [{"input_ids": IDS}],
        python=Path(sys.executable),
        model_class=mixtures.class_of(kind).__name__,
    )
    assert spread(result, folder) < (2e-3 if kind in RENAMED else 1e-3)  # in float16


def vllm(folder: Path):
    python = python_of("vllm", ROOT)
    if not python.is_file():
        pytest.skip("scripts/engines.sh vllm installs the engine")
    return run_engine("vllm", folder, [{"input_ids": IDS}], python=python, new_tokens=3)


@pytest.mark.slow
@pytest.mark.parametrize("fmt", ["auto_round", "compressed_tensors"])
@pytest.mark.parametrize("kind", KINDS)
def test_vllm_reads_mixtures_whose_experts_stay(kind, fmt, tmp_path):
    folder = exported(kind, "vllm", fmt, tmp_path, "--ignore", "re:.*experts.*")
    assert spread(vllm(folder), folder) < 0.01


REFUSED = {
    "auto_round": "has no parameter 'w2_qweight'",
    "auto_gptq": "MoE backend supports the deployment configuration",
    "compressed_tensors": "MoE backend supports the deployment configuration",
}


@pytest.mark.slow
@pytest.mark.parametrize("fmt", REFUSED)
def test_vllm_on_processors_says_of_quantized_experts_what_the_plan_says(fmt, tmp_path, capsys):
    folder = exported("qwen3_moe", "vllm", fmt, tmp_path)
    said = " ".join(capsys.readouterr().out.split())
    assert "with quantized experts" in said and REFUSED[fmt] in said
    result = vllm(folder)
    if result.ok and fmt != "auto_round":  # a processor with AMX has kernels
        assert spread(result, folder) < 0.01
    else:
        assert not result.ok and REFUSED[fmt] in result.error


def test_gguf_of_experts_is_refused_at_plan_time(tmp_path, capsys):
    mixtures.build("qwen3_moe").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "out")]
    assert cli.main(["plan", *words, "--format", "gguf:q4_0", "--iters", "0"]) == 2
    assert "gguf" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme, size", [("W4A16", 32), ("FP8_STATIC", -1), ("MXFP4", 32)])
def test_verify_counts_experts_that_transformers_decodes(scheme, size, tmp_path):
    """It called such checkpoints wrong: the stacks of their experts are no quantized layers, and
    nothing reads the scales of their inputs."""
    pytest.importorskip("compressed_tensors")
    (tmp_path / "texts.txt").write_text("\n\n".join(tiny_texts(4, 40)))
    more = ["--scheme", scheme, "--group_size", str(size), "--dataset", str(tmp_path / "texts.txt")]
    folder = exported("qwen3_moe", "transformers", "compressed_tensors", tmp_path, *more)
    save_file({"0.input_ids": IDS}, tmp_path / "inputs")
    worker = spec_from_file_location("worker", ROOT / "engines" / "engine_transformers.py")
    program = module_from_spec(worker)
    worker.loader.exec_module(program)
    places = {"model": folder, "inputs": tmp_path / "inputs", "output": tmp_path / "logits"}
    request = {"dtype": "float32", "class": "AutoModelForCausalLM", "activations": False}
    with torch._dynamo.config.patch(disable=False):  # which the program changes
        answer = program.answer({key: str(place) for key, place in places.items()} | request)
    assert answer["ok"] and answer["quantized"] == 32
    wanted = logits_of(from_quantized(folder, dtype="float32").model, {"input_ids": IDS})
    found = load_file(tmp_path / "logits")["0.logits"].reshape(wanted.shape)
    assert (found - wanted).std() < 1e-3 * wanted.std()
