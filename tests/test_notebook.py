"""The notebooks run: docs/quickstart.ipynb, whose stored outputs are there, small, and of no
particular machine; docs/speech.ipynb on a tiny Whisper."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def outputs(cells) -> str:
    return json.dumps([cell["outputs"] for cell in cells if cell["cell_type"] == "code"])


def test_the_stored_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    counts = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1)) and NOTEBOOK.stat().st_size < 200_000
    stored = outputs(cells)
    assert stored.count("image/png") == 2 and "The digit is purple." in stored
    assert "/home/" not in stored and "site-packages" not in stored and '"error"' not in stored


def runner():
    spec = importlib.util.spec_from_file_location(
        "run_notebook", ROOT / "scripts" / "run_notebook.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_speech_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("nbclient", reason='pip install -e ".[docs]"')
    from test_ask import listener

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    model, sound = listener(tmp_path)
    words = " ".join(f"w{i}" for i in range(5, 17))
    rows = [json.dumps({"audio": str(sound), "text": words})] * 8
    (tmp_path / "speech.jsonl").write_text("\n".join(rows))
    notebook = json.loads((ROOT / "docs" / "speech.ipynb").read_text())
    first = "".join(notebook["cells"][1]["source"])
    changed = first.replace("openai/whisper-base", str(model)).replace("GROUP = 64", "GROUP = 32")
    notebook["cells"][1]["source"] = changed + f"\nSPEECH = {str(tmp_path / 'speech.jsonl')!r}"
    last = "".join(notebook["cells"][-1]["source"])
    notebook["cells"][-1]["source"] = last.replace("speech.wav", str(sound))
    path = tmp_path / "speech.ipynb"
    path.write_text(json.dumps(notebook))
    told = outputs(runner().run(path, tmp_path).cells)
    assert (
        "32, symmetric" in told and "right" in told and "<iframe" in told and '"error"' not in told
    )


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    pytest.importorskip("nbclient", reason='pip install -e ".[docs]"')
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    fresh = outputs(runner().run(NOTEBOOK, tmp_path).cells)
    assert "35 of 54 linear layers have 3 bits" in fresh and "The digit is purple." in fresh
    assert (tmp_path / "tmp_notebook" / "tuned" / "model.safetensors").is_file()
    assert sys.executable not in fresh
