"""Records of a run beside its weights: read, written, and refused in one line where they are not as
we write them."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from jinja2 import TemplateError

from auto_mmround import strict
from auto_mmround.errors import UserError
from auto_mmround.untrusted import one_line

# What a value of another form than ours leads to.
OTHER_FORM = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, TemplateError)

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def of_our_form(where: object) -> Iterator[None]:
    """Raises UserError where the body meets records whose form someone has changed."""
    try:
        yield
    except OTHER_FORM as error:
        reason = one_line(f"{type(error).__name__}: {error}")[:200]
        raise UserError(
            f"{where}: run.json, eval.json or verify.json has not the form that we write"
            f" ({reason}): move away what was changed"
        ) from error


def well_formed(work: Callable[Concatenate[Path, P], R]) -> Callable[Concatenate[Path, P], R]:
    """Work on the records of a folder, in `of_our_form`."""

    @wraps(work)
    def checked(folder: Path, *args: P.args, **kwargs: P.kwargs) -> R:
        with of_our_form(folder):
            return work(folder, *args, **kwargs)

    return checked


def read_record(path: Path) -> dict[str, Any]:
    """A file of records. Raises UserError for one that is no JSON."""
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    return values


def dumped(value: Any) -> str:
    """A record as text."""
    return strict.dumps(value, indent=1) + "\n"


def put(path: Path, text: str) -> None:
    """Write a file whole or not at all. Raises UserError if it can't be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise UserError(f"{path} can't be written: {error.strerror}") from None
