"""Arrows point down: what each room may import of the package. Functions and files are small."""

import ast
import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
GROUND = {"numerics", "recipe", "calibration", "model"}
COMMON = {
    "atomic",
    "errors",
    "families",
    "headers",
    "lazy",
    "modalities",
    "programs",
    "readers",
    "strict",
    "untrusted",
}
# Room -> rooms below it that it may use.
BELOW = {
    **{room: set[str]() for room in GROUND},
    "export": {"recipe", "numerics"},
    "checkpoint": {"export", "model", "recipe", "numerics"},
    "run": {"checkpoint", "export", *GROUND},
    "report": {"export", "model", "recipe"},
    "evaluate": {"report", "run", "checkpoint", "export", *GROUND},
    "verify": {"evaluate", "run", "checkpoint", "export", *GROUND},
}
MEASURED = ("auto_mmround", "scripts", "bench", "engines", "processors")
LONGEST_FUNCTION, LONGEST_FILE, MOST_PARAMETERS = 50, 400, 8
# (file, function or "" for the file) that are larger; one that is mended leaves this list.
LARGER: set[tuple[str, str]] = set()
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


def files() -> dict[str, Path]:
    """Module -> its file, of the whole package."""
    paths = (ROOT / "auto_mmround").rglob("*.py")
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in paths
    }


def arrows() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, at the top or inside functions."""
    known = files()
    found = {}
    for module, path in known.items():
        names = {name for name in imports(path) if name.startswith("auto_mmround")}
        modules = {name if name in known else name.rpartition(".")[0] for name in names}
        found[module] = modules - {module, "auto_mmround"}  # of the package itself only its version
    return found


def test_rooms_know_only_what_lies_below():
    """Every folder is a room; what stands at the top is a face, or common to all."""
    assert {module.split(".")[1] for module in files() if module.count(".") > 1} == set(BELOW)
    wrong = []
    for module, used in arrows().items():
        room = module.split(".")[1] if module.count(".") else ""
        if room in BELOW:
            may = {room, *COMMON, *BELOW[room]}
            wrong += [
                f"{module} -> {name}"
                for name in used
                if name.count(".") and name.split(".")[1] not in may
            ]
    assert not wrong, f"arrows that point up: {', '.join(sorted(wrong))}"


def test_no_files_import_each_other_in_a_circle():
    left = arrows()
    while leaves := {module for module, used in left.items() if not used & left.keys()}:
        left = {module: used for module, used in left.items() if module not in leaves}
    assert not left, f"in circles, or above them: {', '.join(sorted(left))}"


def test_numerics_knows_torch_alone():
    for path in (ROOT / "auto_mmround" / "numerics").rglob("*.py"):
        assert not any(
            name.startswith(("transformers", "safetensors")) for name in imports(path)
        ), path


def test_nothing_imports_the_shelves_by_name():
    for path in (ROOT / "auto_mmround").rglob("*.py"):
        shelves = ("auto_mmround.templates", "auto_mmround.processors", "auto_mmround.engines")
        assert not any(name.startswith(shelves) for name in imports(path))


def test_mistakes_are_answered_before_heavy_imports():
    for path in (
        "cli.py",
        "flags.py",
        "completion.py",
        "__init__.py",
        "errors.py",
        "untrusted.py",
        "recipe/recipe.py",
        "recipe/schemes.py",
    ):
        roots = {
            name.split(".")[0] for name in imports(ROOT / "auto_mmround" / path, top_only=True)
        }
        assert not roots & HEAVY, path


def test_json_is_written_in_one_place():
    """Python's own `dumps` writes NaN. Excepted: workers that talk to us, names and strings, what
    only we read."""
    excepted = {
        "strict.py", "recipe/files.py", "verify/side_files.py", "report/card.py",
        "export/shards.py", "run/finished.py",
    }  # fmt: skip
    found = {
        str(path.relative_to(ROOT / "auto_mmround"))
        for path in (ROOT / "auto_mmround").rglob("*.py")
        if "json.dump" in path.read_text()
    }
    assert found <= excepted


def test_the_plan_has_a_row_for_every_file():
    """In docs/architecture.md, and none for a file that is gone."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `([a-z0-9_/]+[a-z0-9_])` \|", text, re.M)
    known = [path for path in files().values() if path.name != "__init__.py"]
    names = [path.relative_to(ROOT / "auto_mmround").with_suffix("") for path in known]
    assert sorted(rows) == sorted(name.as_posix() for name in names)


def names_of(path: Path) -> list[str]:
    """Functions, classes and constants of a file."""
    found = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [target.id for target in targets if isinstance(target, ast.Name)]
    return [name for name in found if not name.startswith("__")]


def test_nothing_is_there_for_the_tests_alone():
    """What a file defines is named once more in the package, or on a shelf."""
    pages = [*(ROOT / "auto_mmround" / "report" / "pages").iterdir()]
    shelves = [path for room in ("processors", "engines") for path in (ROOT / room).glob("*.py")]
    words = Counter()
    for path in (*files().values(), *shelves, *pages):
        words.update(re.findall(r"\w+", path.read_text()))
    unused = [
        f"{module}.{name}"
        for module, path in files().items()
        for name in names_of(path)
        if words[name] < 2
    ]
    assert not unused


def test_no_two_classes_share_a_name():
    homes: dict[str, list[str]] = {}
    for module, path in files().items():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes.setdefault(node.name, []).append(module)
    assert not {name: where for name, where in homes.items() if len(where) > 1}


def too_large(text: str) -> dict[str, str]:
    """Function, or "" for the file itself -> what is too much of it."""
    found, lines = {}, len(text.splitlines())
    if lines > LONGEST_FILE:
        found[""] = f"{lines} lines"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines, given = node.end_lineno - node.lineno + 1, node.args
        names = [each.arg for each in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        count = len([name for name in names if name not in ("self", "cls")])
        if lines > LONGEST_FUNCTION or count > MOST_PARAMETERS:
            found[node.name] = f"{lines} lines, {count} parameters"
    return found


def test_functions_and_files_are_small():
    found = {
        (path.relative_to(ROOT).as_posix(), name): much
        for room in MEASURED
        for path in sorted((ROOT / room).rglob("*.py"))
        for name, much in too_large(path.read_text()).items()
    }
    new = [f"{file} {name}: {found[file, name]}" for file, name in found.keys() - LARGER]
    assert not new, f"too large: {'; '.join(sorted(new))}"
    assert found.keys() >= LARGER, f"small by now: {LARGER - found.keys()}"


def test_what_is_too_large_is_seen():
    many = ", ".join(f"a{i}" for i in range(MOST_PARAMETERS))
    body = "    x = 1\n" * (LONGEST_FUNCTION - 1)
    right = f"class A:\n def m(self, {many}): pass\ndef f(*, {many}):\n{body}"
    assert too_large(right) == {}
    assert too_large(right.replace("def f(*", "def f(b, *")).keys() == {"f"}
    assert too_large(right + "    x = 1\n").keys() == {"f"}
    assert too_large("x = 1\n" * LONGEST_FILE) == {}
    assert too_large("x = 1\n" * (LONGEST_FILE + 1)).keys() == {""}
