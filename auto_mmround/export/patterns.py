"""Names and patterns of a configuration, matched with many names: exact ones by a table, patterns by their literal end.

Configurations of mixtures of experts hold tens of thousands of both, so nothing here looks at each pattern for each
name, unless the pattern has another form than those that tools write for one module.
"""

import re
from collections.abc import Iterable, Iterator, Sequence

# What may stand before the literal end of a pattern: anything, or anything that ends with a dot.
HEADS = (r"(.*\.)?", r"(?:.*\.)?", r"(^|.*\.)", r".*\.", ".*")
LITERAL = re.compile(r"(?:[\w-]|\\[^\w\s])*")


class Lookup:
    """The first of many entries that fits a name. Entries: exact names, then patterns (as `re.match` takes them, or
    with ``anywhere`` `re.search`) in their order; an entry is told by its place."""

    def __init__(self, names: Sequence[str], patterns: Sequence[str], anywhere: bool = False):
        self._names = {name: i for i, name in reversed(list(enumerate(names)))}
        self._ends: dict[tuple[bool, str], int] = {}  # (whole parts only, end) -> place
        self._others: list[tuple[int, re.Pattern[str]]] = []
        self._anywhere = anywhere
        for i, pattern in enumerate(patterns, len(names)):
            end = literal_end(pattern)
            if end is None:
                self._others.append((i, re.compile(pattern)))
            else:
                self._ends.setdefault(end, i)
        self._sizes = sorted({len(end) for whole, end in self._ends if not whole})

    def first(self, name: str) -> int | None:
        """The place of the first entry that fits, None where none does."""
        if name in self._names:
            return self._names[name]
        found = [self._ends[end] for end in self._candidates(name) if end in self._ends]
        best = min(found, default=None)
        for i, pattern in self._others:
            if best is not None and i > best:
                break
            if (pattern.search if self._anywhere else pattern.match)(name):
                return i
        return best

    def _candidates(self, name: str) -> Iterator[tuple[bool, str]]:
        for spelling in (name, *templates(name)):
            for tail in tails(spelling):
                yield True, tail
            for size in self._sizes:
                if size <= len(spelling):
                    yield False, spelling[len(spelling) - size :]


def literal_end(pattern: str) -> tuple[bool, str] | None:
    """Of a pattern like ``.*layers\\.3\\.fc1$`` whether its literal end must begin a part of the name, and that end, in
    which ``#`` is any number, as in `templates`; None for patterns of other forms."""
    head = next((head for head in HEADS if pattern.startswith(head)), None)
    if head is None or not pattern.endswith("$") or pattern.endswith(r"\$"):
        return None
    body = pattern[len(head) : -1]
    if not LITERAL.fullmatch(body.replace(r"\d+", "")) or head == r".*\.":  # that one wants something before
        return None
    end = re.sub(r"\\(.)", r"\1", body.replace(r"\d+", "#"))
    parts = end.split(".")
    numbers = parts[parts.index("#") :] if "#" in parts else []
    odd = any("#" in part and part != "#" for part in parts) or any(part.isdigit() for part in numbers)
    return None if odd or (head == ".*" and parts[0] == "#") else (head != ".*", end)


def tails(name: str) -> Iterator[str]:
    """A dotted name and what is left of it without its first part, without its first two, and so on."""
    while True:
        yield name
        _, dot, name = name.partition(".")
        if not dot:
            return


def templates(name: str) -> list[str]:
    """The name with all its numbers replaced by ``#``, then with all but the first, and so on; not the name itself."""
    parts = name.split(".")
    places = [i for i, part in enumerate(parts) if part.isdigit()]
    return [
        ".".join("#" if i in places[first:] else part for i, part in enumerate(parts)) for first in range(len(places))
    ]


def as_pattern(template: str) -> str:
    """A template as a regular expression."""
    return r"\.".join(r"\d+" if part == "#" else re.escape(part) for part in template.split("."))


def folded(names: Iterable[str], everything: Iterable[str]) -> dict[str, list[str]]:
    """Template or name -> its members: for each name the widest template that takes none of ``everything`` else."""
    names = list(names)
    mine, all_ = _counts(names), _counts(everything)
    found: dict[str, list[str]] = {}
    for name in names:
        whole = (t for t in templates(name) if mine[t] == all_[t] > 1)
        found.setdefault(next(whole, name), []).append(name)
    return found


def _counts(names: Iterable[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name in names:
        for template in templates(name):
            found[template] = found.get(template, 0) + 1
    return found
