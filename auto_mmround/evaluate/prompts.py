"""Prompts from local sets, and greedy answers: questions on images, speech, openings of texts."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch

from auto_mmround.calibration import media, roots
from auto_mmround.calibration.datasets import Rows, load_rows
from auto_mmround.calibration.ready import PER_TOKEN
from auto_mmround.calibration.rows import Sample
from auto_mmround.calibration.samples import Reading, build
from auto_mmround.calibration.turns import MARKER, Message
from auto_mmround.errors import UserError
from auto_mmround.evaluate.generation import generated
from auto_mmround.evaluate.held_out import MANY, parts
from auto_mmround.evaluate.metrics import logits_of, moved
from auto_mmround.model.loading import Loaded
from auto_mmround.model.positions import position_limit, room
from auto_mmround.run.job import preparers
from auto_mmround.run.met import check_inputs

log = logging.getLogger("auto_mmround")

TRANSCRIPTS = ("text", "transcription", "transcript", "sentence")
ASK_FOR_WORDS = "Transcribe the speech."
OPENING = 48  # tokens of a plain text that a model continues
ANSWER = 64  # tokens
SEED = 42
WINDOW = 30  # seconds that Whisper hears at once


@dataclass(frozen=True, eq=False)
class Prompt:
    """What a model gets and what people read.

    kwargs: batch 1; options: for `generate`. The question, the images, and the expected answer
    (None for an opening).
    """

    id: str
    benchmark: str
    split: str
    question: str
    expected: str | None
    kwargs: Mapping[str, Any] = field(repr=False)
    images: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Data:
    """The sets to ask about. limit: most rows of each. language: of speech, a code such as `en`."""

    dataset: str = "demo"
    template: str | None = None
    extra_data_dir: str | None = None
    limit: int | None = None
    language: str | None = None

    @property
    def title(self) -> str:
        """A short form of the whole argument: a file by its bare name."""
        return Path(self.dataset).stem if Path(self.dataset).is_file() else self.dataset

    def sets(self) -> Iterator[tuple[Rows, str, str]]:
        """(rows, benchmark, split) of every set. `librispeech/test-clean.jsonl` is a split of
        librispeech."""
        for part in parts(self.dataset):
            for rows in load_rows(part):
                path = Path(rows.source.name)
                if path.is_file():
                    yield (
                        rows,
                        "demo" if self.dataset == "demo" else path.resolve().parent.name,
                        path.stem,
                    )
                else:
                    yield rows, path.name, rows.source.split or ""

    def chosen(self, rows: Rows) -> list[int]:
        """The rows of a set to use: the same as for teacher-forced figures, see `samples.pick`."""
        count = min(rows.source.num or MANY, self.limit or MANY)
        if len(rows) <= count:
            return list(range(len(rows)))
        return sorted(np.random.default_rng(SEED).permutation(len(rows))[:count].tolist())

    def roots(self) -> roots.Roots:
        """Folders in which media may lie."""
        return roots.parse_roots(self.extra_data_dir)


def questions(loaded: Loaded, data: Data) -> list[Prompt]:
    """Conversations that end in an answer, cut before it. Raises UserError if there are none."""
    prompts = []
    # Whisper only writes down speech, see `clips`
    asks = loaded.model.main_input_name != "input_features"
    for rows, benchmark, split in data.sets() if asks else ():
        samples = [rows.sample(i) for i in data.chosen(rows)]
        samples = [s for s in samples if s.messages and s.messages[-1].role == "assistant"]
        encoded = list(zip(samples, _encoded(loaded, data, samples), strict=True))
        fits = [
            pair
            for pair in encoded
            if pair[1]["input_ids"].shape[1] < (position_limit(loaded.model) or MANY)
        ]
        if len(fits) < len(encoded):
            log.warning(
                "%d questions are longer than the model's positions and are left out",
                len(encoded) - len(fits),
            )
        for sample, kwargs in fits:
            asked = [turn.content for turn in sample.messages if turn.role == "user"][-1]
            prompts.append(
                Prompt(
                    id=sample.id,
                    benchmark=benchmark,
                    split=split,
                    question=MARKER.sub("", asked).strip(),
                    expected=sample.messages[-1].content.strip(),
                    kwargs=kwargs,
                    images=tuple(
                        media.load(item, "image", data.roots(), base=sample.base)
                        for item in sample.images
                    ),
                    options={"max_new_tokens": ANSWER},
                )
            )
    return prompts or _none(data, "a conversation that ends in an answer")


def clips(loaded: Loaded, data: Data) -> list[Prompt]:
    """Rows with `audio` and its spoken text. Raises UserError without any, or for damaged sound."""
    make = _whisper if loaded.model.main_input_name == "input_features" else _audio_chat
    rate = getattr(getattr(loaded.processor, "feature_extractor", None), "sampling_rate", 16000)
    prompts = []
    for rows, benchmark, split in data.sets():
        for i in data.chosen(rows):
            row = rows.rows[i]
            text = (
                _transcript(row)
                if isinstance(row, Mapping) and row.get("audio") is not None
                else None
            )
            if text is None:
                continue
            try:
                sound_T = media.load(
                    row["audio"], "audio", data.roots(), base=rows.folder(i), rate=rate
                )
            except roots.MediaError as error:
                raise UserError(f"{rows.name} row {i}: {error}") from error
            kwargs, options = make(loaded, data, sound_T, rate)
            seconds = f"{len(sound_T) / rate:.1f} s of speech"
            name = str(row.get("id") or i)
            prompts.append(Prompt(name, benchmark, split, seconds, text, kwargs, options=options))
    return prompts or _none(data, f"audio and one of {', '.join(TRANSCRIPTS)}")


def openings(loaded: Loaded, data: Data) -> list[Prompt]:
    """The first tokens of plain texts, which a model continues."""
    prompts = []
    for rows, benchmark, split in data.sets():
        for i in data.chosen(rows):
            sample = rows.sample(i)
            if sample.text is not None:
                ids = loaded.tokenizer(sample.text, return_tensors="pt", verbose=False)[
                    "input_ids"
                ][:, :OPENING]
                text = loaded.tokenizer.decode(ids[0], skip_special_tokens=True)
                kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                options = {"max_new_tokens": ANSWER}
                prompts.append(
                    Prompt(sample.id, benchmark, split, text, None, kwargs, options=options)
                )
    return prompts or _none(data, "plain text")


def asked(
    loaded: Loaded,
    text: str,
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    audios: Sequence[Any] = (),
    max_new_tokens: int = ANSWER,
) -> Prompt:
    """One question from outside. Whisper hears the one sound.

    Media stand before the text, unless it has a marker for each. Raises UserError if the model
    can't take them.
    """
    options = {"max_new_tokens": max_new_tokens}
    if loaded.model.main_input_name == "input_features":
        if len(audios) != 1 or images or videos:
            raise UserError(
                f"{loaded.model.config.model_type} hears one sound a question, and nothing else"
            )
        rate = loaded.processor.feature_extractor.sampling_rate
        sound_T = media.load(audios[0], "audio", _beside(audios[0]), rate=rate)
        kwargs, more = _whisper(loaded, Data(), sound_T, rate)
        return Prompt("question", "", "", text, None, kwargs, options=more)
    given = {
        kind: tuple(
            media.load(i, kind, _beside(i)) if isinstance(i, str | Path) else i for i in items
        )
        for kind, items in (("image", images), ("video", videos), ("audio", audios))
    }
    wanted = [f"<{kind}>" for kind, items in given.items() for _ in items]
    if sorted(MARKER.findall(text)) != sorted(wanted):
        text = "\n".join([*wanted, MARKER.sub("", text).strip()])
    sample = Sample("question", messages=(Message("user", text),), images=given["image"],
        videos=given["video"],
                    audios=given["audio"])  # fmt: skip
    kwargs = _encoded(loaded, Data(), [sample])[0]
    shown = MARKER.sub("", text).strip()
    return Prompt("question", "", "", shown, None, kwargs, given["image"], options)


def _beside(file: Any) -> roots.Roots:
    """The folder of a file is allowed if a user or an outside harness names the file."""
    return roots.parse_roots(
        [Path(file).resolve().parent] if isinstance(file, str | Path) else None
    )


def log_likelihood(loaded: Loaded, prompt: Prompt, continuation: str) -> tuple[float, bool]:
    """Summed log probability of a text after the prompt, and whether greedy decoding gives it."""
    ids_T = torch.tensor(loaded.tokenizer(continuation, add_special_tokens=False)["input_ids"])
    filled = {"input_ids": ids_T[None], "attention_mask": torch.ones_like(ids_T)[None]}
    length = prompt.kwargs["input_ids"].shape[1]
    kwargs = {
        key: (
            torch.cat([value, filled.get(key, torch.zeros_like(ids_T)[None]).to(value.dtype)], 1)
            if key in PER_TOKEN
            and isinstance(value, torch.Tensor)
            and value.shape[:2] == (1, length)
            else value
        )
        for key, value in prompt.kwargs.items()
    }
    logs_TV = logits_of(loaded.model, kwargs).log_softmax(-1)[length - 1 : -1].cpu()
    chosen_T = logs_TV.gather(1, ids_T[:, None])[:, 0]
    return chosen_T.sum().item(), bool((logs_TV.argmax(-1) == ids_T).all())


def answer(loaded: Loaded, prompt: Prompt) -> str:
    """The greedy answer, without special tokens."""
    ids_T = generate(loaded, prompt)
    return str(loaded.tokenizer.decode(ids_T, skip_special_tokens=True)).strip()


def generate(loaded: Loaded, prompt: Prompt, streamer: Any = None) -> torch.Tensor:
    """Token ids (T,) of the greedy answer. streamer: of Transformers, gets them one by one."""
    kwargs, options = moved(loaded.model, prompt.kwargs), dict(prompt.options)
    if not loaded.model.config.is_encoder_decoder:
        options["max_new_tokens"] = room(
            loaded.model, kwargs["input_ids"].shape[1], options["max_new_tokens"]
        )
    if streamer is not None:
        options["streamer"] = streamer
    made = generated(loaded, kwargs, **options)
    given = 0 if loaded.model.config.is_encoder_decoder else kwargs["input_ids"].shape[1]
    return torch.as_tensor(made[0][given:])


def _encoded(loaded: Loaded, data: Data, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    if not samples:
        return []
    reading = Reading(
        len(samples), MANY, False, extra_data_dir=data.extra_data_dir, prompt=True, quiet=True
    )
    made, _ = build(
        list(samples), replace(preparers(loaded, data.template), positions=None), reading
    )
    check_inputs(loaded.model, made)
    return [each.kwargs for each in made]


def _whisper(
    loaded: Loaded, data: Data, sound_T: Any, rate: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Log-mel features of a sound.

    A clip longer than a window is heard in several windows. This needs time stamps and a mask.
    """
    long = len(sound_T) > WINDOW * rate
    more: dict[str, Any] = (
        {"truncation": False, "padding": "longest", "return_attention_mask": True} if long else {}
    )
    features = loaded.processor.feature_extractor(
        sound_T, sampling_rate=rate, return_tensors="pt", **more
    )
    model: Any = loaded.model
    options: dict[str, Any] = {"return_timestamps": True} if long else {}
    if getattr(model.generation_config, "is_multilingual", False):
        options |= {"language": data.language or "en", "task": "transcribe"}
    elif data.language not in (None, "en", "english"):
        log.warning(
            "generation_config.json names no languages: the model hears the language by itself"
        )
    # Room for the tokens that Whisper puts first: start, language, task, no time stamps.
    return dict(features), options | {"max_new_tokens": model.config.max_target_positions - 4}


def _audio_chat(
    loaded: Loaded, data: Data, sound_T: Any, rate: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    turn = Message("user", f"<audio>\n{ASK_FOR_WORDS}")
    sample = Sample("clip", messages=(turn,), audios=(sound_T,))
    return _encoded(loaded, data, [sample])[0], {"max_new_tokens": 4 * ANSWER}


def _transcript(row: Mapping[str, Any]) -> str | None:
    return next((row[key] for key in TRANSCRIPTS if isinstance(row.get(key), str)), None)


def _none(data: Data, what: str) -> NoReturn:
    raise UserError(f"dataset {data.dataset!r} has no row with {what}")
