"""Code of the user's, named as `module:name` in a recipe: imported only because it is named there,
see docs/calibration.md for what it must offer."""

import importlib
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from auto_mmround.calibration.template import did_you_mean
from auto_mmround.errors import UserError

DOTTED = re.compile(r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")
# What a mistake in somebody's code may raise. Interrupts and a full memory are not among them.
MISTAKES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError, OSError,
    RuntimeError,
    SyntaxError, TypeError, ValueError,
)  # fmt: skip

Collate = Callable[[list[Any]], Mapping[str, Any]]


def is_dotted(name: str) -> bool:
    """Whether a name reads as `module:name` (`package.module:Class.method` too)."""
    return DOTTED.fullmatch(name) is not None


@contextmanager
def told(what: str) -> Iterator[None]:
    """Errors in the user's code as one line: what failed, in which line of which file, and why."""
    try:
        yield
    except UserError:
        raise
    except MISTAKES as error:
        raise UserError(f"{what} failed{blamed(error)}") from error


def blamed(error: BaseException) -> str:
    """Where an error was raised, and why: " (file.py line 3): KeyError: 'text'"."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename != __file__ and not frame.filename.startswith("<frozen importlib")
    ]
    inside = [frame for frame in frames if "importlib" not in Path(frame.filename).parts]
    where = f" ({Path(inside[-1].filename).name} line {inside[-1].lineno})" if inside else ""
    reason = (str(error).splitlines() or [""])[0]
    return f"{where}: {type(error).__name__}: {reason}"


def find(path: str, what: str) -> Any:
    """The object that `module:name` stands for. The current folder is searched first, then
    installed modules.

    what: for messages, such as `collator`. Raises UserError when the module or the name in it is
      missing or broken.
    """
    if not is_dotted(path):
        raise UserError(f"{what} {path!r} must read module:name, such as my_module:collate")
    module_name, _, names = path.partition(":")
    sys.path.insert(0, str(Path.cwd()))
    try:
        importlib.invalidate_caches()
        with told(f"{what} {path!r}: importing {module_name}"):
            thing: Any = importlib.import_module(module_name)
    finally:
        sys.path.pop(0)
    for name in names.split("."):
        if not hasattr(thing, name):
            public = [each for each in dir(thing) if not each.startswith("_")]
            raise UserError(
                f"{what} {path!r}: {module_name} has no {name!r}{did_you_mean(name, public)}"
            )
        thing = getattr(thing, name)
    return thing


class Indexed(Sequence[Any]):
    """Rows of an object with a length and an index; each is made when it is asked for."""

    def __init__(self, rows: Any, name: str) -> None:
        self.rows, self.name = rows, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        with told(f"dataset {self.name!r}: row {index}"):
            return self.rows[index]


def rows(path: str, limit: int, **options: Any) -> Sequence[Any]:
    """The rows of a dataset named by path: an iterable, or a class or function that gives one when
    it is called.

    options: keywords for that call. At most `limit` rows are read where the length isn't known.
      Raises UserError.
    """
    dataset = find(path, "dataset")
    if callable(dataset):
        with told(f"dataset {path!r}: calling it"):
            dataset = dataset(**options)
    elif options:
        raise UserError(
            f"dataset {path!r} is no class or function: it can't take {', '.join(options)}"
        )
    if isinstance(dataset, Mapping | str | bytes):
        raise UserError(
            f"dataset {path!r} gives a {type(dataset).__name__}, not rows one after the other"
        )
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return Indexed(dataset, path)
    if not isinstance(dataset, Iterable):
        raise UserError(
            f"dataset {path!r} gives a {type(dataset).__name__}, which can't be iterated over"
        )
    with told(f"dataset {path!r}: reading its rows"):
        return list(islice(dataset, limit))


def collator(path: str) -> Collate:
    """The collator named by path: called with a list of one row, it gives the model's keyword
    arguments."""
    function = find(path, "collator")
    if not callable(function):
        raise UserError(f"collator {path!r} is a {type(function).__name__}, which can't be called")

    def collate(batch: list[Any]) -> Mapping[str, Any]:
        with told(f"collator {path!r}"):
            made = function(batch)
        if not isinstance(made, Mapping):
            raise UserError(
                f"collator {path!r} gave a {type(made).__name__}, not a mapping of model inputs"
            )
        return made

    return collate
