"""The shelf `engines/`: programs for engines' environments, which do not import this package, and
how they answer."""

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# What tells an interpreter where packages lie. That of the caller is not for another environment.
PLACES = ("PYTHONPATH", "PYTHONHOME", "PYTHONUSERBASE", "__PYVENV_LAUNCHER__")


def program(name: str) -> Path:
    """The file of a program; its name has no ending."""
    spec = find_spec("auto_mmround.engines")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / f"{name}.py"


def environment_of(python: Path) -> dict[str, str]:
    """Variables for a program that ``python`` runs: the caller's, offline. Another interpreter than
    ours finds its own packages, not those that the caller points to."""
    own = python.absolute() == Path(sys.executable).absolute()
    variables = {name: value for name, value in os.environ.items() if own or name not in PLACES}
    # no debugger on a crash of llama.cpp
    return variables | {"HF_HUB_OFFLINE": "1", "GGML_NO_BACKTRACE": "1"}


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
