"""The documentation builds without a warning and needs nothing but itself; its figures are those of
the results."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from auto_mmround.flags import COMMANDS
from auto_mmround.recipe.recipe import KEYS

ROOT = Path(__file__).parents[1]
# What a browser fetches by itself, as opposed to what a reader may click.
FETCHED = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="(https?:[^"]+)"|<link\b[^>]*\bhref="(https?:[^"]+)"'
)


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_figures_are_drawn_from_the_results():
    figures = load("docs_figures")
    for name, draw in figures.DRAWN.items():
        assert (figures.FIGURES / name).read_text() == draw(), (
            f"{name}: run scripts/docs_figures.py"
        )


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    pytest.importorskip("mkdocs", reason='pip install -e ".[docs]"')
    folder = tmp_path_factory.mktemp("site")
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--quiet",
        "--site-dir",
        str(folder),
    ]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_pages_fetch_nothing_from_elsewhere(site):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        assert not FETCHED.search(page.read_text()), (
            f"{page.relative_to(site)}: {FETCHED.search(page.read_text())[0]}"
        )
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(?:url\(|@import )[\"']?https?:", sheet.read_text()), sheet


def test_equations_are_mathml_and_pages_from_outside_are_there(site):
    tuner = (site / "tuner.html").read_text()
    assert tuner.count("<math") > 30 and "arithmatex" not in tuner and "\\tilde" not in tuner
    assert "figures/time.svg" in tuner
    assert (site / "bench" / "results" / "index.html").is_file() and (
        site / "contributing.html"
    ).is_file()
    assert "The digit is purple." in (site / "notebook.html").read_text()


def test_the_reference_has_every_flag(site):
    page = (site / "reference" / "flags.html").read_text()
    for name, key in KEYS.items():
        assert not key.text or f"<code>--{name}</code>" in page, name
    assert all(f"Command {name}" in page for name in COMMANDS)
