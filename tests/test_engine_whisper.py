"""Whisper base, rounded to 4 bits, in Transformers and vLLM: layers, logits, word error rate of
spoken sentences.

Needs the model: `make test-engines WHISPER=DIR`, and flite (apt-get install flite). Rows go into
docs/formats.md.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
from test_engine_table import DOCS, ROOT, SPEECH, Row, with_rows

from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.verify.engines import EngineResult, python_of
from auto_mmround.verify.verify import verify

sys.path.insert(0, str(ROOT / "bench"))
import speech
from whisper_engines import rates, transcripts

VOICE, CLIPS = "flite-slt", 4  # of six sentences, about 70 words each
# of word error rate that an engine may differ by: in bfloat16 a word or two of 280 falls otherwise
POINTS = 1.0


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = request.config.getoption("--whisper")
    if model is None or shutil.which("flite") is None or not python_of("vllm", ROOT).is_file():
        pytest.skip("make test-engines WHISPER=DIR; apt-get install flite")
    changes = {
        "group_size": 64,
        "quant_nontext_module": True,
        "format": "compressed_tensors",
        "algorithm": "rtn",
    }
    out = tmp_path_factory.mktemp("whisper")
    recipe = Recipe(model=model, device="cpu", output_dir=str(out), **changes)
    return jobs.run(jobs.prepare(recipe, jobs.load_model(recipe)))[0]


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speech.speak(
        tmp_path_factory.mktemp("speech"), VOICE, speech.sentences(per_clip=6)[:CLIPS]
    )


@pytest.fixture(scope="module")
def ours(folder: Path, spoken: Path) -> float:
    """Word error rate of the decoded weights, in percent."""
    return rates([spoken], transcripts(folder, [spoken], "ours"))[spoken.stem]


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "weights", "name"), SPEECH, ids=lambda value: str(value))
def test_row(engine: str, weights: str, name: str, folder: Path, spoken: Path, ours: float) -> None:
    done = verify(folder, [engine], root=ROOT, timeout=3600)
    (verdict,) = done.verdicts
    assert done.right and verdict.status == "right", verdict.line()
    rate = rates([spoken], transcripts(folder, [spoken], engine))[spoken.stem]
    assert abs(rate - ours) <= POINTS, (rate, ours)
    facts = {key: getattr(verdict, key) for key in ("planned", "layers", "max_difference", "gap")}
    words = sum(len(json.loads(line)["text"].split()) for line in spoken.read_text().splitlines())
    result = EngineResult(True, engine=verdict.version, quantized=verdict.layers)
    made = Row(
        engine, weights, name, result, facts, "speech", rate / 100, ours / 100, words, "WER "
    )
    DOCS.write_text(with_rows(DOCS.read_text(encoding="utf-8"), made), encoding="utf-8")
