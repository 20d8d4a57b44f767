"""What pages, notebooks, benches and scripts take of the package is there, and is called with
arguments that it has. Most of them run only now and then, and mypy reads none of them."""

import ast
import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from doc_blocks import ROOT, blocks

FOLDERS = ("bench", "engines", "processors", "scripts", "tests")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def sources() -> Iterator[tuple[str, str]]:
    """(place, Python code)."""
    for path in sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py")):
        yield path.relative_to(ROOT).as_posix(), path.read_text()
    for path in sorted((ROOT / "docs").rglob("*.ipynb")):
        cells = json.loads(path.read_text())["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        yield path.relative_to(ROOT).as_posix(), "\n".join(code)
    for block in (found for page in PAGES for found in blocks(page)):
        if block.language == "python":
            yield block.place, block.code


def taken(tree: ast.AST) -> Iterator[tuple[ast.ImportFrom, ast.alias]]:
    """Names that the code imports from modules of the package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("auto_mmround"):
            yield from ((node, alias) for alias in node.names)


def value_of(module: str, name: str) -> Any:
    found = importlib.import_module(module)
    if hasattr(found, name):
        return getattr(found, name)
    return importlib.import_module(f"{module}.{name}")


def wrong_names(code: str) -> list[str]:
    """What is wrong with imports from the package, and with calls of what they bring."""
    tree, known, wrong = ast.parse(code), dict[str, Callable[..., Any]](), []
    for node, alias in taken(tree):
        try:
            value = value_of(str(node.module), alias.name)
        except ImportError as error:
            wrong.append(f"{node.lineno}: {error}")
        else:
            if callable(value):
                known[alias.asname or alias.name] = value
    return wrong + [said for node in ast.walk(tree) if (said := misfit(node, known))]


def misfit(node: ast.AST, known: dict[str, Callable[..., Any]]) -> str | None:
    """Why the call does not fit the function, where all its arguments are written out."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return None
    open_ended = any(isinstance(each, ast.Starred) for each in node.args)
    if node.func.id not in known or open_ended or any(each.arg is None for each in node.keywords):
        return None
    named = {str(each.arg): each.value for each in node.keywords}
    try:
        signature = inspect.signature(known[node.func.id])
    except ValueError:  # of a class that has Python's own constructor, as errors do
        return None
    try:
        signature.bind(*node.args, **named)
    except TypeError as error:
        return f"{node.lineno}: {node.func.id}: {error}"
    return None


def test_what_others_take_of_the_package_is_there() -> None:
    found = list(sources())
    places = {place for place, _ in found}
    assert {"docs/quickstart.ipynb", "bench/tuner.py", "scripts/demo.py"} <= places
    wrong = [f"{place}:{said}" for place, code in found for said in wrong_names(code)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("from auto_mmround.evaluate.evaluate import Way", "Way"),
        ("from auto_mmround.no_such import thing", "no_such"),
        ("from auto_mmround.verify.answers import Question as Q\nQ()", "Q: missing"),
        (
            "from auto_mmround.evaluate.evaluate import evaluate\nevaluate('a', 1, wrong=1)",
            "'wrong'",
        ),
    ],
)
def test_what_is_not_there_is_seen(code: str, word: str) -> None:
    (said,) = wrong_names(code)
    assert word in said
