"""docs/quickstart.ipynb runs, and its stored outputs are there, small, and of no particular
machine."""

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


@pytest.mark.slow
def test_it_runs(tmp_path, monkeypatch):
    pytest.importorskip("nbclient", reason='pip install -e ".[docs]"')
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    spec = importlib.util.spec_from_file_location(
        "run_notebook", ROOT / "scripts" / "run_notebook.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fresh = outputs(module.run(NOTEBOOK, tmp_path).cells)
    assert "35 of 54 linear layers have 3 bits" in fresh and "The digit is purple." in fresh
    assert (tmp_path / "tmp_notebook" / "tuned" / "model.safetensors").is_file()
    assert sys.executable not in fresh
