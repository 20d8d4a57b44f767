"""Processors turn one sample into the model's keyword arguments; found by name at run time, built
fresh for each run.

    @register_processor("my_family")
    class MyFamily(Basic): ...

A name is looked up among the classes registered so far, the shelf `auto_mmround.processors` and the
entry point group `auto_mmround.processors`; `load_processor_file` reads a user's own file.
"""

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, Protocol, TypeVar

from jinja2.exceptions import TemplateError

from auto_mmround.calibration.conversation import allowed, arranged, left_out
from auto_mmround.calibration.rows import BadSample, Sample
from auto_mmround.calibration.template import Encoded, Template, did_you_mean, without_last_answer
from auto_mmround.calibration.turns import MARKER, MARKERS, Message
from auto_mmround.errors import UserError
from auto_mmround.untrusted import TooLong, one_line, time_limit

SHELF = "auto_mmround.processors"
GROUP = "auto_mmround.processors"
CHAT_SECONDS = 10.0
CHAT_LETTERS = 20_000_000


class Processor(Protocol):
    """What a processor class must offer. It must not change the tokenizer or processor that it is
    given."""

    def __init__(
        self, tokenizer: Any, processor: Any = None, image_processor: Any = None, config: Any = None
    ) -> None:
        """processor: the family's own one of Transformers, or None. config: the model's
        configuration."""

    def encode(self, sample: Sample, template: Template, *, prompt: bool = False) -> dict[str, Any]:
        """Model keyword arguments, batch dimension 1, for a sample with messages and decoded media;
        never truncated.

        prompt: stop at the opening of the last answer.
        """


P = TypeVar("P", bound=type)
_CLASSES: dict[str, type] = {}


def register_processor(name: str) -> Callable[[P], P]:
    """Class decorator: makes a processor known under `name` and returns the class."""

    def register(cls: P) -> P:
        _CLASSES[name] = cls
        return cls

    return register


def _load_shelf() -> None:
    for module in pkgutil.iter_modules(importlib.import_module(SHELF).__path__):
        importlib.import_module(f"{SHELF}.{module.name}")


def known_processors() -> list[str]:
    """The names that `find_processor` takes."""
    _load_shelf()
    return sorted({*_CLASSES, *(entry.name for entry in entry_points(group=GROUP))})


def find_processor(name: str) -> type[Processor]:
    """The class registered under a name. Raises UserError, listing the known ones, for any other
    name."""
    if name not in _CLASSES:
        known = known_processors()
        if name not in known:
            raise UserError(
                f"unknown processor {name!r}{did_you_mean(name, known)} (known: {', '.join(known)})"
            )
    if name in _CLASSES:
        return _CLASSES[name]
    entry, *_ = entry_points(group=GROUP, name=name)
    cls: type[Processor] = entry.load()
    return cls


def load_processor_file(path: Path, name: str | None = None) -> type[Processor]:
    """Run a user's own file and return the class it registers (the one called `name` when there are
    several).

    What the file registers stays out of the registry, so two runs in one process don't meet. Raises
    UserError.
    """
    spec = importlib.util.spec_from_file_location(f"user_processor_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise UserError(f"processor file {path} doesn't exist or is no Python file")
    _load_shelf()
    before = dict(_CLASSES)
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
        new = {key: cls for key, cls in _CLASSES.items() if before.get(key) is not cls}
    except (ImportError, SyntaxError) as error:
        raise UserError(f"processor file {path} can't be imported: {error}") from error
    finally:
        _CLASSES.clear()
        _CLASSES.update(before)
    if len(new) == 1:
        return next(iter(new.values()))
    if name in new:
        return new[name]
    raise UserError(
        f"processor file {path} must register one class with @register_processor, found {len(new)}"
    )


def get_processor(name_or_file: str | None, template: Template) -> type[Processor]:
    """The class for a run: `--processor NAME` or `FILE.py`, else the template's own."""
    if name_or_file and str(name_or_file).endswith(".py"):
        return load_processor_file(Path(name_or_file), template.processor)
    return find_processor(name_or_file or template.processor)


def split_markers(content: str) -> list[dict[str, str]]:
    """Text with markers to typed parts in its order; the line break that sets a marker apart is
    left out."""
    kinds = {marker: kind for kind, marker in MARKERS.items()}
    pieces = [piece for piece in re.split(f"\n?({MARKER.pattern})\n?", content) if piece]
    return [
        {"type": kinds[piece]} if piece in kinds else {"type": "text", "text": piece}
        for piece in pieces
    ]


def chat_owner(tokenizer: Any, processor: Any) -> Any:
    """The processor, else the tokenizer, that has a chat template; None if neither has."""
    return next(
        (each for each in (processor, tokenizer) if getattr(each, "chat_template", None)), None
    )


def _written(owner: Any, chat: Sequence[Any], **options: Any) -> str:
    """A conversation as the model's chat template writes it. Transformers runs it in Jinja's
    sandbox.

    Raises TemplateError also where the template fails in another way, takes too long, or writes too
    much.
    """
    try:
        with time_limit(CHAT_SECONDS):
            text = str(owner.apply_chat_template(chat, tokenize=False, **options))
    except TooLong:
        raise TemplateError(
            f"the chat template takes more than {CHAT_SECONDS:.0f} seconds"
        ) from None
    except (
        TypeError,
        ValueError,
        LookupError,
        ArithmeticError,
        AttributeError,
        RuntimeError,
        MemoryError,
    ) as error:
        raise TemplateError(f"the chat template fails: {one_line(str(error))[:300]}") from error
    if len(text) > CHAT_LETTERS:
        raise TemplateError(f"the chat template writes more than {CHAT_LETTERS:,} letters")
    return text


def _takes_parts(owner: Any) -> bool:
    """Whether the chat template reads content lists: asked by writing one."""
    try:
        chat = [{"role": "user", "content": [{"type": "text", "text": "probe"}]}]
        text = _written(owner, chat)
    except TemplateError:
        return False
    return "probe" in text and "'type'" not in text


def render(
    turns: Sequence[Message],
    template: Template,
    tokenizer: Any,
    processor: Any = None,
    *,
    prompt: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Encoded:
    """A conversation as text with the places of its answers: by the template, else by the model's
    own chat template.

    Without any chat template the contents are joined as they are. prompt: stop at the opening of
    the last answer.
    options: what a chat template may have besides, such as tools. Raises jinja2's TemplateError
    when a chat template refuses the conversation.
    """
    owner = None if template.extra_encode else chat_owner(tokenizer, processor)
    if owner is None:
        encoded = template.spans(turns)
        text, answers = (template.prompt(turns), ()) if prompt else (encoded.text, encoded.answers)
        return Encoded(text, answers, (*(options or {}), *encoded.left))
    turns = without_last_answer(turns) if prompt else tuple(turns)
    parts = not template.replace_tokens and _takes_parts(owner)
    contents = [
        split_markers(turn.content) if parts else template.replaced(turn.content) for turn in turns
    ]
    given = allowed(options or {}, owner.apply_chat_template)

    def write(count: int, opening: bool) -> str:
        return _written(owner, chat[:count], add_generation_prompt=opening, **given)

    def whole(chat: Sequence[Any], more: Mapping[str, Any]) -> str:
        return _written(owner, chat, add_generation_prompt=prompt, **more)

    chat = arranged(turns, contents, lambda said: whole(said, given))
    text = write(len(chat), prompt)
    answers_found: list[tuple[int, int]] = []
    for i, turn in enumerate(turns):
        if chat[i]["role"] == "assistant":
            after = answers_found[-1][1] if answers_found else 0
            answers_found += _answer_span(text, turn.content.strip(), i, write, after)
    refused = set(options or {}) - set(given)
    return Encoded(
        text, tuple(answers_found), (*sorted(refused), *left_out(chat, given, whole, text))
    )


def _answer_span(
    text: str, content: str, index: int, write: Callable[[int, bool], str], after: int
) -> list[tuple[int, int]]:
    """Where answer `index` lies in a chat template's text: between two shorter writings, else by
    its own words."""
    try:
        before, upto = write(index, True) if index else "", write(index + 1, False).rstrip()
    except TemplateError:
        before = upto = "\0"
    if text.startswith(before) and text.startswith(upto):
        return [(len(before), len(upto))]
    start = text.find(content, after)
    return [(start, start + len(content))] if content and start >= 0 else []


def hearing(processor: Any) -> Any:
    """The part of a processor that reads sound (`feature_extractor`, `audio_processor`); None if it
    has none."""
    parts = (getattr(processor, name, None) for name in ("feature_extractor", "audio_processor"))
    return next((part for part in parts if part is not None), None)


def check_heard(sample: Sample, extractor: Any) -> None:
    """Raises BadSample for a sound that the model can't hear, or that an extractor with a fixed
    window would cut, while its transcript goes on."""
    if sample.audios and extractor is None:
        raise BadSample(
            "sound for a model without ears",
            f"sample {sample.id}: the model's processor reads no sound",
        )
    limit, rate = getattr(extractor, "n_samples", None), getattr(extractor, "sampling_rate", 16000)
    for sound_T in sample.audios:
        if limit and len(sound_T) > limit:
            message = (
                f"sample {sample.id}: {len(sound_T) / rate:.1f} seconds, the model hears"
                f" {limit / rate:g}"
            )
            raise BadSample("sound longer than the model hears", message)


def special_tokens_for(tokenizer: Any, text: str) -> dict[str, bool]:
    """Keyword for a tokenizer's call that keeps it from adding a second BOS to a text that opens
    with one."""
    bos = getattr(tokenizer, "bos_token", None)
    return {"add_special_tokens": False} if bos and text.startswith(bos) else {}
