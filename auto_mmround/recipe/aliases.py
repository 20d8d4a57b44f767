"""Names of llm-compressor, GPTQModel and AutoRound for our keys, values and schemes."""

import difflib
from collections.abc import Collection, Mapping
from types import NoneType
from typing import Any

from auto_mmround.errors import UserError
from auto_mmround.recipe.schemes import SCHEMES

# Values with another name for one of ours; YAML's null is None.
VALUES: dict[str, dict[Any, Any]] = {
    "actorder": {"static": "weight", None: "none"},
    "equalize": {None: "none"},
}


def resolve(
    values: dict[str, Any], where: str, known: Collection[str], others: Mapping[str, str]
) -> dict[str, Any]:
    """``values`` with our names only, and with the keys of its `scheme`. others: name -> ours.

    Raises UserError for an unknown key, with the nearest name, for a key given twice, and for an
    unknown scheme.
    """
    resolved: dict[str, Any] = {}
    for key, value in values.items():
        name = others.get(key, key)
        if name not in known and name != "scheme":
            near = difflib.get_close_matches(str(key), [*known, *others, "scheme"], n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"{where}: unknown key {key!r}; {hint}")
        if name in resolved:
            raise UserError(f"{where}: {key} and {name} are the same key; give one of them")
        meant = VALUES.get(name, {})
        resolved[name] = meant.get(value, value) if isinstance(value, (str, NoneType)) else value
    if "scheme" in resolved:
        resolved = {**preset(resolved.pop("scheme"), where), **resolved}
    return resolved


def preset(name: Any, where: str) -> dict[str, Any]:
    """The keys of a scheme such as W4A16."""
    keys = SCHEMES.get(name.upper()) if isinstance(name, str) else None
    if keys is None:
        raise UserError(f"{where}: scheme = {name!r} is unknown; there are {', '.join(SCHEMES)}")
    return keys
