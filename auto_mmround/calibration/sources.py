"""What a dataset argument says: the sets of a mixture and their options.

spec = set { "," set }    set = name { ":" option }
option = num=N | split=a+b | config=C | concat | .."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from auto_mmround.calibration.named import DEMO, KNOWN
from auto_mmround.calibration.template import did_you_mean
from auto_mmround.errors import UserError


@dataclass(frozen=True)
class Source:
    """One set of a mixture with its options."""

    name: str
    num: int | None = None
    split: str | None = None
    config: str | None = None
    concat: bool = False
    apply_template: bool = False
    system_prompt: str | None = None

    @property
    def as_chat(self) -> bool:
        return self.apply_template or self.system_prompt is not None

    def spec(self) -> str:
        """The text that `parse_source` reads back to this source."""
        given = {
            key: value
            for key, value in vars(self).items()
            if key != "name" and value not in (None, False)
        }
        return ":".join([self.name, *(f"{key}={value}" for key, value in given.items())])


def _count(value: str) -> int:
    if not value.isascii() or not value.isdigit() or int(value) < 1:
        raise UserError(f"dataset option num={value!r} must be a whole number of at least 1")
    return int(value)


def _flag(value: str) -> bool:
    if value.lower() not in ("", "true", "false"):
        raise UserError(f"dataset option value {value!r} must be true or false")
    return value.lower() != "false"


OPTIONS: Mapping[str, tuple[str, Any]] = {
    "num": ("num", _count),
    "split": ("split", str),
    "config": ("config", str),
    "concat": ("concat", _flag),
    "apply_template": ("apply_template", _flag),
    "apply_chat_template": ("apply_template", _flag),
    "system_prompt": ("system_prompt", str),
}

FLAGS = [key for key, (_, read) in OPTIONS.items() if read is _flag]  # these need no value


def parse_source(text: str) -> Source:
    """One `name:option:option`. A colon that no known option follows belongs to the name (URLs,
    drive letters)."""
    name, values, last = "", {}, ""
    for i, piece in enumerate(text.split(":")):
        key, mark, value = piece.partition("=")
        if i == 0:
            name = piece.strip()
        elif key.strip() in OPTIONS:
            last = key.strip()
            values[last] = value.strip()
        elif (mark or did_you_mean(key.strip(), FLAGS)) and re.fullmatch(r"\s*\w+\s*", key):
            raise UserError(
                f"dataset {name!r}: unknown option"
                f" {key.strip()!r}{did_you_mean(key.strip(), OPTIONS)}"
            )
        elif last:
            values[last] += f":{piece}"
        else:
            name += f":{piece}"
    if not name:
        raise UserError(f"dataset {text!r} has no name")
    return Source(
        name, **{OPTIONS[key][0]: OPTIONS[key][1](value) for key, value in values.items()}
    )


def parse_spec(spec: str) -> list[Source]:
    """The sets of a dataset argument; an existing path is one set whatever signs it holds. `demo`
    becomes two."""
    if not spec.strip():
        raise UserError("the dataset is empty: name one, such as demo or a local .json file")
    if spec not in KNOWN and Path(spec).exists():
        return [Source(spec)]
    sources = [parse_source(text) for text in spec.split(",") if text.strip()]
    sets = []
    for source in sources:
        halves = list(DEMO) if source.name == "demo" else [source.name]
        shares = _shares(source.num, len(halves))
        sets += [
            Source(**{**vars(source), "name": name, "num": num})
            for name, num in zip(halves, shares)
            if num != 0
        ]
    return sets


def _shares(num: int | None, parts: int) -> list[int | None]:
    return (
        [None] * parts if num is None else [num // parts + (i < num % parts) for i in range(parts)]
    )
