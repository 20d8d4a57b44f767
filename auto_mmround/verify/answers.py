"""A question to a checkpoint, answered by our own loader or by an engine that is installed."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import TextStreamer

from auto_mmround.calibration.roots import MediaError
from auto_mmround.checkpoint.loader import load_any
from auto_mmround.checkpoint.subject import read_subject
from auto_mmround.errors import UserError
from auto_mmround.evaluate.prompts import ASK_FOR_WORDS, Prompt, asked, generate
from auto_mmround.model import devices
from auto_mmround.model.loading import DEMO, Loaded
from auto_mmround.readers import ENGINES
from auto_mmround.verify import engines
from auto_mmround.verify.engines import EngineResult, ask, ask_llamacpp_aloud
from auto_mmround.verify.verify import require_reads

LOADER = "loader"
SPEAKING = [name for name, row in ENGINES.items() if row.speaks]


@dataclass(frozen=True)
class Question:
    """text, and files of media, which stand before it. tokens: at most so many in the answer."""

    text: str
    images: Sequence[str] = ()
    audios: Sequence[str] = ()
    videos: Sequence[str] = ()
    tokens: int = 128

    @property
    def kinds(self) -> list[str]:
        """What there is besides the text."""
        media = {"image": self.images, "audio": self.audios, "video": self.videos}
        return [kind for kind, files in media.items() if files]


@dataclass(frozen=True)
class Answer:
    """What one folder answered. seconds: from the question to the last token, loading apart; None
    if the engine does not tell."""

    folder: str
    engine: str
    text: str
    tokens: int
    seconds: float | None

    def speed(self) -> str:
        """A few words on its length and speed."""
        if not self.seconds:
            return f"{self.tokens} tokens, {self.engine}"
        rate = self.tokens / self.seconds
        return (
            f"{self.tokens} tokens in {self.seconds:.1f} s, {rate:.1f} tokens a second,"
            f" {self.engine}"
        )


@dataclass(frozen=True)
class Way:
    """How folders are asked. engine: None is our loader. root: where `.engines` lies."""

    engine: str | None = None
    device: str = "0"
    remote_code: bool = False
    timeout: float = 600
    root: Path | None = None


class Aloud(TextStreamer):
    """Hands on each piece of an answer as soon as its words are whole."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], skip_prompt: bool = True):
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self._on_text = on_text

    def hear(self, piece: str | int) -> None:
        """A piece from an engine's program."""
        if isinstance(piece, str):
            self._on_text(piece)
        else:
            self.put(torch.tensor([piece]))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by Transformers."""
        if text:
            self._on_text(text)


def ask_folder(
    folder: str,
    question: Question,
    way: Way | None = None,
    on_text: Callable[[str], None] = lambda text: None,
) -> Answer:
    """The greedy answer. on_text: gets its pieces in order, as they come.

    Raises UserError for a folder that can't be read, for an engine that is unknown, not installed
    or does not take this, and for media that the model does not take.
    """
    way = way or Way()
    if way.engine is not None:
        return _by_engine(folder, question, way, on_text)
    place = devices.resolve(way.device)
    loaded = load_any(folder, device=place, remote_code=way.remote_code, stream=None)
    prompt = _prompt(loaded, question)
    # Whisper generates window by window
    windows = loaded.model.main_input_name == "input_features"
    streamer = None if windows else Aloud(loaded.tokenizer, on_text)
    started = time.perf_counter()
    ids_T = generate(loaded, prompt, streamer)
    seconds = time.perf_counter() - started
    text = str(loaded.tokenizer.decode(ids_T, skip_special_tokens=True)).strip()
    if windows:
        on_text(text)
    return Answer(folder, LOADER, text, len(ids_T), seconds)


def _prompt(loaded: Loaded, question: Question) -> Prompt:
    try:
        return asked(
            loaded, question.text or ASK_FOR_WORDS, question.images, question.videos,
            question.audios, question.tokens,
        )  # fmt: skip
    except MediaError as error:
        raise UserError(str(error)) from error


def check_engine(names: Sequence[str], question: Question, way: Way) -> Path:
    """The interpreter of the way's engine. Raises UserError where it can't answer for all folders:
    for one that it does not read before the engine that is not installed."""
    engine = str(way.engine)
    if engine not in SPEAKING:
        raise UserError(f"engine {engine!r} answers no questions: one of {', '.join(SPEAKING)}")
    for name in names:
        subject = read_subject(_folder(name), None, way.remote_code)
        fmt = subject.fmt.name if subject.fmt else "fake"
        if fmt != "fake" or not ENGINES[engine].plain:
            require_reads(engine, fmt)
        _check_kinds(engine, _folder(name), question)
    python = engines.python_of(engine, engines.root() if way.root is None else way.root)
    if problem := engines.not_installed(python):
        raise UserError(problem)
    return python


def _folder(name: str) -> Path:
    return DEMO if name == "demo" else Path(name)


class _Asked(NamedTuple):
    """A question on its way to an engine. how: keywords of `engines.ask`."""

    engine: str
    folder: Path
    question: Question
    prompt: Prompt
    loaded: Loaded
    how: dict[str, Any]


def _by_engine(name: str, question: Question, way: Way, on_text: Callable[[str], None]) -> Answer:
    engine, folder, python = str(way.engine), _folder(name), check_engine([name], question, way)
    loaded = _for_prompt(folder, way.remote_code)
    prompt = _prompt(loaded, question)
    streamer = Aloud(loaded.tokenizer, on_text, skip_prompt=False)
    how = {"python": python, "timeout": way.timeout, "on_piece": streamer.hear}
    asking = _Asked(engine, folder, question, prompt, loaded, how)
    result = ADAPTERS.get(engine, _ask_with_tensors)(asking)
    streamer.end()
    if not result.ok:
        raise UserError(f"{engine} gave no answer: {result.error}")
    text, count = _told(result, loaded)
    return Answer(name, result.engine or engine, text, count, result.seconds)


def _for_prompt(folder: Path, remote_code: bool) -> Loaded:
    """The model; its blocks stay in the files, which the prompt does not need. Those that share
    weights can't."""
    try:
        return load_any(str(folder), remote_code=remote_code, stream=True)
    except UserError:
        return load_any(str(folder), remote_code=remote_code, stream=False)


def _check_kinds(engine: str, folder: Path, question: Question) -> None:
    kinds = ENGINES[engine].takes(folder)
    for kind in question.kinds:
        if kind not in kinds and not (kind == "audio" and "speech" in kinds):
            raise UserError(f"{engine} takes no {kind} of {folder}: leave --engine out")


def _inputs(engine: str, prompt: Prompt) -> Mapping[str, Tensor]:
    """The prompt as an engine's program reads it: media as they are where it processes them."""
    if not ENGINES[engine].own_media:
        return {key: value for key, value in prompt.kwargs.items() if isinstance(value, Tensor)}
    if "input_ids" not in prompt.kwargs:
        raise UserError(f"{engine} is asked for no transcripts: leave --engine out")
    images = {
        f"image{i}": torch.from_numpy(np.array(image.convert("RGB")))
        for i, image in enumerate(prompt.images)
    }
    return {"input_ids": prompt.kwargs["input_ids"]} | images


def _ask_with_tensors(q: _Asked) -> EngineResult:
    given = {
        "dtype": ENGINES[q.engine].answers_in,
        "new_tokens": q.question.tokens,
        "ends": sorted(_ends(q.loaded)),
    }
    return ask(q.engine, q.folder, [_inputs(q.engine, q.prompt)], given, **q.how)


def _ask_with_files(q: _Asked) -> EngineResult:
    """The text as it is, pictures as files."""
    with tempfile.TemporaryDirectory() as made:
        content: list[str | dict[str, str]] = []
        for i, image in enumerate(q.prompt.images):
            path = Path(made) / f"{i}.png"
            Image.fromarray(np.array(image.convert("RGB"))).save(path)
            content.append({"image": str(path)})
        asked = {"content": [*content, q.question.text], "max_tokens": q.question.tokens}
        return ask_llamacpp_aloud(q.folder, asked, **q.how)


# Engines that are asked in another way than `_ask_with_tensors`.
ADAPTERS = {"llamacpp": _ask_with_files}


def _ends(loaded: Loaded) -> set[int]:
    """Ids of the tokens that end an answer."""
    stated = getattr(loaded.model.generation_config, "eos_token_id", None)
    ends = {loaded.tokenizer.eos_token_id, *(stated if isinstance(stated, list) else [stated])}
    return {int(token) for token in ends if token is not None}


def _told(result: EngineResult, loaded: Loaded) -> tuple[str, int]:
    """(text, number of tokens)."""
    answer = result.answers[0]
    if "text" in answer:
        return str(answer["text"]).strip(), int(answer["tokens"])
    ids = answer["ids"]
    return str(loaded.tokenizer.decode(ids, skip_special_tokens=True)).strip(), len(ids)
