"""The shelf `engines/`: programs for engines' environments, which do not import this package."""

from importlib.util import find_spec
from pathlib import Path


def program(name: str) -> Path:
    """The file of a program; its name has no ending."""
    spec = find_spec("auto_mmround.engines")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations))) / f"{name}.py"
