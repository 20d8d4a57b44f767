#!/usr/bin/env python3
"""Runs docs/quickstart.ipynb from the beginning and stores its outputs in it:  python
scripts/run_notebook.py"""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "docs" / "quickstart.ipynb"


def run(source: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with new outputs, run in the folder. Raises CellExecutionError where a cell
    fails."""
    notebook = nbformat.read(source, as_version=4)
    NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    ).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # times of day
    return notebook


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        nbformat.write(run(NOTEBOOK, Path(scratch)), NOTEBOOK)
