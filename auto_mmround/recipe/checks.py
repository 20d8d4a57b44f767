"""Checks of a recipe's values."""

import math
import types
import typing
from typing import Any

from auto_mmround.errors import UserError
from auto_mmround.untrusted import shown


def require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"recipe: {message}")


def all_strings(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def mapping_pairs(mappings: Any) -> list[Any]:
    """Mappings of the right outer form; others as empty ones, which have the wrong length."""
    return [
        m if isinstance(m, list) and m and isinstance(m[0], list) and m[0] else []
        for m in mappings or []
    ]


def types_of(hint: Any) -> tuple[Any, ...]:
    """The types that a field may have."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def coerce(name: str, value: Any, hint: Any) -> Any:
    """Check ``value`` against the field's type. Only an int for a float is converted."""
    plain = tuple(typing.get_origin(option) or option for option in types_of(hint))
    if (
        isinstance(value, int)
        and not isinstance(value, bool)
        and float in plain
        and int not in plain
    ):
        value = float(value) if abs(value) < 2**53 else math.inf
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"recipe: {name} = {value} is no finite number")
    if (isinstance(value, bool) and bool not in plain) or not isinstance(value, plain):
        expected = " or ".join("nothing" if p is type(None) else p.__name__ for p in plain)
        raise UserError(
            f"recipe: {name} = {shown(value)} is a {type(value).__name__}, expected {expected}"
        )
    return value
