"""JSON by the standard: NaN and infinity, which Python writes as bare words, become null."""

import json
import math
from collections.abc import Mapping
from typing import Any

WORDS = ("Infinity", "-Infinity", "NaN")


def dumps(value: Any, **options: Any) -> str:
    """`json.dumps` with a result that any parser reads. Characters beyond ASCII stay."""
    return json.dumps(finite(value), allow_nan=False, ensure_ascii=False, **options)


def tagged(value: Any) -> Any:
    """The same as Transformers writes it: infinity as {"__float__": "Infinity"}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")}
    if isinstance(value, Mapping):
        return {key: tagged(item) for key, item in value.items()}
    return [tagged(item) for item in value] if isinstance(value, (list, tuple)) else value


def untagged(value: Any) -> Any:
    """The inverse of `tagged`."""
    if isinstance(value, Mapping):
        word = value.get("__float__") if len(value) == 1 else None
        return (
            float(word) if word in WORDS else {key: untagged(item) for key, item in value.items()}
        )
    return [untagged(item) for item in value] if isinstance(value, (list, tuple)) else value


def finite(value: Any) -> Any:
    """The same with None for every float that is not finite, also in mappings and lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value
