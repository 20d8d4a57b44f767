"""What the fuzzer feeds, as hypothesis strategies: hostile values, damaged trees and damaged bytes;
and to whom."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from auto_mmround.errors import UserError

TOO_SLOW = 10.0

WORDS = [
    *("", " ", "\0", "\ud800", "\x1b[31mred", "\u202e", "x" * 300, "x" * 5000, "../outside/secret",
        "/etc/hostname"),
    *("re:(", "re:(a+)+$", "(.*)*(.*)*(.*)*x", "*" * 40, "{0.__class__}", "{{content}}", "%s%n",
        "<image>", "<video>"),
    *("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ''.__class__.__mro__ }}"),
    *("None", "Infinity", "1e999", "file:///etc/hostname", "http://127.0.0.1:9/x",
        "data:image/png;base64,AAAA"),
]  # fmt: skip
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    255,
    65536,
    2**31,
    2**63,
    -(2**63),
    10**30,
    0.5,
    -0.0,
    1e308,
    float("inf"),
    float("nan"),
]
NESTED: Any = []
for _ in range(200):
    NESTED = [NESTED]


@dataclass(frozen=True)
class Target:
    """name; the inputs; read(work folder, input): what is done with one. accepted: how a reader may
    say no.
    patience: processor seconds for one input."""

    name: str
    inputs: st.SearchStrategy[Any]
    read: Callable[[Path, Any], object]
    accepted: tuple[type[Exception], ...] = (UserError,)
    patience: float = TOO_SLOW


def _tree(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(children, max_size=3) | st.dictionaries(
        st.sampled_from(WORDS) | st.text(max_size=8), children, max_size=3
    )


LEAVES = st.sampled_from([None, True, False, NESTED, *NUMBERS, *WORDS]) | st.text(max_size=20)
VALUES = st.recursive(LEAVES, _tree, max_leaves=6)


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value of a tree, the tree itself first."""
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    return [path, *(place for key, value in items for place in places(value, (*path, key)))]


# Functions of their own, so that none is bound to a variable of a loop.
def _putting(value: Any) -> Callable[[Any], Any]:
    return lambda _: value


def _dropping(key: Any) -> Callable[[Any], Any]:
    return lambda at: _without(at, key)


def _adding(key: Any, value: Any) -> Callable[[Any], Any]:
    return lambda at: {**at, key: value} if isinstance(at, dict) else [at, value]


def _changed(tree: Any, path: tuple[Any, ...], change: Callable[[Any], Any]) -> Any:
    if not path:
        return change(tree)
    if isinstance(tree, dict) and path[0] in tree:
        return {**tree, path[0]: _changed(tree[path[0]], path[1:], change)}
    if isinstance(tree, list) and isinstance(path[0], int) and path[0] < len(tree):
        return [*tree[: path[0]], _changed(tree[path[0]], path[1:], change), *tree[path[0] + 1 :]]
    return tree


@st.composite
def damaged(draw: Any, *seeds: Any) -> Any:
    """One of the trees with one to three of its values replaced, dropped, repeated or added to."""
    tree = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(places(tree)))
        kind = draw(st.sampled_from(["twist", "twist", "twist", "put", "drop", "add", "wrap"]))
        value = draw(_akin(_at(tree, path)) if kind == "twist" else VALUES)
        if kind == "drop" and path:
            tree = _changed(tree, path[:-1], _dropping(path[-1]))
        elif kind == "add":
            tree = _changed(tree, path, _adding(draw(st.sampled_from(WORDS)), value))
        elif kind == "wrap":
            tree = _changed(tree, path, lambda at: [at, at])
        else:
            tree = _changed(tree, path, _putting(value))
    return tree


def _at(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


def _akin(value: Any) -> st.SearchStrategy[Any]:
    """Other values of the same type, which get further than those of another."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int | float):
        return st.sampled_from(NUMBERS) | st.integers(-3, 40) | st.floats()
    if isinstance(value, str):
        return st.sampled_from(WORDS) | st.text(max_size=12).map(value.__add__) | st.just(value * 2)
    return VALUES


def _without(tree: Any, key: Any) -> Any:
    if isinstance(tree, dict):
        return {k: v for k, v in tree.items() if k != key}
    return tree[:key] + tree[key + 1 :] if isinstance(tree, list) and isinstance(key, int) else tree


def written(tree: Any) -> bytes:
    """JSON as Python writes it, NaN and lone surrogates included."""
    return json.dumps(tree).encode()


@st.composite
def damaged_bytes(draw: Any, *seeds: bytes) -> bytes:
    """One of the seeds, cut, overwritten, doubled or spliced in up to four places; most often near
    its head."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(0, 4))):
        reach = max(len(data), 1)
        at = draw(st.integers(0, min(200, reach)) | st.integers(0, reach))
        kind = draw(st.sampled_from(["put", "put", "word", "cut", "drop", "double", "insert"]))
        if kind == "put":
            data[at : at + 1] = bytes([draw(st.integers(0, 255))])
        elif kind == "word":
            size = draw(st.sampled_from([2, 4, 8]))
            number = draw(
                st.sampled_from(
                    [0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**64 - 1]
                )
            )
            number %= 1 << (8 * size)
            data[at : at + size] = number.to_bytes(size, draw(st.sampled_from(["little", "big"])))
        elif kind == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif kind == "cut":
            del data[at:]
        else:
            end = min(len(data), at + draw(st.integers(1, 64)))
            data[at:end] = b"" if kind == "drop" else bytes(data[at:end]) * 2
    return bytes(data)


def text_files(*seeds: str) -> st.SearchStrategy[bytes]:
    """Text with damaged bytes, deep nesting, or no sense at all."""
    deep = [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"1" * 5000,
        b"\xff\xfe",
        b"\xef\xbb\xbf{}",
        b"[1e999]",
        b"a: &a [*a, *a]",
    ]
    return (
        damaged_bytes(*(seed.encode() for seed in seeds))
        | st.sampled_from(deep)
        | st.binary(max_size=60)
    )


def file_reader(name: str, read: Callable[[Path], object]) -> Callable[[Path, bytes], object]:
    """Writes the input under a name in the given folder and reads it."""

    def one(work: Path, data: bytes) -> object:
        path = work / "given" / name
        path.write_bytes(data)
        return read(path)

    return one
