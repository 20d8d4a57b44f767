"""Rows of any accepted form to samples: text, token ids, model inputs, LLaVA conversations, chat messages."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from auto_mmround.calibration.template import MARKERS, Message, parse_messages, part_kind
from auto_mmround.errors import UserError

# A row with nothing but these is plain text, already tokenised.
TEXT_KEYS = {"id", "input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "labels"}
# A row with one of each is ready inputs of an encoder-decoder.
DECODER_KEYS = {"decoder_input_ids", "labels"}
ENCODER_KEYS = {"input_features", "input_values", "pixel_values"}
# Columns with what is said in a sound or seen in an image, in sets that don't call it `text`.
ABOUT = ("transcription", "transcript", "sentence", "normalized_text", "caption")
SUFFIXES = {
    "audio": (".wav", ".flac", ".ogg", ".mp3", ".opus"),
    "image": (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jp2", ".tga", ".ppm"),
    "video": (".mp4", ".mkv", ".webm", ".mov", ".avi"),
}
PLURAL = {"image": "images", "video": "videos", "audio": "audios"}


class BadSample(UserError):
    """One sample can't be used (its form, its media, its markers); `reason` is the word it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Sample:
    """One row, still without its media read. Exactly one of text, messages, input_ids, inputs is set.

    images, videos, audios: references or decoded media in the order of the markers in the messages.
    input_ids: int64 (T,). inputs: model keyword arguments, batch dimension 1. base: folder of the dataset's file.
    """

    id: str
    text: str | None = None
    messages: tuple[Message, ...] = ()
    images: tuple[Any, ...] = ()
    videos: tuple[Any, ...] = ()
    audios: tuple[Any, ...] = ()
    input_ids: Tensor | None = None
    inputs: Mapping[str, Any] | None = None
    base: Path | None = None
    remote: str = ""

    @property
    def media(self) -> tuple[Any, ...]:
        """All references, as the row gives them."""
        return (*self.images, *self.videos, *self.audios)

    @property
    def has_media(self) -> bool:
        return bool(self.media) or self.inputs is not None


def _list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _part_reference(part: Mapping[str, Any], kind: str) -> Any:
    for key in (kind, f"{kind}_url", f"input_{kind}", "path", "url", "data", "base64"):
        if part.get(key) is not None:
            value = part[key]
            if isinstance(value, Mapping) and value.get("url"):
                return value["url"]
            return value
    return None


def _media(row: Mapping[str, Any], turns: Iterable[Any]) -> dict[str, list[Any]]:
    """References by kind, in the order of the text: those inside the turns, else the next one of the row's own list."""
    queues = {kind: _list(row.get(kind)) + _list(row.get(plural)) for kind, plural in PLURAL.items()}
    found: dict[str, list[Any]] = {kind: [] for kind in PLURAL}
    for turn in turns:
        content = None if not isinstance(turn, Mapping) else turn.get("content", turn.get("value"))
        for part in content if isinstance(content, list | tuple) else ():
            if isinstance(part, Mapping) and (kind := part_kind(part)) != "text":
                own = _part_reference(part, kind)
                if own is None and queues[kind]:
                    own = queues[kind].pop(0)
                found[kind] += [] if own is None else [own]
    return {kind: found[kind] + queues[kind] for kind in PLURAL}


def _renamed(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of a folder with metadata: `file_name` becomes the kind of media that its ending tells."""
    name = row.get("file_name")
    for kind, suffixes in SUFFIXES.items():
        if isinstance(name, str) and name.lower().endswith(suffixes) and row.get(kind) is None:
            return {kind: name, **{key: value for key, value in row.items() if key != "file_name"}}
    return row


def _turns(row: Mapping[str, Any]) -> Any:
    """The conversation of a row, or its text; None where there is none. Only rows with media are read by what other
    sets call these things: question and answer, pairs of user and assistant, a caption or transcript."""
    turns = next((row[key] for key in ("conversations", "messages", "text") if row.get(key) is not None), None)
    media = [kind for kind, plural in PLURAL.items() if row.get(kind) is not None or row.get(plural)]
    if not media:
        return turns
    pairs: list[tuple[Any, Any]] = []
    if turns is None and isinstance(texts := row.get("texts"), list) and all(isinstance(t, Mapping) for t in texts):
        pairs = [(text.get("user"), text.get("assistant")) for text in texts]
    elif turns is None and isinstance(row.get("question"), str):
        pairs = [(row["question"], _first(row.get("answer") or row.get("answers")))]
    else:
        about = next((text for key in ABOUT if (text := _first(row.get(key))) is not None), None)
        if turns is None and about is not None:
            pairs = [("", about)]
        elif isinstance(turns, str) and media == ["audio"] and MARKERS["audio"] not in turns:
            pairs = [("", turns)]  # a transcript is what the model answers
    said = [turn for question, answer in pairs for turn in (("user", question), ("assistant", answer))]
    return [Message(role, text) for role, text in said if text is not None] or turns


def _first(value: Any) -> str | None:
    """A text, or the first one of a list."""
    found = value[0] if isinstance(value, list) and value else value
    return found if isinstance(found, str) else None


def parse_row(
    row: Any,
    label: str,
    *,
    base: Path | None = None,
    remote: str = "",
    as_chat: bool = False,
    system_prompt: str | None = None,
) -> Sample:
    """One row to a Sample, its form read from its content. as_chat: plain text becomes a user turn.

    Raises BadSample (or a UserError of the messages) when no form fits.
    """
    if isinstance(row, str):
        row = {"text": row}
    if isinstance(row, Tensor) or (isinstance(row, list | tuple) and row and all(isinstance(i, int) for i in row)):
        row = {"input_ids": row}
    if isinstance(row, list | tuple):
        row = {"messages": row}
    if not isinstance(row, Mapping):
        raise BadSample("form", f"sample {label}: a row must be text or a mapping, not {type(row).__name__}")
    if row.get("input_ids") is not None:
        return _tokens(row, label)
    if DECODER_KEYS & set(row) and ENCODER_KEYS & set(row):
        return Sample(label, inputs={**row})
    row = _renamed(row)
    turns = _turns(row)
    if turns is None:
        texts = [value for key, value in row.items() if isinstance(value, str) and key != "id"]
        if len(texts) != 1 or len(row) > 2:
            keys = ", ".join(map(str, row)) or "none"
            raise BadSample("form", f"sample {label}: expected text, messages, conversations or input_ids, not {keys}")
        turns = texts[0]
    media = _media(row, turns if isinstance(turns, Iterable) and not isinstance(turns, str) else ())
    if isinstance(turns, str) and not any(media.values()) and not as_chat:
        return Sample(label, text=turns)
    messages = list(parse_messages(turns))
    if system_prompt and not any(turn.role == "system" for turn in messages):
        messages.insert(0, Message("system", system_prompt))
    messages = _placed(messages, media, label)
    kinds: dict[str, Any] = {PLURAL[kind]: tuple(items) for kind, items in media.items()}
    return Sample(label, messages=tuple(messages), base=base, remote=remote, **kinds)


def _placed(messages: list[Message], media: Mapping[str, list[Any]], label: str) -> list[Message]:
    """Media that no marker names go to the front of the first user turn. Raises BadSample when the counts disagree."""
    missing = ""
    for kind, marker in MARKERS.items():
        marks = sum(turn.content.count(marker) for turn in messages)
        if marks == 0:
            missing += marker * len(media[kind])
        elif marks != len(media[kind]):
            raise BadSample("markers", f"sample {label}: {marks} {marker} in the text, but {len(media[kind])} given")
    first = next((i for i, turn in enumerate(messages) if turn.role == "user"), None)
    if missing and first is None:
        raise BadSample("markers", f"sample {label}: media are given, but no user turn to put them in")
    if missing and first is not None:
        messages[first] = Message("user", f"{missing}\n{messages[first].content}".rstrip("\n"))
    return messages


def _tokens(row: Mapping[str, Any], label: str) -> Sample:
    """A row of token ids (padding left out) or, with more in it, ready inputs of the model."""
    ids = _integers(row["input_ids"], "input_ids", label)
    if ids.ndim not in (1, 2) or (ids.ndim == 2 and len(ids) != 1) or not ids.numel():
        raise BadSample("form", f"sample {label}: input_ids have the shape {tuple(ids.shape)}, not (T,) or (1, T)")
    flat = ids.reshape(-1)
    if set(row) <= TEXT_KEYS:
        mask = row.get("attention_mask")
        if mask is not None:
            mask_T = _integers(mask, "attention_mask", label).reshape(-1)
            if len(mask_T) != len(flat):
                raise BadSample("form", f"sample {label}: {len(flat)} input_ids, {len(mask_T)} in the attention_mask")
            flat = flat[mask_T.bool()]
        return Sample(label, input_ids=flat)
    return Sample(label, inputs={**row, "input_ids": flat[None]})


def _integers(values: Any, key: str, label: str) -> Tensor:
    try:
        return torch.as_tensor(np.asarray(values), dtype=torch.long)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise BadSample("form", f"sample {label}: {key} holds no list of integers") from error


def split_batch(item: Any) -> Iterator[Any]:
    """One item of a list or DataLoader to single rows: batches of tensors, strings or columns are taken apart."""
    if (isinstance(item, Tensor) and item.ndim == 2) or (
        isinstance(item, list | tuple) and item and all(isinstance(part, str) for part in item)
    ):
        yield from item
    elif isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
        yield from split_batch(dict(zip(("input_ids", "attention_mask"), item, strict=False)))
    elif isinstance(item, list | tuple) and item and isinstance(item[0], Mapping) and not _is_turn(item[0]):
        yield from item
    elif isinstance(item, Mapping) and isinstance(ids := item.get("input_ids"), Tensor) and ids.ndim == 2:
        if len(ids) > 1 and not set(item) <= TEXT_KEYS:
            raise UserError("a DataLoader that gives model inputs with media must give one sample at a time")
        if len(ids) == 1:
            yield item
        else:
            yield from ({key: value[i] for key, value in item.items()} for i in range(len(ids)))
    elif isinstance(item, Mapping) and _is_columns(item):
        yield from (dict(zip(item, values)) for values in zip(*item.values(), strict=True))
    else:
        yield item


def _is_turn(item: Mapping[str, Any]) -> bool:
    return "role" in item or "from" in item


def _is_columns(item: Mapping[str, Any]) -> bool:
    texts = item.get("text")
    return isinstance(texts, list) and bool(texts) and all(isinstance(text, str) for text in texts)
