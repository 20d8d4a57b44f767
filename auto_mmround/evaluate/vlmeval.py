"""VLMEvalKit: its sets, prompts and scoring, with answers of our loaded model.

Imported only if the package is installed. Its command line and its inference loop are not used:
they load models by name, and store answers as pickles. Scoring is by exact matching; no judge in
the network is asked.
"""

import os
import shutil
import ssl
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from auto_mmround.errors import UserError
from auto_mmround.evaluate.prompts import answer, asked
from auto_mmround.model.loading import Loaded

_context, _gradients = ssl._create_default_https_context, torch.is_grad_enabled()
from vlmeval.dataset import build_dataset  # noqa: E402

# The import switches off the checking of certificates, and gradients, for the whole process.
ssl._create_default_https_context = _context
torch.set_grad_enabled(_gradients)

ROOT = "LMUData"  # the variable by which the package finds its sets; it has no other way to be told
ANSWER = 512  # tokens


def evaluate(
    loaded: Loaded, task: str, limit: int | None
) -> Iterable[tuple[str, str, str, float, int, bool]]:
    """Figures of a set by name, or of a .tsv file.

    Each is (set, split, metric, value, samples, lower is better). Raises UserError for an unknown
    set, and for one that only a judge model can score.
    """
    file = Path(task)
    if file.suffix == ".tsv" and not file.is_file():
        raise UserError(f"vlmeval set {task}: there is no such file")
    with tempfile.TemporaryDirectory() as work, _root(work if file.suffix == ".tsv" else None):
        if file.suffix == ".tsv":
            shutil.copy(file, Path(work) / file.name)
        name = file.stem if file.suffix == ".tsv" else task
        data = build_dataset(name)
        if data is None or not hasattr(data, "build_prompt"):
            raise UserError(
                f"vlmeval has no set {task!r}: its names are in VLMEvalKit's documentation, or give"
                " a .tsv"
            )
        data.data = data.data.iloc[:limit] if limit else data.data
        said = [_answer(loaded, data.build_prompt(row)) for _, row in data.data.iterrows()]
        answers = Path(work) / f"ours_{name}.xlsx"
        data.data.drop(columns=["image"], errors="ignore").assign(prediction=said).to_excel(
            answers, index=False
        )
        try:
            results = data.evaluate(str(answers), model="exact_matching", nproc=1)
        except NotImplementedError:
            raise UserError(
                f"vlmeval can't score {task!r} without a judge: give a set with choices A, B, .."
            ) from None
    yield from _figures(results, name, len(said))


@contextmanager
def _root(folder: str | None) -> Iterator[None]:
    """The folder of the package's sets inside the context; None leaves the user's own."""
    before = os.environ.get(ROOT)
    os.environ.update({ROOT: folder} if folder else {})
    try:
        yield
    finally:
        if folder and before is None:
            del os.environ[ROOT]
        elif folder:
            os.environ[ROOT] = str(before)


def _answer(loaded: Loaded, parts: Iterable[Mapping[str, str]]) -> str:
    """parts: texts and paths of images and videos, in order."""
    parts = list(parts)
    text = "\n".join(
        part["value"] if part["type"] == "text" else f"<{part['type']}>" for part in parts
    )
    media = {
        kind: [part["value"] for part in parts if part["type"] == kind]
        for kind in ("image", "video")
    }
    return answer(
        loaded, asked(loaded, text, media["image"], media["video"], max_new_tokens=ANSWER)
    )


def _figures(
    results: Any, name: str, count: int
) -> Iterator[tuple[str, str, str, float, int, bool]]:
    """The numbers in a set's result: a table with one row per split, or a mapping."""
    rows = results.to_dict("records") if isinstance(results, pd.DataFrame) else [results]
    for row in rows:
        split = str(row.get("split") or "")
        split = "" if split == "none" else split
        for metric, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                yield name, split, str(metric), float(value), count, False
