"""Arrows point down: what each room may import of the package."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GROUND = {"numerics", "recipe", "calibration", "model"}
COMMON = {"errors", "strict", "untrusted"}
MAY_USE = {
    **{room: {room, *COMMON} for room in GROUND},
    "export": {"export", "recipe", "numerics", *COMMON},
    "run": {"run", "export", *COMMON, *GROUND},
    "evaluation": {"evaluation", "run", "export", *COMMON, "calibration", "model", "numerics", "recipe"},
}
HEAVY = {"torch", "transformers", "datasets", "rich"}


def imports(path: Path, top_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    names = set()
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", sorted(MAY_USE))
def test_rooms_know_only_what_lies_below(room):
    for path in (ROOT / "auto_mmround" / room).glob("*.py"):
        used = {name.split(".")[1] for name in imports(path) if name.startswith("auto_mmround.")}
        assert used - {"__version__"} <= MAY_USE[room], path


def test_numerics_knows_torch_alone():
    for path in (ROOT / "auto_mmround" / "numerics").glob("*.py"):
        assert not any(name.startswith(("transformers", "safetensors")) for name in imports(path)), path


def test_nothing_imports_the_shelves_by_name():
    for path in (ROOT / "auto_mmround").rglob("*.py"):
        assert not any(name.startswith(("auto_mmround.templates", "auto_mmround.processors")) for name in imports(path))


def test_mistakes_are_answered_before_heavy_imports():
    for path in ("cli.py", "__init__.py", "errors.py", "untrusted.py", "recipe/recipe.py", "recipe/schemes.py"):
        roots = {name.split(".")[0] for name in imports(ROOT / "auto_mmround" / path, top_only=True)}
        assert not roots & HEAVY, path


def test_json_is_written_in_one_place():
    """Python's own `dumps` writes NaN. Excepted: workers that talk to us, names and strings, what only we read."""
    excepted = {
        "strict.py", "evaluation/engine_main.py", "evaluation/engine_llamacpp.py", "export/openvino_convert.py",
        "recipe/files.py", "evaluation/static.py", "evaluation/card.py", "export/checkpoint.py", "run/finished.py",
    }  # fmt: skip
    found = {
        str(path.relative_to(ROOT / "auto_mmround"))
        for path in (ROOT / "auto_mmround").rglob("*.py")
        if "json.dump" in path.read_text()
    }
    assert found <= excepted
