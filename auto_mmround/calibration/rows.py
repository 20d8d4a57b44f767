"""Rows of any accepted form to samples: text, token ids, model inputs, LLaVA conversations, chat
messages."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from auto_mmround.calibration.columns import CHATS, PLURAL, Columns
from auto_mmround.calibration.template import SYSTEM
from auto_mmround.calibration.turns import MARKERS, Message, parse_messages
from auto_mmround.errors import UserError

# A row with nothing but these is plain text, already tokenised.
TEXT_KEYS = {"id", "input_ids", "attention_mask", "token_type_ids", "special_tokens_mask", "labels"}
SECOND_KEYS = {"decoder_input_ids", "decoder_attention_mask"}  # text of a second sequence
# A row with one of each is ready inputs of an encoder-decoder.
DECODER_KEYS = {"decoder_input_ids", "labels"}
# What an encoder reads -> dimensions of a batch of it, at least.
ENCODER_KEYS = {"input_features": 3, "input_values": 2, "pixel_values": 4, "flattened_patches": 3}


class BadSample(UserError):
    """One sample can't be used (its form, its media, its markers); `reason` is the word it is
    counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, eq=False)
class Sample:
    """One row, still without its media read. Exactly one of text, messages, input_ids, inputs is
    set.

    images, videos, audios: references or decoded media in the order of the markers in the messages.
    input_ids: int64 (T,). inputs: model keyword arguments, batch dimension 1. base: folder of the
      dataset's file.
    options: what a chat template reads beside the turns, such as tools. unread: columns of the
      row that nothing read.
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
    options: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    @property
    def media(self) -> tuple[Any, ...]:
        """All references, as the row gives them."""
        return (*self.images, *self.videos, *self.audios)

    @property
    def has_media(self) -> bool:
        return bool(self.media) or self.inputs is not None


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
    row = _named(row, label)
    if row.get("input_ids") is not None:
        return _tokens(row, label)
    if DECODER_KEYS & set(row) and ENCODER_KEYS.keys() & set(row):
        return Sample(label, inputs={**row})
    columns = Columns(row, base)
    turns = columns.turns
    if turns is None and any(isinstance(row.get(key), Tensor) for key in ENCODER_KEYS):
        return Sample(label, inputs={**row})  # of a model that reads no words
    if turns is None and any(isinstance(row.get(key), list | tuple) for key in CHATS):
        raise BadSample("too short", f"sample {label}: its conversation has no turns")
    if turns is None:
        keys = ", ".join(map(str, row)) or "none"
        raise BadSample(
            "form",
            f"sample {label}: expected text, messages, conversations or input_ids, not {keys}",
        )
    media = columns.media
    if isinstance(turns, str) and not any(media.values()) and not as_chat:
        return Sample(label, text=turns, unread=columns.unread)
    messages = list(parse_messages(turns))
    system = columns.take("system", "system_prompt") or system_prompt
    if isinstance(system, str) and not any(turn.role in SYSTEM for turn in messages):
        messages.insert(0, Message("system", system))
    options = columns.options()
    messages = _placed(messages, media, label)
    kinds: dict[str, Any] = {PLURAL[kind]: tuple(items) for kind, items in media.items()}
    return Sample(
        label,
        messages=tuple(messages),
        base=base,
        remote=remote,
        options=options,
        unread=columns.unread,
        **kinds,
    )


def _named(row: Any, label: str) -> Mapping[str, Any]:
    """The row as columns: bare text, token ids and messages under their own name."""
    if isinstance(row, Mapping):
        return row
    if isinstance(row, str):
        return {"text": row}
    ids = isinstance(row, list | tuple) and row and all(isinstance(i, int) for i in row)
    if ids or isinstance(row, Tensor):
        return {"input_ids": row}
    if isinstance(row, list | tuple):
        return {"messages": row}
    raise BadSample(
        "form", f"sample {label}: a row must be text or a mapping, not {type(row).__name__}"
    )


def _placed(messages: list[Message], media: Mapping[str, list[Any]], label: str) -> list[Message]:
    """Media that no marker names go to the front of the first user turn. Raises BadSample when the
    counts disagree."""
    missing = ""
    for kind, marker in MARKERS.items():
        marks = sum(turn.content.count(marker) for turn in messages)
        if marks == 0:
            missing += marker * len(media[kind])
        elif marks != len(media[kind]):
            raise BadSample(
                "markers",
                f"sample {label}: {marks} {marker} in the text, but {len(media[kind])} given",
            )
    first = next((i for i, turn in enumerate(messages) if turn.role == "user"), None)
    if missing and first is None:
        raise BadSample(
            "markers", f"sample {label}: media are given, but no user turn to put them in"
        )
    if missing and first is not None:
        turn = messages[first]
        messages[first] = Message("user", f"{missing}\n{turn.content}".rstrip("\n"), turn.extra)
    return messages


def _tokens(row: Mapping[str, Any], label: str) -> Sample:
    """A row of token ids (padding left out) or, with more in it, ready inputs of the model."""
    ids = _integers(row["input_ids"], "input_ids", label)
    if ids.ndim == 3 and len(ids) == 1 and ids.numel():  # a row of codebooks for each token
        return Sample(label, inputs={**row, "input_ids": ids})
    if ids.ndim == 2 and _has_codebooks(row):
        return Sample(label, inputs={**row, "input_ids": ids})
    if ids.ndim not in (1, 2) or (ids.ndim == 2 and len(ids) != 1) or not ids.numel():
        raise BadSample(
            "form",
            f"sample {label}: input_ids have the shape {tuple(ids.shape)}, not (T,) or (1, T)",
        )
    flat = ids.reshape(-1)
    if set(row) <= TEXT_KEYS:
        mask = row.get("attention_mask")
        if mask is not None:
            mask_T = _integers(mask, "attention_mask", label).reshape(-1)
            if len(mask_T) != len(flat):
                raise BadSample(
                    "form",
                    f"sample {label}: {len(flat)} input_ids, {len(mask_T)} in the attention_mask",
                )
            flat = flat[mask_T.bool()]
        return Sample(label, input_ids=flat)
    return Sample(label, inputs={**row, "input_ids": flat[None]})


def _integers(values: Any, key: str, label: str) -> Tensor:
    try:
        return torch.as_tensor(np.asarray(values), dtype=torch.long)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise BadSample("form", f"sample {label}: {key} holds no list of integers") from error


def split_batch(item: Any) -> Iterator[Any]:
    """One item of a list or DataLoader to single rows: batches of tensors, strings or columns are
    taken apart."""
    if (isinstance(item, Tensor) and item.ndim == 2) or (
        isinstance(item, list | tuple) and item and all(isinstance(part, str) for part in item)
    ):
        yield from item
    elif isinstance(item, list | tuple) and item and isinstance(item[0], Tensor):
        yield from split_batch(dict(zip(("input_ids", "attention_mask"), item, strict=False)))
    elif (
        isinstance(item, list | tuple)
        and item
        and isinstance(item[0], Mapping)
        and not _is_turn(item[0])
    ):
        yield from item
    elif (
        isinstance(item, Mapping)
        and isinstance(ids := item.get("input_ids"), Tensor)
        and ids.ndim == 2
    ):
        if len(ids) == 1 or _has_codebooks(item):
            yield item
            return
        if not set(item) <= TEXT_KEYS | SECOND_KEYS:
            raise UserError(
                "a DataLoader that gives model inputs with media must give one sample at a time"
            )
        yield from _taken_apart(item, "input_ids")
    elif isinstance(item, Mapping) and (key := _batched(item)):
        # A model without words beside them, as Whisper: each row has one of all.
        for row in _taken_apart(item, key):
            yield {k: v[None] if hasattr(v, "ndim") else [v] for k, v in row.items()}
    elif isinstance(item, Mapping) and _is_columns(item):
        yield from (dict(zip(item, values)) for values in zip(*item.values(), strict=True))
    else:
        yield item


def _has_codebooks(row: Mapping[str, Any]) -> bool:
    """Whether the ids of one sample may have a row for each codebook (Musicgen): several rows, and
    a mask of one."""
    ids, mask = row["input_ids"], row.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or len(mask) != 1:
        return False
    return len(ids) > 1 and len(ids[0]) == mask.shape[1]


def _batched(item: Mapping[str, Any]) -> str | None:
    """The key of what an encoder reads, where there is more than one row of it, and no ids."""
    for key, dimensions in ENCODER_KEYS.items():
        value = item.get(key)
        if isinstance(value, Tensor | np.ndarray) and value.ndim >= dimensions and len(value) > 1:
            return key if item.get("input_ids") is None else None
    return None


def _taken_apart(batch: Mapping[str, Any], counted: str) -> Iterator[dict[str, Any]]:
    """The rows of a batch, as many as ``counted`` has. Raises UserError for a value of other
    length."""
    values = {key: value for key, value in batch.items() if value is not None}
    count = len(values[counted])
    for key, value in values.items():
        plain = isinstance(value, list | tuple) or getattr(value, "ndim", 0) > 0
        if not plain or len(value) != count:
            length = len(value) if plain else "one"
            raise UserError(
                f"a DataLoader gives {count} rows of {counted}, but {length} of {key}: give one"
                " sample at a time"
            )
    yield from ({key: value[i] for key, value in values.items()} for i in range(count))


def _is_turn(item: Mapping[str, Any]) -> bool:
    return "role" in item or "from" in item


def _is_columns(item: Mapping[str, Any]) -> bool:
    texts = item.get("text")
    return isinstance(texts, list) and bool(texts) and all(isinstance(text, str) for text in texts)
