"""OpenVINO: what it holds, and (slow, in its own environment) the converted graph against the tuned weights."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import sliding_gemma

from auto_mmround.errors import UserError
from auto_mmround.evaluation.engines import interpreter, run_engine
from auto_mmround.evaluation.loader import from_quantized
from auto_mmround.evaluation.metrics import logits_of
from auto_mmround.evaluation.verify import verify
from auto_mmround.export import openvino
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run import job as jobs

ROOT = Path(__file__).parent.parent
PYTHON = interpreter("openvino", ROOT)
engine = pytest.mark.skipif(not PYTHON.is_file(), reason="scripts/engines.sh openvino installs the engine")
RECIPE = Recipe(model="demo", iters=0, device="cpu", format="openvino", group_size=64)


@pytest.mark.parametrize(
    ("scheme", "shape", "reason"),
    [
        (Scheme(4, 64), (64, 128), None),
        (Scheme(8, -1, False, scale_dtype="bf16"), (63, 130), None),
        (Scheme(3, 64), (64, 128), "holds 4, 8 bits, not 3"),
        (Scheme(4, 64), (64, 96), "96 inputs are no multiple of the group size 64"),
        (Scheme(4, -1), (64, 33), "33 inputs are no multiple of 2"),
    ],
)
def test_check(scheme: Scheme, shape: tuple[int, int], reason: str | None) -> None:
    found = openvino.check(scheme, *shape)
    assert found is None if reason is None else reason in str(found)


def test_verify_says_that_it_cannot_decode_a_graph(tmp_path: Path) -> None:
    (tmp_path / openvino.GRAPH).touch()
    with pytest.raises(UserError, match="can't decode OpenVINO's graph"):
        verify(tmp_path)


def test_without_the_converter_nothing_is_tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # no .engines here, and the tests' own environment has no openvino
    if openvino.importlib.util.find_spec("openvino"):
        pytest.skip("openvino is installed beside the program")
    recipe = replace(RECIPE, output_dir=str(tmp_path / "out"))
    with pytest.raises(UserError, match=r"scripts/engines\.sh openvino"):
        jobs.prepare(recipe, jobs.load_model(recipe))
    assert not (tmp_path / "out").exists()


@engine
@pytest.mark.slow
@pytest.mark.parametrize(
    ("bits", "sym", "kind"), [(4, True, "i4"), (4, False, "u4"), (8, False, "u8"), (8, True, "i8")]
)
def test_the_plugin_computes_with_the_tuned_codes(
    bits: int, sym: bool, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    recipe = replace(RECIPE, bits=bits, sym=sym, format="openvino,mlx", output_dir=str(tmp_path))
    job = jobs.prepare(recipe, jobs.load_model(recipe))
    folder, reference = jobs.run(job)
    model = from_quantized(reference, dtype="float32").model  # the same codes, decoded by our own reader
    ids = torch.randint(0, 2000, (1, 20), generator=torch.Generator().manual_seed(0))
    result = run_engine("openvino", folder, [{"input_ids": ids}], python=PYTHON, new_tokens=3)
    assert result.ok, result.error
    assert result.classes == {kind: 35, "f32": 1} and result.quantized == len(job.plan.quantized) == 35
    wanted = logits_of(model, {"input_ids": ids})
    assert (result.logits[0][0] - wanted).abs().max() < 1e-3 * wanted.std()
    assert result.tokens[0][0, 0] == wanted[-1].argmax()
    image = [{"input_ids": ids, "pixel_values": torch.zeros(4, 1176)}]
    refused = run_engine("openvino", folder, image, python=PYTHON)
    assert not refused.ok and "only unpadded text inputs" in str(refused.error)


@engine
@pytest.mark.slow
def test_sliding_windows_survive_the_conversion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small random Gemma 3, window 8, on 24 tokens: the converter's own check and ours see the window."""
    monkeypatch.chdir(ROOT)
    source = sliding_gemma(tmp_path / "tiny")
    recipe = replace(RECIPE, model=str(source), group_size=32, format="openvino,mlx", output_dir=str(tmp_path))
    folder, reference = jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))
    inputs = {"input_ids": torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(1))}
    result = run_engine("openvino", folder, [inputs], python=PYTHON)
    wanted = logits_of(from_quantized(reference, dtype="float32").model, inputs)
    assert result.ok and result.quantized == 21
    assert (result.logits[0][0] - wanted).abs().max() < 1e-3 * wanted.std()
