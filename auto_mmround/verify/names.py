"""How vLLM spells the modules of a model; whether an entry of a
configuration names any."""

import re
from collections.abc import Iterable

from auto_mmround.export.method import searched
from auto_mmround.families import family_of


def vllm_rename(model_type: str, name: str) -> str:
    """A name or a prefix of one, from the checkpoint or the configuration, in vLLM's spelling."""
    for pattern, new in family_of(model_type).vllm:
        name = re.sub(pattern, new, name, count=1)
    return name


def vllm_module(model_type: str, name: str) -> str:
    """The full name of a module, in vLLM's spelling."""
    return vllm_rename(model_type, name + ".").removesuffix(".")


def names_something(entry: str, names: Iterable[str]) -> bool:
    """Whether some reader could match an entry with one of the names, as a part or as a pattern."""
    if entry == "Linear":
        return True
    for mark in ("re:", "+:", "-:"):
        entry = entry.removeprefix(mark)
    return any(entry in name or searched(entry, name) for name in names)
