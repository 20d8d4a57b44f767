"""The form of a `quantization_config` that someone else may have written: tests of types and
ranges, of which methods make tables of their keys."""

import re
from collections.abc import Callable, Mapping
from typing import Any

Test = Callable[[Any], bool]
LARGEST_GROUP = 1 << 24
LONGEST_PATTERN = 2000  # characters


def text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_PATTERN


def flag(value: Any) -> bool:
    return isinstance(value, bool)


def whole(low: int, high: int) -> Test:
    return lambda value: (
        isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    )


def maybe(test: Test) -> Test:
    return lambda value: value is None or test(value)


def names(value: Any) -> bool:
    """A name, or a list, perhaps of lists, of names."""
    if isinstance(value, list):
        return all(
            text(item) or (isinstance(item, list) and all(map(text, item))) for item in value
        )
    return value is None or text(value)


def table(test: Test) -> Test:
    return lambda value: (
        isinstance(value, Mapping) and all(text(key) and test(item) for key, item in value.items())
    )


def group_size(value: Any) -> bool:
    return value == -1 or whole(1, LARGEST_GROUP)(value)


def keys(tests: Mapping[str, Test]) -> Test:
    return lambda value: (
        isinstance(value, Mapping) and all(tests[key](value[key]) for key in value if key in tests)
    )


def pattern(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def target(value: Any) -> bool:
    return text(value) and (not value.startswith("re:") or pattern(value[3:]))


def targets(value: Any) -> bool:
    return isinstance(value, list) and all(map(target, value))


BITS = whole(0, 32)
_OVERRIDE = keys(
    {"bits": BITS, "group_size": group_size, "sym": flag}
    | {"data_type": text, "act_bits": maybe(BITS), "act_data_type": maybe(text)}
)
numbers = keys({"num_bits": whole(1, 16), "group_size": maybe(group_size), "symmetric": flag})


def overrides(pattern_of: Callable[[str], str]) -> Test:
    """A table of names or patterns, each with bits, group_size and sym. pattern_of: the regular
    expression in a key, "" for none."""
    return lambda value: table(_OVERRIDE)(value) and all(pattern(pattern_of(key)) for key in value)


def group(value: Any) -> bool:
    """A group of compressed-tensors."""
    form = {"targets": targets, "weights": maybe(numbers), "input_activations": maybe(numbers)}
    return isinstance(value, Mapping) and "targets" in value and keys(form)(value)


# Keys that many methods have.
COMMON: Mapping[str, Test] = {
    "quant_method": text,
    "mode": text,
    "checkpoint_format": maybe(text),
    "bits": maybe(BITS),
    "group_size": maybe(group_size),
    "sym": maybe(flag),
    "zero_point": maybe(flag),
    "desc_act": maybe(flag),
    "lm_head": maybe(flag),
}


def problem(quantization_config: Any, form: Mapping[str, Test]) -> str | None:
    """Why this can't be the configuration of a quantized checkpoint, whatever its method; None if
    it can. form: of the keys of all methods."""
    if not isinstance(quantization_config, Mapping):
        return "quantization_config is no object"
    for key, test in {**COMMON, **form}.items():
        if key in quantization_config and not test(quantization_config[key]):
            return (
                f"quantization_config: {key} = {str(quantization_config[key])[:80]!r} has not the"
                " form it must have"
            )
    return None
