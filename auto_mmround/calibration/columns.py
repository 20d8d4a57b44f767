"""The columns of a row by what they hold: the conversation or text, media, and what goes into a
chat template beside it. Sets call these by many names; the tables below are all that is known, what
is left is told by name."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from auto_mmround.calibration.roots import find_file
from auto_mmround.calibration.turns import (
    MARKERS,
    Message,
    decoded,
    is_empty,
    part_kind,
    without_none,
)

CHATS = ("conversations", "messages", "conversation", "text", "content")
# Columns of a question (joined) and of its answer, the first pair that is there.
PAIRS = (
    (("instruction", "input"), ("output", "response", "answer")),
    (("question",), ("answer", "answers", "multiple_choice_answer", "response")),
    (("query",), ("response", "answer")),
    (("prompt",), ("completion", "response", "chosen", "answer", "output")),
    (("problem",), ("solution", "answer")),
    (("input",), ("output", "target")),
)
# Columns with what is said in a sound or seen in an image, in sets that don't call it `text`.
ABOUT = ("transcription", "transcript", "sentence", "normalized_text", "caption")
PLURAL = {"image": "images", "video": "videos", "audio": "audios"}
# The first of these that is there; the two first are read together.
MEDIA = {
    "image": ("image", "images", "img", "imgs", "picture", "pictures", "photo", "image_path",
        "image_paths",
              "image_file", "image_url", "image_urls", "jpg", "jpeg", "png", "webp"),
    "video": ("video", "videos", "video_path", "video_url", "mp4"),
    "audio": ("audio", "audios", "audio_path", "audio_url", "speech", "sound", "wav", "flac",
        "mp3"),
}  # fmt: skip
FILES = ("file_name", "path", "file", "filename", "filepath")  # of the kind that the ending tells
ENDINGS = {
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".opus"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2",
              ".tga", ".ppm"),
    "video": (".mp4", ".mkv", ".webm", ".mov", ".avi"),
}  # fmt: skip
MAGIC = {
    "image": (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF....WEBP"),
    "audio": (b"fLaC", b"OggS", b"ID3", b"RIFF....WAVE"),
}
PART_KEYS = ("path", "url", "source", "data", "base64")


class Columns:
    """One row taken apart. turns: a text, turns of any form, Messages, or None where nothing says
    anything. media: kind -> references in the order of the text. unread: names of the columns that
    nobody took and that hold something."""

    def __init__(self, row: Mapping[str, Any], base: Path | None) -> None:
        self.row, self.base = row, base
        self.taken = {"id"}
        queues = self._queues()
        self.turns = self._turns([kind for kind, items in queues.items() if items])
        if not any(queues.values()):
            queues = self._unnamed()
        self.media = _ordered(self.turns, queues)

    def take(self, *names: str) -> Any:
        """The first of these columns that holds something; None if none does."""
        name = next((name for name in names if not is_empty(self.row.get(name))), None)
        self.taken |= {name} if name else set()
        return self.row[name] if name else None

    @property
    def unread(self) -> tuple[str, ...]:
        return tuple(
            str(key)
            for key, value in self.row.items()
            if key not in self.taken and not is_empty(value)
        )

    def options(self) -> dict[str, Any]:
        """What a chat template may read beside the turns."""
        beside = {"tools": self.take("tools", "functions"), "documents": self.take("documents")}
        more = decoded(self.take("chat_template_kwargs"))
        given = {key: decoded(value) for key, value in beside.items() if value is not None}
        given = {
            key: [decoded(each) for each in value] if isinstance(value, list) else value
            for key, value in given.items()
        }
        return without_none(given) | (dict(more) if isinstance(more, Mapping) else {})

    def _queues(self) -> dict[str, list[Any]]:
        """References by kind in columns whose names tell the kind, or whose file names do."""
        media: dict[str, list[Any]] = {}
        for kind, names in MEDIA.items():
            media[kind] = _several(self.take(names[0])) + _several(self.take(names[1]))
            media[kind] = media[kind] or _several(self.take(*names[2:]))
        for name in FILES:
            told = _kind_of(self.row.get(name), named=True)
            if told and not media[told]:
                media[told] = [self.take(name)]
        return media

    def _unnamed(self) -> dict[str, list[Any]]:
        """References in a column of any name: what is stored as media, or names a file that lies
        beside the row's."""
        media: dict[str, list[Any]] = {kind: [] for kind in PLURAL}
        for name, value in self.row.items():
            items = value if isinstance(value, list | tuple) else [value]
            kinds = (
                {_kind_of(item, self.base) for item in items}
                if items and name not in self.taken
                else {None}
            )
            kind = next(iter(kinds))
            if len(kinds) == 1 and kind and not media[kind]:
                media[kind] = _several(self.take(name))
        return media

    def _turns(self, media: list[str]) -> Any:
        """The conversation of a row, or its text."""
        turns: Any = decoded_turns(self.take(*CHATS))
        if (
            turns is None
            and isinstance(texts := self.row.get("texts"), list)
            and all(isinstance(text, Mapping) for text in texts)
        ):
            self.taken.add("texts")
            return _messages((text.get("user"), text.get("assistant")) for text in texts)
        if turns is None:
            turns = self._pair(bool(media)) or self._alone()
        if media and turns is None and (about := _first(self.take(*ABOUT))) is not None:
            return _messages([("", about)])
        if isinstance(turns, str) and media == ["audio"] and MARKERS["audio"] not in turns:
            return _messages([("", turns)])  # a transcript is what the model answers
        return turns

    def _pair(self, media: bool) -> list[Any] | None:
        """Question and answer as turns, after a `history` of them; a question about media may stand
        alone."""
        for asks, answers in PAIRS:
            asked = decoded_turns(self.row.get(asks[0]))
            answer = next((name for name in answers if not is_empty(self.row.get(name))), None)
            if is_empty(asked) or (answer is None and not (media and asks == ("question",))):
                continue
            self.taken |= {answer, *asks} - {None}
            said = decoded_turns(self.row[answer]) if answer else None
            before = asked if isinstance(asked, list) else self._asked(asks)
            # TRL; the answer may repeat the question
            if isinstance(said, list) and said and _is_turn(said[0]):
                repeats = len(said) > 1 if isinstance(asked, str) else said[: len(asked)] == asked
                return [*([] if repeats else before), *said]
            return [*before, *_messages([(None, _first(said))])]
        return None

    def _asked(self, columns: tuple[str, ...]) -> list[Message]:
        """A question of one or more columns, after a `history` of pairs."""
        before = _several(decoded(self.take("history")))
        pairs = [pair for pair in before if isinstance(pair, list | tuple) and len(pair) == 2]
        text = "\n".join(
            str(self.row[name]) for name in columns if not is_empty(self.row.get(name))
        )
        return _messages([*map(tuple, pairs), (text, None)])

    def _alone(self) -> str | None:
        """The only text of a row that holds nothing else."""
        texts = [key for key, value in self.row.items() if isinstance(value, str) and key != "id"]
        if len(texts) != 1 or len(self.row) > 2 or texts[0] in self.taken:
            return None
        return str(self.take(texts[0]))


def decoded_turns(value: Any) -> Any:
    """Turns that are stored as JSON text; any other value as it is."""
    turns = decoded(value)
    return turns if isinstance(turns, list) and turns and all(map(_is_turn, turns)) else value


def _is_turn(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _messages(pairs: Iterable[tuple[Any, Any]]) -> list[Message]:
    said = [
        turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))
    ]
    return [Message(role, str(text)) for role, text in said if text is not None]


def _first(value: Any) -> str | None:
    """A text, or the first one of a list or of an answer's mapping."""
    if isinstance(value, list | tuple):
        return _first(value[0]) if value else None
    if isinstance(value, Mapping):
        return _first(value.get("answer", value.get("text")))
    return (
        value if isinstance(value, str) else str(value) if isinstance(value, int | float) else None
    )


def _several(value: Any) -> list[Any]:
    return [
        each
        for each in (value if isinstance(value, list | tuple) else [value])
        if not is_empty(each)
    ]


def _kind_of(value: Any, base: Path | None = None, named: bool = False) -> str | None:
    """The kind of a medium that a value is by itself. named: its column says that it names a file,
    whether it is there or not."""
    if isinstance(value, Image.Image):
        return "image"
    if isinstance(value, Mapping) and {"bytes", "path"} & set(value):
        return _kind_of(value.get("bytes")) or _kind_of(value.get("path"), base, named=True)
    if isinstance(value, bytes):
        head = value[:4] + b"...." + value[8:12]
        return next(
            (kind for kind, marks in MAGIC.items() for mark in marks if head.startswith(mark)), None
        )
    if not isinstance(value, str) or len(value) >= 1024:
        return None
    told = next((kind for kind, ends in ENDINGS.items() if value.lower().endswith(ends)), None)
    return told if told and (named or (base and find_file(value, (), base))) else None


def _ordered(turns: Any, queues: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """References by kind, in the order of the text: those inside the turns, else the next one of
    the row's own list."""
    left = {kind: list(items) for kind, items in queues.items()}
    ordered: dict[str, list[Any]] = {kind: [] for kind in PLURAL}
    for turn in turns if isinstance(turns, list | tuple) else ():
        content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
        for part in content if isinstance(content, list | tuple) else [content]:
            if isinstance(part, Mapping) and (kind := part_kind(part)) in PLURAL:
                own = _reference(part, kind)
                if own is None and left[kind]:
                    own = left[kind].pop(0)
                ordered[kind] += [] if own is None else [own]
    return {kind: ordered[kind] + left[kind] for kind in PLURAL}


def _reference(part: Mapping[str, Any], kind: str) -> Any:
    for key in (kind, f"{kind}_url", f"input_{kind}", *PART_KEYS):
        if not is_empty(part.get(key)):
            value = part[key]
            return value["url"] if isinstance(value, Mapping) and value.get("url") else value
    return None
