"""How users name layers."""

import re


def is_pattern(pattern: str) -> bool:
    """Whether `matches` can take it."""
    try:
        return not pattern.startswith("re:") or bool(re.compile(pattern[3:]))
    except (re.error, OverflowError, RecursionError):
        return False


def matches(pattern: str, name: str) -> bool:
    """`re:` patterns match anywhere from the start, others must be the name, its end after a dot, or its class.

    The original matched any substring; whole dotted parts keep `--fp_layers q_proj` working without surprises.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return f".{pattern}." in f".{name}."
