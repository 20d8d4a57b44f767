"""The lists of docs/architecture.md under "What to touch": in a copy of the package a new part of
every kind is made of these files and no others, and works."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doc_blocks import ROOT, blocks

FORMAT = "\n".join(
    block.code for block in blocks(ROOT / "docs/new-format.md") if block.language == "python"
)
DIAGONAL = '''"""Scales searched under the diagonal of the second moments; integers by rounding."""

import torch

from auto_mmround.numerics.grids import to_groups
from auto_mmround.numerics.scale_search import search_scale


def starts(roundings, moments, config):
    for name, rounding in roundings.items():
        w_OGg = rounding.w_OGg
        diagonal_Gg = to_groups(moments[name].hessian().diagonal()[None], w_OGg.shape[-1])[0]
        scale_OG, zero_OG = search_scale(w_OGg, diagonal_Gg, rounding.grid)
        rounding.start_at(scale_OG, zero_OG, torch.zeros_like(w_OGg, dtype=torch.float32))
'''
ENGINE = '''"""Another program that reads what Transformers reads."""

import engine_transformers


def answer(request):
    return engine_transformers.answer(request) | {"engine": "twin 1.0"}
'''
WRONG = '''
    @property
    def wrong(self) -> float | None:
        """Share of answers that greedy decoding does not give."""
        return None if self.accuracy is None else 1 - self.accuracy
'''
# part -> {file: (text before the place, text that goes there); "" where the file is new}
NEW = {
    "algorithm": {
        "numerics/diagonal.py": ("", DIAGONAL),
        "recipe/algorithms.py": (
            "ALGORITHMS: dict[str, Algorithm] = {\n",
            '    "diagonal": Algorithm("scales alone", "diagonal.starts", _NONE, steps=False),\n',
        ),
    },
    "scheme": {
        "recipe/schemes.py": (
            "SCHEMES: dict[str, dict[str, Any]] = {\n",
            '    "W4A16_G64": _weights(4, 64),\n',
        )
    },
    "key of a recipe": {
        "recipe/fields.py": (
            "\n    # fmt: off\n",
            '    luck: Annotated[int, _tuning("a number", least=1)] = 7\n',
        )
    },
    "format": {"export/nibbles.py": ("", FORMAT)},
    "engine": {
        "readers.py": (
            "READERS: Mapping[str, Engine] = {\n",
            '    "twin": Engine(kinds=("text",), speaks=False),\n',
        ),
        "engines/engine_twin.py": ("", ENGINE),
        "export/fake.py": ("engines={", '"twin": None, '),
    },
    "family": {
        "families.py": (
            "FAMILIES: dict[str, Family] = {\n",
            '    "toy_vl": Family("Toy-VL", note="read by its structure"),\n',
        ),
        "templates/toy_vl.json": ("", (ROOT / "templates/qwen2_vl.json").read_text()),
    },
    "dataset": {"calibration/named.py": ("NAMED = {\n", '    "toy/rows": Named("toy/rows"),\n')},
    "device": {
        "model/devices.py": (
            "TABLE: dict[str, Traits] = {\n",
            '    "meta": Traits("gloo", lambda: 0, repeatable=_deterministic),\n',
        )
    },
    "metric": {
        "evaluate/metrics.py": ("kl_sum.items()}\n", WRONG),
        "evaluate/tasks.py": (
            "    figures = (\n",
            '        ("answers missed", "", True, lambda m: m.wrong, lambda m: m.answers),\n',
        ),
    },
}
RUN = """
import contextlib, io, json, sys
from auto_mmround import cli

answers = []
for words in json.load(sys.stdin):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            code = cli.main(words)
        except SystemExit as end:
            code = end.code
    answers.append([code, " ".join(out.getvalue().split())])
print("ANSWERS " + json.dumps(answers))
"""
HERE = ["--model", "demo", "--device", "cpu", "--output_dir", "out"]
DATA = ["--dataset", "demo", "--nsamples", "8"]
DONE = {  # part -> command, its exit status, what it says
    "algorithm": ([*HERE, *DATA, "--algorithm", "diagonal"], 0, "demo-w4g128-auto_round"),
    "scheme": (
        [*HERE, "--scheme", "W4A16_G64", "--iters", "0", "--format", "nibbles,fake"],
        0,
        "demo-w4g64-nibbles",
    ),
    "key of a recipe": (["plan", "--model", "demo", "--luck", "0"], 2, "luck = 0: at least 1"),
    "format": (["verify", "out/demo-w4g64-nibbles"], 0, "format nibbles, 0 errors"),
    "engine": (["verify", "out/demo-w4g64-fake", "--engine", "twin"], 0, "twin 1.0, 0 of 0"),
    "family": (["families"], 0, "toy_vl"),
    "dataset": (["plan", "--model", "demo", "--dataset", "toy/row"], 2, "toy/rows"),
    "device": (["plan", "--model", "demo", "--device", "meta"], 2, "0 META devices"),
    "metric": (
        ["eval", "--model", "out/demo-w4g64-nibbles", *DATA[:2], "--tasks", "ppl", "--limit", "3"],
        0,
        "answers missed",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """Part -> (exit status, output) of its command."""
    folder = tmp_path_factory.mktemp("parts")
    package = folder / "auto_mmround"
    hidden = shutil.ignore_patterns("__pycache__", "demo")
    shutil.copytree(ROOT / "auto_mmround", package, ignore=hidden)
    (package / "demo").symlink_to(ROOT / "auto_mmround" / "demo")
    for shelf in ("templates", "processors", "engines"):
        shutil.copytree(ROOT / shelf, package / shelf, ignore=hidden)
    for files in NEW.values():
        for name, (place, text) in files.items():
            path = package / name
            old = path.read_text() if place else ""
            assert path.is_file() == bool(place) and old.count(place or "\0") == bool(place), name
            path.write_text(old.replace(place, place + text) if place else text)
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    commands = json.dumps([command for command, _, _ in DONE.values()])
    ran = subprocess.run(
        [sys.executable, "-c", RUN], input=commands, capture_output=True, text=True, cwd=folder,
        env=environment, check=False, timeout=280,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return dict(zip(DONE, json.loads(ran.stdout.rpartition("ANSWERS ")[2]), strict=True))


@pytest.mark.parametrize("part", DONE)
def test_a_new_part_is_made_of_few_files(part, answers):
    _, code, said = DONE[part]
    assert len(NEW[part]) <= 3
    assert answers[part][0] == code and said in answers[part][1], answers[part]


def test_the_page_names_these_files():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = dict(re.findall(r"^\| ([a-z ]+) \| (.*) \|$", page.split("## What to touch")[1], re.M))
    for part, files in NEW.items():
        for name in files:
            told = f"`{name}`" in rows[part] or f"`{Path(name).parent}/`" in rows[part]
            told = told or (Path(name).parts[0] == "export" and "formats" in rows[part])
            told = told or (name.startswith("templates/") and "a template" in rows[part])
            assert told, f"{part}: {name} is not in {rows[part]!r}"
