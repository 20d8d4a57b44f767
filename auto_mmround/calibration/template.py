"""Chat templates as data: one JSON file a model family, immutable once read.

`{{content}}` in a `format_*` wrapper marks where the text of the turn goes (first occurrence only).
`replace_tokens` turns the neutral markers `<image>`, `<video>`, `<audio>` of a turn into what the
family's processor expects.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

from auto_mmround.calibration.turns import Message, extras, parse_messages, tool_calls
from auto_mmround.errors import UserError
from auto_mmround.strict import dumps
from auto_mmround.untrusted import parse_json, read_text

DEFAULT = "default"  # its model_type: of the template that families without one get
CONTENT = "{{content}}"
SYSTEM = ("system", "developer")
TEMPLATE_BYTES = 1 << 20


class Encoded(NamedTuple):
    """A conversation as text. answers: (start, end) character spans of the assistant's answers,
    closing token in, trailing blanks out. left: names of parts of the conversation that the text
    does not hold, once for each time."""

    text: str
    answers: tuple[tuple[int, int], ...]
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class Template:
    """How one family writes a conversation. The fields are the keys of the JSON file, with the same
    defaults."""

    model_type: str = "user_define"
    format_user: str = CONTENT
    format_assistant: str = CONTENT
    format_system: str = CONTENT
    format_function: str = ""
    format_observation: str = ""
    format_separator: str = "\n"
    default_system: str = ""
    replace_tokens: tuple[tuple[str, str], ...] = ()
    extra_encode: bool = False
    default_dataset: str = "NeelNanda/pile-10k"
    processor: str = "basic"

    def encode(self, messages: Any) -> str:
        """The whole conversation as one string; `messages` in any form that `parse_messages`
        takes."""
        return self.spans(messages).text

    def prompt(self, messages: Any) -> str:
        """The conversation up to and including the opening of the next answer; a last assistant
        turn is left out."""
        text = self.spans(without_last_answer(parse_messages(messages))).text
        opening = self.format_assistant.split(CONTENT)[0]
        return text if opening and text.endswith(opening) else text + opening

    def replaced(self, content: str) -> str:
        """The text of a turn with `replace_tokens` applied, in order, all occurrences."""
        for old, new in self.replace_tokens:
            content = content.replace(old, new)
        return content

    def spans(self, messages: Any) -> Encoded:
        """As `encode`, with the places of the answers. A system turn in the data stands instead of
        default_system."""
        turns = self._spoken(parse_messages(messages))
        text, answers, left = "", [], list(extras(turns))
        if self.extra_encode and not any(turn.role in SYSTEM for turn in turns):
            text = self.format_system.replace(CONTENT, self.default_system, 1)
        for turn in turns:
            role = "system" if turn.role in SYSTEM else turn.role
            opening, mark, closing = getattr(self, f"format_{role}").partition(CONTENT)
            content = self.replaced(turn.content) if mark else ""
            left += [f"{role} turns"] if turn.content and not mark else []
            if turn.role == "assistant":
                # format_observation has opened the answer already
                if opening and text.endswith(opening):
                    opening = ""
                start = len(text) + len(opening)
                answers.append((start, start + len(content + closing.rstrip())))
            text += opening + content + closing
        return Encoded(text, tuple(answers), tuple(left))

    def _spoken(self, turns: Sequence[Message]) -> list[Message]:
        """The turns, tool calls as turns of their own where the family has a form for them."""
        if CONTENT not in self.format_function:
            return list(turns)
        spoken = []
        for turn in turns:
            calls = [call["function"] for call in tool_calls(turn.extra.get("tool_calls")) or ()]
            kept = {
                key: value for key, value in turn.extra.items() if key != "tool_calls" or not calls
            }
            spoken += [Message(turn.role, turn.content, kept)] if turn.content or not calls else []
            text = dumps(calls if len(calls) > 1 else calls[:1] and calls[0])
            spoken += [Message("function", text)] if calls else []
        return spoken


def without_last_answer(turns: Sequence[Message]) -> tuple[Message, ...]:
    """The turns before a final assistant turn, or all of them if the last one is another's."""
    return tuple(turns[:-1] if turns and turns[-1].role == "assistant" else turns)


def _boolean(value: Any, where: str) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in ("true", "false"):
        return value.lower() == "true"
    raise UserError(
        f'{where}: extra_encode must be true or false (or the string "True"/"False"), not {value!r}'
    )


def _pairs(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(
            f"{where}: replace_tokens must be a list of old and new texts, not {value!r}"
        )
    if all(isinstance(item, str) for item in value):
        if len(value) % 2:
            raise UserError(
                f"{where}: replace_tokens has {len(value)} entries, but it must hold pairs [old,"
                " new, ..]"
            )
        value = list(zip(value[::2], value[1::2], strict=True))
    good = all(
        isinstance(p, Sequence) and len(p) == 2 and all(isinstance(t, str) for t in p) and p[0]
        for p in value
    )
    if not good:
        raise UserError(
            f"{where}: replace_tokens must hold pairs [old, new] of texts with a non-empty old one"
        )
    return tuple((old, new) for old, new in value)


def parse_template(data: Any, where: str = "template") -> Template:
    """A Template from the mapping in a JSON file; null = default. Raises UserError for unknown
    keys, wrong values."""
    if not isinstance(data, Mapping):
        raise UserError(f"{where}: a template must be a JSON object with keys such as format_user")
    known = [field.name for field in fields(Template)]
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}")
        if value is None:
            continue
        if key == "extra_encode":
            values[key] = _boolean(value, where)
        elif key == "replace_tokens":
            values[key] = _pairs(value, where)
        elif isinstance(value, str):
            values[key] = value
        else:
            raise UserError(f"{where}: {key} must be a text, not {value!r}")
    return Template(**values)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """'; did you mean X?' or ''. Compares without regard to case."""
    table = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), table, n=1)
    return f"; did you mean {table[close[0]]!r}?" if close else ""


def read_template(path: Path) -> Template:
    """A template file of the user's. Raises UserError when it can't be read or is no valid
    template."""
    where = f"template {path}"
    return parse_template(parse_json(read_text(path, where, TEMPLATE_BYTES), where), where)


def shipped() -> dict[str, Template]:
    """The templates on the shelf, by model_type."""
    templates = {}
    for entry in sorted(
        resources.files("auto_mmround.templates").iterdir(), key=lambda entry: entry.name
    ):
        if entry.name.endswith(".json"):
            template = parse_template(
                json.loads(entry.read_text(encoding="utf-8")), f"template {entry.name}"
            )
            templates[template.model_type] = template
    return templates


def load_template(name: str | Path | None, model_type: str | None = None) -> Template:
    """The user's template (a file, else a name on the shelf) or, without one, that of
    config.model_type.

    A model type without a template of its own gets "default", which leaves the writing to the
    model's chat template. Raises UserError for an unknown name or an unreadable file.
    """
    shelf = shipped()
    if name is None:
        return shelf.get(model_type or DEFAULT, shelf[DEFAULT])
    if Path(name).is_file():
        return read_template(Path(name))
    if str(name) in shelf:
        return shelf[str(name)]
    if str(name).endswith(".json"):
        raise UserError(f"template file {name} doesn't exist")
    raise UserError(
        f"unknown template {str(name)!r}{did_you_mean(str(name), shelf)} (known:"
        f" {', '.join(shelf)})"
    )
