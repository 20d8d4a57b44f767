"""Names and patterns of a configuration, matched with many names: exact ones by a table, patterns
by their literal end.

Configurations of mixtures of experts hold tens of thousands of both. So nothing here tries each
pattern on each name, if the pattern has a form that tools write for one module.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

# What may stand before the end of a pattern -> where that end begins: anywhere, at a part of the
# name, at its start.
HEADS = {
    r"(.*\.)?": "part",
    r"(?:.*\.)?": "part",
    r"(^|.*\.)": "part",
    ".*": "anywhere",
    "^": "start",
    "": "start",
}
TOKEN = re.compile(r"(?P<number>\\d\+)|\\(?P<escaped>[^\w\s#])|(?P<plain>[\w-])|(?P<any>\.)")


class End(NamedTuple):
    """What names end in: the text, in which ``#`` is any number, as in `templates`, and ``?`` any
    character. where: see HEADS. wild: places of the latter."""

    where: str
    text: str
    wild: tuple[int, ...]


class Lookup:
    """The first of many entries that fits a name. Entries: exact names, then patterns (as
    `re.match` takes them, or with ``anywhere`` `re.search`) in their order; an entry is told by its
    place."""

    def __init__(self, names: Sequence[str], patterns: Sequence[str], anywhere: bool = False):
        self._names = {name: i for i, name in reversed(list(enumerate(names)))}
        self._ends: dict[tuple[str, int, tuple[int, ...]], dict[str, int]] = {}
        self._others: list[tuple[int, re.Pattern[str]]] = []
        self._anywhere = anywhere
        for i, pattern in enumerate(patterns, len(names)):
            end = end_of(pattern, anywhere)
            if end is None:
                self._others.append((i, re.compile(pattern)))
            else:
                self._ends.setdefault((end.where, len(end.text), end.wild), {}).setdefault(
                    end.text, i
                )

    def first(self, name: str) -> int | None:
        """The place of the first entry that fits, None where none does."""
        if name in self._names:
            return self._names[name]
        best = min(self._by_end(name), default=None)
        for i, pattern in self._others:
            if best is not None and i > best:
                break
            if (pattern.search if self._anywhere else pattern.match)(name):
                return i
        return best

    def _by_end(self, name: str) -> Iterator[int]:
        for spelling in (name, *templates(name)):
            for (where, size, wild), table in self._ends.items():
                front = len(spelling) - size
                if front < 0 or (
                    front and (where == "start" or (where == "part" and spelling[front - 1] != "."))
                ):
                    continue
                text = spelling[front:]
                for place in wild:
                    text = f"{text[:place]}?{text[place + 1 :]}"
                if text in table:
                    yield table[text]


def end_of(pattern: str, anywhere: bool = False) -> End | None:
    """Of a pattern like ``.*layers\\.3\\.fc1$`` what names must end in; None for patterns of other
    forms."""
    head = next(head for head in HEADS if pattern.startswith(head))
    if not pattern.endswith("$") or pattern.endswith(r"\$") or (anywhere and not head):
        return None
    body, text, wild, at = pattern[len(head) : -1], "", list[int](), 0
    while at < len(body):
        token = TOKEN.match(body, at)
        if token is None:
            return None
        wild += [len(text)] if token["any"] else []
        text += (
            "#" if token["number"] else "?" if token["any"] else token["escaped"] or token["plain"]
        )
        at = token.end()
    parts = text.split(".")
    if "#" not in text:
        return End(HEADS[head], text, tuple(wild))
    whole = all(part == "#" or "#" not in part for part in parts)
    behind = parts[parts.index("#") :] if "#" in parts else []
    odd = (
        wild
        or not whole
        or any(part.isdigit() for part in behind)
        or (head == ".*" and parts[0] == "#")
    )
    return None if odd else End(HEADS[head], text, ())


def tails(name: str) -> Iterator[str]:
    """A dotted name and what is left of it without its first part, without its first two, and so
    on."""
    while True:
        yield name
        _, dot, name = name.partition(".")
        if not dot:
            return


def templates(name: str) -> list[str]:
    """The name with all its numbers replaced by ``#``, then with all but the first, and so on; not
    the name itself."""
    parts = name.split(".")
    places = [i for i, part in enumerate(parts) if part.isdigit()]
    return [
        ".".join("#" if i in places[first:] else part for i, part in enumerate(parts))
        for first in range(len(places))
    ]


def as_pattern(template: str) -> str:
    """A template as a regular expression."""
    return r"\.".join(r"\d+" if part == "#" else re.escape(part) for part in template.split("."))


def folded(names: Iterable[str], everything: Iterable[str]) -> dict[str, list[str]]:
    """Template or name -> its members: for each name the widest template that takes none of
    ``everything`` else."""
    names = list(names)
    mine, all_ = _counts(names), _counts(everything)
    folds: dict[str, list[str]] = {}
    for name in names:
        whole = (t for t in templates(name) if mine[t] == all_[t] > 1)
        folds.setdefault(next(whole, name), []).append(name)
    return folds


def _counts(names: Iterable[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in names:
        for template in templates(name):
            counts[template] = counts.get(template, 0) + 1
    return counts
