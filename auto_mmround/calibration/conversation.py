"""A conversation in the model's own chat template: everything that the template can say, and the
names of the rest."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from auto_mmround.calibration.turns import REASONING, Message, tool_calls
from auto_mmround.strict import dumps

# Turns to text.
Write = Callable[[Sequence[Mapping[str, Any]]], str]
Turns = list[dict[str, Any]]


def allowed(options: Mapping[str, Any], apply: Callable[..., Any]) -> dict[str, Any]:
    """Options of a row that a chat template may have: tools, documents and its own switches, none
    of the caller's."""
    own = set(inspect.signature(apply).parameters) | {
        "tokenize", "chat_template", "return_dict", "return_tensors",
    }  # fmt: skip
    return {
        key: value
        for key, value in options.items()
        if key in ("tools", "documents") or key not in own
    }


def arranged(turns: Sequence[Message], contents: Sequence[Any], write: Write) -> Turns:
    """The turns as mappings in the form that this template takes: roles that it knows, arguments of
    calls as mappings or as text, reasoning under the name that it reads. Raises TemplateError when
    it takes none."""
    chat = [_said(turn, content, write) for turn, content in zip(turns, contents, strict=True)]
    if all(set(turn) == {"role", "content"} for turn in chat):
        return chat
    try:
        write(chat)
    except TemplateError:
        as_text = [_with_text(turn) for turn in chat]
        if as_text == chat:
            raise
        write(as_text)
        chat = as_text
    for i, turn in enumerate(chat):
        given = next((key for key in REASONING if key in turn), None)
        for name in REASONING if given else ():
            renamed = {name if key == given else key: value for key, value in turn.items()}
            if not _silent(chat, i, name, [*chat[:i], renamed, *chat[i + 1 :]], write):
                chat[i] = renamed
                break
    return chat


def _said(turn: Message, content: Any, write: Write) -> dict[str, Any]:
    """One turn as a template has it; what a model says to call a function is an assistant's
    turn."""
    if turn.role == "function":
        calls = tool_calls(turn.content)
        told = {"role": "assistant", "content": "", "tool_calls": calls, **turn.extra}
        asked = {"role": "user", "content": "a"}
        untold = told | {"tool_calls": []}
        if calls and _written(write, [asked, told]) != _written(write, [asked, untold]):
            return told
        return {"role": "assistant", "content": content, **turn.extra}
    role = {"observation": "tool"}.get(turn.role, turn.role)
    if role == "developer" and not _knows(role, write):
        role = "system"
    return {"role": role, "content": content, **turn.extra}


def _written(write: Write, chat: Turns) -> str | None:
    for each in (chat, [_with_text(turn) for turn in chat]):
        try:
            return write(each)
        except TemplateError:
            continue
    return None


def _knows(role: str, write: Write) -> bool:
    """Whether a template treats a role otherwise than one that nobody has heard of."""
    asked = {"role": "user", "content": "a"}
    own, other = (
        _written(write, [{"role": name, "content": "b"}, asked]) for name in (role, "xyzzy")
    )
    return own is not None and (other is None or own.replace(role, "xyzzy") != other)


def _with_text(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A turn with the arguments of its calls as JSON text, as OpenAI's interface has them."""
    calls = [
        {**call, "function": {**call["function"],
            "arguments": dumps(call["function"]["arguments"])}}
        if isinstance(call, Mapping) and isinstance(call.get("function"), Mapping)
        and not isinstance(call["function"].get("arguments"), str) else call
        for call in turn.get("tool_calls", ())
    ]  # fmt: skip
    return {**turn, "tool_calls": calls} if calls else dict(turn)


def _silent(chat: Turns, index: int, key: str, whole: Turns, write: Write) -> bool:
    """Whether the text is the same without one key of a turn."""
    less = {name: value for name, value in whole[index].items() if name != key}
    try:
        return write(whole) == write([*chat[:index], less, *chat[index + 1 :]])
    except TemplateError:
        return False


def left_out(
    chat: Turns, options: Mapping[str, Any], write: Callable[..., str], text: str
) -> Iterator[str]:
    """The names of what a written conversation does not say: options, keys of turns, whole turns of
    unusual roles."""
    for key in options:
        if _same(
            text, write, chat, {name: value for name, value in options.items() if name != key}
        ):
            yield key
    for i, turn in enumerate(chat):
        for key in turn:
            if key not in ("role", "content"):
                less = {name: value for name, value in turn.items() if name != key}
                if _same(text, write, [*chat[:i], less, *chat[i + 1 :]], options):
                    yield key
        unusual = turn["role"] not in ("user", "assistant") and turn["content"] and len(chat) > 1
        if unusual and _same(text, write, [*chat[:i], *chat[i + 1 :]], options):
            yield f"{turn['role']} turns"


def _same(text: str, write: Callable[..., str], chat: Turns, options: Mapping[str, Any]) -> bool:
    try:
        return write(chat, options) == text
    except TemplateError:
        return False
