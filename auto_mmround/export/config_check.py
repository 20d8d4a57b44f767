"""The form of a `quantization_config` that someone else may have written: each key's type and
range, as a table."""

import re
from collections.abc import Callable, Mapping
from typing import Any

Test = Callable[[Any], bool]
LARGEST_GROUP = 1 << 24
LONGEST_PATTERN = 2000  # characters


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_PATTERN


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _whole(low: int, high: int) -> Test:
    return lambda value: (
        isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    )


def _maybe(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _names(value: Any) -> bool:
    """A name, or a list, perhaps of lists, of names."""
    if isinstance(value, list):
        return all(
            _text(item) or (isinstance(item, list) and all(map(_text, item))) for item in value
        )
    return value is None or _text(value)


def _table(test: Test) -> Test:
    return lambda value: (
        isinstance(value, Mapping) and all(_text(key) and test(item) for key, item in value.items())
    )


def _group_size(value: Any) -> bool:
    return value == -1 or _whole(1, LARGEST_GROUP)(value)


def _keys(tests: Mapping[str, Test]) -> Test:
    return lambda value: (
        isinstance(value, Mapping) and all(tests[key](value[key]) for key in value if key in tests)
    )


def _pattern(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _target(value: Any) -> bool:
    return _text(value) and (not value.startswith("re:") or _pattern(value[3:]))


def _targets(value: Any) -> bool:
    return isinstance(value, list) and all(map(_target, value))


_BITS = _whole(0, 32)
_OVERRIDE = _keys({"bits": _BITS, "group_size": _group_size, "sym": _flag})
_NUMBERS = _keys({"num_bits": _whole(1, 16), "group_size": _maybe(_group_size), "symmetric": _flag})


def _group(value: Any) -> bool:
    form = {"targets": _targets, "weights": _maybe(_NUMBERS), "input_activations": _maybe(_NUMBERS)}
    return isinstance(value, Mapping) and "targets" in value and _keys(form)(value)


FORM: Mapping[str, Test] = {
    "quant_method": _text,
    "mode": _text,
    "packing_format": _text,
    "checkpoint_format": _maybe(_text),
    "bits": _maybe(_BITS),
    "group_size": _maybe(_group_size),
    "sym": _maybe(_flag),
    "zero_point": _maybe(_flag),
    "desc_act": _maybe(_flag),
    "lm_head": _maybe(_flag),
    "block_name_to_quantize": _names,
    "to_quant_block_names": _names,
    "modules_in_block_to_quantize": _names,
    "modules_to_not_convert": _names,
    "ignore": _maybe(_targets),
    "config_groups": _table(_group),
    "extra_config": _maybe(
        lambda v: _table(_OVERRIDE)(v) and all(_pattern(key) for key in v if "*" in key)
    ),
    "dynamic": _maybe(lambda v: _table(_OVERRIDE)(v) and all(_pattern(key[2:]) for key in v)),
}


def problem(quantization_config: Any) -> str | None:
    """Why this can't be the configuration of a quantized checkpoint, whatever its method; None if
    it can."""
    if not isinstance(quantization_config, Mapping):
        return "quantization_config is no object"
    for key, test in FORM.items():
        if key in quantization_config and not test(quantization_config[key]):
            return (
                f"quantization_config: {key} = {str(quantization_config[key])[:80]!r} has not the"
                " form it must have"
            )
    return None
