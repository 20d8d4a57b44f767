"""The shelf `engines/`: programs for engines' environments, which do not import this package, and
how they answer."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any


def program(name: str) -> Path:
    """The file of a program; its name has no ending."""
    spec = find_spec("auto_mmround.engines")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / f"{name}.py"


def answer_of(output: str) -> dict[str, Any] | None:
    """The JSON object that a program printed last; None if that is none."""
    lines = output.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def piece_of(line: str) -> str | int | None:
    """The piece of an answer that a line of a program's output says; None for other lines."""
    if not line.startswith('{"piece"'):
        return None
    try:
        piece = json.loads(line)["piece"]
    except ValueError:
        return None
    return piece if isinstance(piece, str | int) else None
