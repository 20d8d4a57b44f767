"""One sample to model inputs: read its media, encode, cut, and name the modality and the answers
among its tokens."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jinja2.exceptions import TemplateError
from torch import Tensor, nn

from auto_mmround.calibration import media
from auto_mmround.calibration.columns import PLURAL
from auto_mmround.calibration.dotted import MISTAKES, blamed
from auto_mmround.calibration.processor import Processor, hearing, render
from auto_mmround.calibration.ready import (
    PER_TOKEN,
    check_finite,
    check_lengths,
    tensors,
    with_decoder_ids,
)
from auto_mmround.calibration.roots import MediaError, Roots
from auto_mmround.calibration.rows import BadSample, Sample
from auto_mmround.calibration.template import Encoded, Template
from auto_mmround.errors import UserError
from auto_mmround.modalities import AUDIO, IMAGE, MODALITIES, PAD, TEXT, VIDEO

log = logging.getLogger("auto_mmround")

# Where configurations (or their sub-configurations) keep the id of each kind's placeholder token.
TOKEN_IDS = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "img_token_id": IMAGE,
    "media_placeholder_token_id": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "audio_token_id": AUDIO,
    "audio_token_index": AUDIO,
}
MIN_TOKENS = 32
BEHIND = "text behind the model's last position"
CAUSES = (TemplateError, ValueError, IndexError)


@dataclass(frozen=True, eq=False)
class ModelInput:
    """One sample as `model(**kwargs)` takes it: batch dimension 1, no padding.

    modality_T: int8, TEXT .. PAD for each token. answer_T: bool, the token belongs to an
    assistant's answer (its closing token too); all True for plain text and for conversations
    without an answer. T = tokens of the text model.
    tower_F: int8, the same for the tower's tokens where a family tells them apart, PAD where there
    is nothing to see or hear. left: names of what the row holds and the input doesn't, once for
    each time.
    """

    id: str
    kwargs: dict[str, Any]
    modality_T: Tensor
    answer_T: Tensor
    tower_F: Tensor | None = None
    left: tuple[str, ...] = ()


# What a model without words reads instead -> its modality.
WORDLESS = {"input_features": AUDIO, "input_values": AUDIO, "pixel_values": IMAGE,
    "flattened_patches": IMAGE}  # fmt: skip


def token_ids(kwargs: Mapping[str, Any]) -> Tensor:
    """int64 (1, T), or (1, T, codebooks): the ids that the text model reads; an encoder-decoder's
    are the decoder's. (1, 0) where it reads no words. Some models want a row for each codebook."""
    ids: Tensor = kwargs.get("decoder_input_ids", kwargs.get("input_ids", torch.empty(1, 0).long()))
    return ids if len(ids) == 1 else ids.t()[None]


def placeholder_ids(config: Any) -> dict[int, int]:
    """Token id -> modality from a configuration and its sub-configurations."""
    ids: dict[int, int] = {}
    for key, value in vars(config).items() if hasattr(config, "__dict__") else ():
        if key in TOKEN_IDS and isinstance(value, int):
            ids[value] = TOKEN_IDS[key]
        elif key.endswith("_config") and hasattr(value, "to_dict"):
            ids = {**placeholder_ids(value), **ids}
    return ids


def modality(kwargs: Mapping[str, Any], config: Any = None) -> Tensor:
    """int8 (T,): the processor's own `mm_token_type_ids` if it gives them, else by the placeholder
    ids in config.

    Negative ids stand for image features (Phi-3-vision); masked tokens are PAD. Without ids (CTC)
    one entry stands for the medium, since its number of tokens is the model's affair.
    """
    ids_T = token_ids(kwargs)[0]
    if ids_T.ndim > 1:  # a row of codebooks for each token
        ids_T = torch.zeros_like(ids_T[:, 0])
    if not len(ids_T):
        media = [WORDLESS[key] for key in kwargs if key in WORDLESS][:1]
        return torch.tensor(media, dtype=torch.int8)
    given = kwargs.get("mm_token_type_ids")
    if given is not None:
        modality_T = given[0].to(torch.int8)
    else:
        modality_T = torch.where(ids_T < 0, IMAGE, TEXT).to(torch.int8)
        for token, kind in placeholder_ids(config).items():
            modality_T = torch.where(ids_T == token, kind, modality_T).to(torch.int8)
    mask = kwargs.get(
        "decoder_attention_mask" if "decoder_input_ids" in kwargs else "attention_mask"
    )
    if mask is not None and mask.shape == token_ids(kwargs).shape[:2]:
        modality_T = torch.where(mask[0].bool(), modality_T, PAD).to(torch.int8)
    return modality_T


def answer_mask(encoded: Encoded, input_ids: Tensor, tokenizer: Any) -> Tensor | None:
    """bool (T,): tokens of the answers, or None when one of them can't be found in the ids.

    The text before expansion is tokenised; each answer's tokens, with a few before them, are looked
    for in the ids in order. So it does not matter what the processor has put in place of a
    placeholder.
    """
    ids = input_ids.tolist()
    options = {"add_special_tokens": False}
    if getattr(tokenizer, "is_fast", False):
        split = tokenizer(encoded.text, return_offsets_mapping=True, **options)
        tokens, offsets = split["input_ids"], split["offset_mapping"]
        spans = [
            [i for i, (a, b) in enumerate(offsets) if a < end and start < b]
            for start, end in encoded.answers
        ]
        places = [(span[0], span[-1] + 1) for span in spans if span]
    else:
        tokens = tokenizer(encoded.text, **options)["input_ids"]
        places = [
            (
                len(tokenizer(encoded.text[:start], **options)["input_ids"]),
                len(tokenizer(encoded.text[:end], **options)["input_ids"]),
            )
            for start, end in encoded.answers
        ]
    mask = torch.zeros(len(ids), dtype=torch.bool)
    after = 0
    for first, last in places:
        for context in (min(4, first), min(1, first), 0):
            needle = tokens[first - context : last]
            start = next(
                (
                    j
                    for j in range(after, len(ids) - len(needle) + 1)
                    if ids[j : j + len(needle)] == needle
                ),
                -1,
            )
            if start >= 0:
                break
        else:
            return None
        after = start + len(needle)
        mask[start + context : after] = True
    return mask


def cut(kwargs: Mapping[str, Any], length: int, limit: int) -> dict[str, Any]:
    """The first `limit` of `length` tokens: every output with one entry a token is cut along
    dimension 1."""
    return {
        key: (
            value[:, :limit]
            if key in PER_TOKEN and value.ndim > 1 and value.shape[1] == length
            else value
        )
        for key, value in kwargs.items()
    }


def bucket(length: int) -> int:
    """The next of eight lengths an octave, the smallest 16: at most an eighth more."""
    step = max(16, 2 ** (length.bit_length() - 4))
    return -(-length // step) * step


def padded(sample: ModelInput, length: int) -> ModelInput:
    """The sample with masked tokens at its end, up to ``length``: for devices that compile every
    shape anew."""
    kwargs, tokens = dict(sample.kwargs), len(sample.modality_T)
    if token_ids(kwargs).shape[1] != tokens:
        return sample
    decoder = "decoder_" if "decoder_input_ids" in kwargs else ""
    kwargs.setdefault(f"{decoder}attention_mask", torch.ones(1, tokens, dtype=torch.long))
    word = int((sample.modality_T == TEXT).int().argmax())  # never a placeholder
    for key, value in kwargs.items():
        if key in PER_TOKEN and value.ndim > 1 and value.shape[1] == tokens:
            one = value[:, word : word + 1]
            one = one if key.endswith("input_ids") else torch.zeros_like(one)
            kwargs[key] = torch.cat([value, one.expand(-1, length - tokens, *value.shape[2:])], 1)
    more = (0, length - tokens)
    modality_T = nn.functional.pad(sample.modality_T, more, value=PAD)
    return replace(
        sample,
        kwargs=kwargs,
        modality_T=modality_T,
        answer_T=nn.functional.pad(sample.answer_T, more, value=False),
    )


@dataclass(frozen=True)
class Encoder:
    """Everything needed to turn one sample into a ModelInput. positions: tokens that the model has
    room for at all. accept: see `Preparers`."""

    tokenizer: Any
    processor: Any
    family: Processor
    template: Template
    config: Any
    roots: Roots
    seqlen: int
    truncation: bool
    prompt: bool
    positions: int | None = None
    accept: Callable[[ModelInput], None] = lambda made: None

    def __call__(self, sample: Sample) -> ModelInput:
        """Raises BadSample with the reason when the sample can't be used."""
        made = self._made(sample)
        check_finite(sample.id, made.kwargs)
        self.accept(made)
        return made

    def _made(self, sample: Sample) -> ModelInput:
        if sample.inputs is not None:
            return self._ready(sample.id, sample.inputs)
        if self.tokenizer is None and sample.input_ids is None:
            raise UserError(f"sample {sample.id} is text, and there is no tokenizer: give one")
        if sample.text is not None or sample.input_ids is not None:
            return self._plain(sample)
        try:
            return self._chat(self._read(sample))
        except BadSample:
            raise
        except MediaError as error:
            raise BadSample("missing or damaged media", f"sample {sample.id}: {error}") from error
        except CAUSES as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise BadSample("refused by the processor", f"sample {sample.id}: {reason}") from error
        except MISTAKES as error:
            message = f"sample {sample.id}: the processor fails on it{blamed(error)}"
            raise BadSample("refused by the processor", message) from error

    def long_enough(self, sample: Sample) -> ModelInput:
        """As calling it; a sample of fewer than MIN_TOKENS tokens is a bad one."""
        made = self(sample)
        if len(made.modality_T) < min(MIN_TOKENS, self.seqlen):
            raise BadSample("too short", f"sample {made.id} has fewer than {MIN_TOKENS} tokens")
        return made

    def _ready(self, label: str, inputs: Mapping[str, Any]) -> ModelInput:
        given = tensors(label, inputs)
        kwargs = with_decoder_ids(given, self.config)
        self._check_codebooks(label, kwargs)
        modality_T = modality(kwargs, self.config)
        labels, answer_T = given.get("labels"), torch.ones(len(modality_T), dtype=torch.bool)
        # Of a decoder they lie beside its ids, negative where no answer is.
        if labels is not None and labels.shape == token_ids(kwargs).shape == (1, len(modality_T)):
            said_T = labels[0] >= 0
            answer_T = said_T if bool(said_T.any()) else answer_T
        return self._bounded(ModelInput(label, kwargs, modality_T, answer_T))

    def _check_codebooks(self, label: str, kwargs: Mapping[str, Any]) -> None:
        """Raises UserError for several rows of ids that are no codebooks of the model."""
        text = self.config and self.config.get_text_config(decoder=True)
        for key in ("input_ids", "decoder_input_ids"):
            rows = len(kwargs.get(key, "1"))
            if rows not in (1, getattr(text, "num_codebooks", 1)):
                raise UserError(
                    f"sample {label}: {rows} rows of {key}, but 1 of the mask or other inputs: give"
                    " one sample at a time"
                )

    def _plain(self, sample: Sample) -> ModelInput:
        ids = sample.input_ids
        if ids is None:
            ids = torch.tensor(
                self.tokenizer(sample.text, verbose=False)["input_ids"], dtype=torch.long
            )
        ids = ids[None, : self.seqlen]
        kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if getattr(self.config, "is_encoder_decoder", False):  # a decoder that writes what it reads
            kwargs = with_decoder_ids({**kwargs, "labels": ids}, self.config)
        modality_T = modality(kwargs, self.config)
        if not ids.numel():
            raise BadSample("too short", f"sample {sample.id} is empty")
        if bool((modality_T != TEXT).any()):
            raise BadSample(
                "plain text with a media placeholder",
                f"sample {sample.id}: a media placeholder in its text",
            )
        if ids.shape[1] >= MIN_TOKENS and int((ids == ids[0, -1]).sum()) > ids.shape[1] // 2:
            raise BadSample("repetitive", f"sample {sample.id} repeats one token")
        return ModelInput(
            sample.id, kwargs, modality_T, torch.ones_like(modality_T, dtype=torch.bool)
        )

    def _read(self, sample: Sample) -> Sample:
        rate = getattr(hearing(self.processor), "sampling_rate", 16000)
        read: dict[str, Any] = {
            field: tuple(
                media.load(
                    item, kind, self.roots, base=sample.base, remote=sample.remote, rate=rate
                )
                for item in getattr(sample, field)
            )
            for kind, field in PLURAL.items()
        }
        return replace(sample, **read)

    def _chat(self, sample: Sample) -> ModelInput:
        kwargs = self.family.encode(sample, self.template, prompt=self.prompt)
        check_lengths(sample.id, kwargs)
        ids = token_ids(kwargs)
        own = getattr(self.family, "modality", None)
        modality_T = own(kwargs) if own else modality(kwargs, self.config)
        known = {
            *placeholder_ids(self.config).values(),
            *((IMAGE, VIDEO) if "mm_token_type_ids" in kwargs else ()),
        }
        for kind, items in ((IMAGE, sample.images), (VIDEO, sample.videos), (AUDIO, sample.audios)):
            places = bool((modality_T == kind).any())
            if places != bool(items) and (places or kind in known):
                seen = "a place" if places else "no place"
                message = (
                    f"sample {sample.id}: {len(items)} {MODALITIES[kind]} given, but {seen} for it"
                    " in the text"
                )
                raise BadSample("markers", message)
        write = getattr(self.family, "render", None)
        if write is None:
            encoded = render(
                sample.messages, self.template, self.tokenizer, self.processor, prompt=self.prompt,
                options=sample.options,
            )  # fmt: skip
        else:
            encoded = write(sample, self.template, prompt=self.prompt)
        answer_T = answer_mask(encoded, ids[0], self.tokenizer)
        if answer_T is None:
            log.warning("sample %s: its answers could not be found among its tokens", sample.id)
            answer_T = torch.zeros(ids.shape[1], dtype=torch.bool)
        elif not encoded.answers:
            answer_T = ~answer_T
        tower = getattr(self.family, "tower_modality", None)
        made = ModelInput(
            sample.id, kwargs, modality_T, answer_T, tower(kwargs) if tower else None, encoded.left
        )
        return self._bounded(made, self.seqlen if self.truncation else None)

    def _bounded(self, made: ModelInput, seqlen: int | None = None) -> ModelInput:
        """The input cut to seqlen, if any, and to what the model has positions for."""
        length = len(made.modality_T)
        limit = min(each for each in (length, seqlen, self.positions) if each is not None)
        if limit == length:
            return made
        # Text behind the last placeholder may go; the features of an image may not.
        media = torch.nonzero((made.modality_T != TEXT) & (made.modality_T != PAD))
        if len(media) and int(media.max()) >= limit:
            why = "seqlen" if limit == seqlen else "the model's positions"
            problem = (
                f"sample {made.id}: its media need {int(media.max()) + 1} tokens, more than {why}"
                f" ({limit})"
            )
            raise BadSample(f"media longer than {why}", problem)
        left = (*made.left, BEHIND) if limit == self.positions else made.left
        kwargs = cut(made.kwargs, length, limit)
        return replace(
            made,
            kwargs=kwargs,
            modality_T=made.modality_T[:limit],
            answer_T=made.answer_T[:limit],
            left=left,
        )
