"""Patterns of layer names."""

import re
from collections.abc import Iterable, Sequence


def is_pattern(pattern: str) -> bool:
    """Whether `matches` can take it."""
    try:
        return not pattern.startswith("re:") or bool(re.compile(pattern[3:]))
    except (re.error, OverflowError, RecursionError):
        return False


def starred(name: str) -> str:
    """The name with a star for each number in it."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def matches(pattern: str, name: str) -> bool:
    """Whether a pattern names a layer.

    `re:` patterns match from the start of the name. Others must be the name, its end after a dot,
    or its class. The original matched any substring; with whole dotted parts, `--fp_layers q_proj`
    gives no surprises.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return f".{pattern}." in f".{name}."


class Patterns:
    """Which of many patterns name a layer, without a trial of each.

    Dotted parts of names, and classes, lie in a table; only `re:` patterns are tried in turn.
    """

    def __init__(self, patterns: Iterable[str]):
        self.all = list(dict.fromkeys(patterns))
        self._plain = {
            pattern: i for i, pattern in enumerate(self.all) if not pattern.startswith("re:")
        }
        self._regular = [
            (re.compile(p[3:]), i) for i, p in enumerate(self.all) if p.startswith("re:")
        ]

    def of(self, name: str, classes: Sequence[str] = ()) -> list[str]:
        """The patterns that name a layer, or with ``classes`` one of these, in their order."""
        parts = name.split(".")
        runs = {
            ".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)
        }
        places = [self._plain[run] for run in {*runs, *classes} if run in self._plain]
        places += [i for pattern, i in self._regular if pattern.match(name)]
        return [self.all[i] for i in sorted(places)]
