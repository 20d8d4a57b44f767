"""Turns of a conversation, from every form that people store them in to one: a role, a text with
markers for media, and whatever else a chat template may read (tool calls, reasoning, names), under
the names that chat templates use."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from auto_mmround.errors import UserError
from auto_mmround.untrusted import shown

MARKERS = {"image": "<image>", "video": "<video>", "audio": "<audio>"}
MARKER = re.compile("|".join(map(re.escape, MARKERS.values())))
# In small letters; what OpenAI, Gemini, Llama, ShareGPT and LLaMA-Factory write.
ROLES = {
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "ai", "chatgpt", "bing", "bard", "claude"),
        "assistant"),
    **dict.fromkeys(("observation", "tool", "ipython", "tool_response", "function_response"),
        "observation"),
    **dict.fromkeys(("function", "function_call", "tool_call"), "function"),
    **{role: role for role in ("system", "developer")},
}  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "thinking")
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value", "parts")


class _Turn(NamedTuple):
    role: str
    content: str


class Message(_Turn):
    """One turn. role: user, assistant, system, developer, function (a call) or observation (its
    answer). content: text; media stand as `<image>`, .. extra: all else that the turn says, as chat
    templates name it."""

    extra: Mapping[str, Any]

    def __new__(cls, role: str, content: str, extra: Mapping[str, Any] | None = None) -> "Message":
        made = super().__new__(cls, role, content)
        made.extra = extra or {}
        return made


def is_empty(value: Any) -> bool:
    """None, or a text, list or mapping with nothing in it."""
    return value is None or (
        isinstance(value, str | bytes | list | tuple | Mapping) and not len(value)
    )


def decoded(value: Any) -> Any:
    """A list or mapping that is stored as JSON text; any other value as it is."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def part_kind(part: Mapping[str, Any]) -> str:
    """text, image, video or audio for one typed part of a content list: {"type": "image"}, {"type":
    "image_url"}, ..; also the types of parts that say something else: thinking, tool_use,
    tool_result."""
    given = str(
        part.get("type")
        or next((key for key in ("text", *MARKERS) if not is_empty(part.get(key))), "")
    )
    kind = given.removeprefix("input_").removeprefix("output_").removesuffix("_url")
    kind = {"reasoning": "thinking", "refusal": "text"}.get(kind, kind)
    if kind not in ("text", "thinking", "tool_use", "tool_result", *MARKERS):
        raise UserError(
            f"a content part has the type {shown(part.get('type'))}: expected text, image, video or"
            " audio"
        )
    return kind


def _content(content: Any) -> tuple[str, dict[str, Any]]:
    """The text of a turn's content, and what its parts say besides."""
    if isinstance(content, str):
        return content, {}
    if content is None:
        return "", {}
    content = [content] if isinstance(content, Mapping) else content
    if not isinstance(content, Iterable):
        raise UserError(
            "the content of a message must be text or a list of parts, not"
            f" {type(content).__name__}"
        )
    text, thoughts, calls = "", "", []
    for part in content:
        part = {"type": "text", "text": part} if isinstance(part, str) else part
        if not isinstance(part, Mapping):
            raise UserError(
                'the parts of a message must look like {"type": "text", "text": ".."} or {"type":'
                ' "image"}'
            )
        kind = part_kind(part)
        if kind == "thinking":
            thoughts += str(next((part[key] for key in (*REASONING, "text") if part.get(key)), ""))
        elif kind == "tool_use":
            calls.append(
                {"id": part.get("id"), "name": part.get("name"), "arguments": part.get("input")}
            )
        elif kind == "tool_result":
            text += _content(part.get("content"))[0]
        else:
            text += MARKERS.get(kind) or str(part.get("text") or part.get("refusal") or "")
    return text, {"reasoning_content": thoughts} | {"tool_calls": calls}


def tool_calls(value: Any) -> list[dict[str, Any]] | None:
    """Calls in the form that chat templates read, arguments as a mapping; from a list, one call, or
    JSON text of them.

    None for what is no call.
    """
    value = decoded(value)
    calls = []
    for call in value if isinstance(value, list | tuple) else [value]:
        call = decoded(call)
        inner = decoded(call.get("function", call)) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            return None
        said: Any = next(
            (inner[key] for key in ("arguments", "parameters") if inner.get(key) is not None), {}
        )
        function = {"name": inner["name"], "arguments": without_none(decoded(said))}
        calls.append(
            {"type": "function", "function": function}
            | ({"id": call["id"]} if call.get("id") else {})
        )
    return calls


def without_none(value: Any) -> Any:
    """A tree without the empty places that tables of unequal rows put in it."""
    if isinstance(value, Mapping):
        return {key: without_none(each) for key, each in value.items() if each is not None}
    return [without_none(each) for each in value] if isinstance(value, list | tuple) else value


def _turn(turn: Any) -> Message:
    if isinstance(turn, Message):
        return turn
    if not isinstance(turn, Mapping):
        raise UserError(
            f'a message must look like {{"role": "user", "content": ".."}}, not {shown(turn)}'
        )
    by = next((key for key in ROLE_KEYS if turn.get(key) is not None), None)
    name = turn.get(by) if by else None
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise UserError(f"unknown role {shown(name)} in a message: known are {', '.join(ROLES)}")
    key = next((key for key in CONTENT_KEYS if turn.get(key) is not None), None)
    content, more = _content(turn.get(key) if key else None)
    extra = {k: v for k, v in turn.items() if k not in (by, key) and not is_empty(v)} | more
    if role == "function" and name == "function" and "name" in extra:
        role = "observation"  # OpenAI's old name for what a call has answered
    for source in ("function_call", "tool_calls"):
        if not is_empty(extra.get(source)) and (calls := tool_calls(extra[source])):
            del extra[source]
            extra["tool_calls"] = calls
    return Message(
        role, content, {key: value for key, value in extra.items() if not is_empty(value)}
    )


def parse_messages(messages: Any) -> tuple[Message, ...]:
    """Any accepted form to Messages: a string (one user turn), or turns with role/from and
    content/value.

    Raises UserError for what has no turns, an unknown role or a turn that isn't a mapping.
    """
    if isinstance(messages, str):
        return (Message("user", messages),)
    if not isinstance(messages, Iterable):
        raise UserError(
            f"messages must be a list of turns or a text, not {type(messages).__name__}"
        )
    return tuple(_turn(turn) for turn in messages)


def extras(turns: Iterable[Message], options: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """The names of all that turns and options say beside roles and texts, once for each time."""
    return (*(options or {}), *(name for turn in turns for name in turn.extra))
