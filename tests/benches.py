"""Files of `bench/` as modules, for tests."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "bench"


def bench(name: str) -> ModuleType:
    """A bench, which finds its neighbours as it does when Python runs it."""
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        patch.setitem(sys.modules, name, module)  # where dataclasses look for their module
        spec.loader.exec_module(module)
    return module
