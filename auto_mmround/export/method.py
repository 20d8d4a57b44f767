"""A quantization method, as configurations name it: its keys, and how its readers match names.

A configuration is a list of names and patterns, and every reader matches it in its own way against
its own module names. A layer that is packed in the file but plain in the engine starts from random
numbers, mostly without a word. So each format restates the rules of its readers:
Transformers 5.23 (with auto-round 0.16, optimum 2.3, gptqmodel 7.7) and vLLM 0.32.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from auto_mmround.export.config_check import Test
from auto_mmround.export.patterns import Lookup
from auto_mmround.recipe.schemes import Scheme

Config = Mapping[str, Any]
Overrides = Mapping[str, Any]
DEFAULTS: Overrides = MappingProxyType({})


@dataclass(frozen=True)
class Spelling:
    """Which layers does an engine quantize? names: linear layers as the engine spells them. head:
    the output head's name. packed: those packed in the file. turned: those of another class than
    Linear in the engine, with weights (in, out). rename: a name of the configuration as the engine
    rewrites it before matching."""

    config: Config
    names: Sequence[str]
    head: str | None
    packed: frozenset[str]
    turned: frozenset[str] = frozenset()
    rename: Callable[[str], str] = str

    def listed(self, *keys: str) -> list[str]:
        """The names and patterns of the first of these keys that has any, rewritten."""
        lists = (entries(self.config, [key]) for key in keys)
        return [self.rename(item) for item in next(filter(None, lists), [])]


# What makes readers take a name of ``extra_config`` for a pattern.
SPECIAL = re.compile(r"[*+?^$()\[\]{}|\\]")


def rule_pattern(rule: str) -> str:
    """The pattern of a rule of ``dynamic``: with -: its modules stay, with +: or no mark they have
    another scheme."""
    return rule[2:] if rule.startswith(("+:", "-:")) else rule


# The answer: the quantized layers, with what the configuration says of each beyond its defaults;
# None where the engine takes no such checkpoint.
Matcher = Callable[[Spelling], Mapping[str, Overrides] | None]


def flat_schemes(
    config: Config, more: Config = MappingProxyType({}), make: Callable[..., Scheme] = Scheme
) -> Callable[[str], Scheme]:
    """The scheme of a module: the configuration's own keys, then the first override that fits.
    Overrides stand in ``extra_config`` by name or pattern, at the top by name, or in ``dynamic`` by
    pattern.

    make: of the keys bits, group_size and sym, and of more: key -> value where nothing says it.
    """
    base: dict[str, Any] = {key: config.get(key, value) for key, value in more.items()} | {
        "bits": config["bits"],
        "group_size": config["group_size"],
        "sym": config.get("sym", not config.get("zero_point", False)),
    }
    extra, dynamic = config.get("extra_config") or {}, config.get("dynamic") or {}
    named = {**{key: value for key, value in config.items() if isinstance(value, Mapping)}, **extra}
    names, patterns = list(named), [key for key in extra if SPECIAL.search(key)]
    rules = [key for key in dynamic if not key.startswith("-:")]
    overrides = [*named.values(), *(extra[key] for key in patterns)]
    places, later = Lookup(names, patterns, anywhere=True), Lookup([], [*map(rule_pattern, rules)])

    def scheme(name: str) -> Scheme:
        place, rule = places.first(name), later.first(name)
        later_own = {} if rule is None else dynamic[rules[rule]]
        own = later_own if place is None else overrides[place]
        return make(**{key: own.get(key, value) for key, value in base.items()})

    return scheme


@dataclass(frozen=True)
class Method:
    """One `quant_method` (MLX: `mode`), shared by all formats that have it.

    required: keys without which readers guess, and guess differently. form: test of the values of
    its own keys. listed: keys that name modules. schemes: a configuration's scheme of each packed
    module. readers: engine -> how it finds the layers to quantize. copied: the configuration lies
    in `quantization_config.json` too. unread: what a configuration asks engines to compute that our
    reader does not; the flag: of inputs and of keys and values too.
    """

    name: str
    required: tuple[str, ...] = ()
    form: Mapping[str, Test] = field(default_factory=dict)
    listed: tuple[str, ...] = ()
    schemes: Callable[[Config], Callable[[str], Scheme]] = flat_schemes
    readers: Mapping[str, Matcher] = field(default_factory=dict)
    copied: bool = False
    unread: Callable[[Config, bool], str | None] = lambda config, activations: None


def entries(config: Config, keys: Sequence[str]) -> list[str]:
    """Every name, prefix and pattern that stands under these keys. A string is split at commas; a
    table counts by its keys, one of groups by their targets."""
    values = (config.get(key) or () for key in keys)
    parts = (value.split(",") if isinstance(value, str) else _flat(value) for value in values)
    return list(dict.fromkeys(item for part in parts for item in part))


def _flat(value: Any) -> list[str]:
    if isinstance(value, Mapping):
        groups = (options.get("targets") for options in value.values())
        return [item for key, targets in zip(value, groups) for item in targets or [key]]
    nested = isinstance(value, (list, tuple))
    return [item for part in value for item in _flat(part)] if nested else [value]


def searched(pattern: str, name: str) -> bool:
    """Whether a pattern fits anywhere in a name; one that is no regular expression fits nowhere."""
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False
