"""Inputs to ask engines about, made from a checkpoint folder: its tokenizer, processor, template.

A line of text and, if the model takes them, a drawn image and a synthetic sound. Their content does
not matter: an engine must only agree with the decoded weights.
"""

import math
import struct
import wave
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from auto_mmround.calibration import samples
from auto_mmround.calibration.inputs import placeholder_ids
from auto_mmround.calibration.ready import with_decoder_ids
from auto_mmround.errors import UserError
from auto_mmround.families import family_of
from auto_mmround.modalities import AUDIO, IMAGE
from auto_mmround.model.loading import Loaded
from auto_mmround.model.positions import position_limit
from auto_mmround.model.speaking import speaking
from auto_mmround.run.job import preparers

TEXT = (
    "In the beginning was the word, and many other words came after it; some of them were numbers:"
    " 1, 2, 3, 17."
)
QUESTIONS = {"image": "What do you see?", "audio": "What do you hear?"}
RATE = 16000
FEW = 16  # tokens of a text, at least


@dataclass(frozen=True)
class Probe:
    """One input.

    kind: "text", "image", "audio" (a question about a sound) or "speech" (a sound to write down).
    kwargs: for `model(**kwargs)`, up to the beginning of the answer. media: for engines that
    process it themselves, `image0` as uint8 (height, width, 3), `audio0` as float32 (T,) at 16 kHz.
    """

    kind: str
    kwargs: Mapping[str, Any]
    media: Mapping[str, Tensor] = field(default_factory=dict)


def make_probes(loaded: Loaded, folder: Path) -> tuple[list[Probe], list[str]]:
    """(probes, notes on kinds that could not be made). Media files are written to ``folder``.

    Raises UserError if no probe can be made.
    """
    config = loaded.model.config
    if config.is_encoder_decoder and loaded.model.main_input_name == "input_features":
        return [_heard(loaded, sing(folder))], []
    known = set(placeholder_ids(config).values())
    kinds = [kind for kind, place in (("image", IMAGE), ("audio", AUDIO)) if place in known]
    plain = family_of(config.model_type).text_only
    probes = [Probe("text", _words(loaded))] if plain else []
    notes = []
    for kind in kinds:
        path = MAKERS[kind](folder)
        turns = [
            {"from": "human", "value": f"<{kind}>\n{QUESTIONS[kind]}"},
            {"from": "gpt", "value": "Something."},
        ]
        try:
            kwargs = _encode(loaded, {kind: path.name, "conversations": turns}, folder)
        except UserError as error:
            notes.append(f"no {kind} input could be made: {error}")
        else:
            image = (
                {"image0": torch.from_numpy(np.array(Image.open(path)))} if kind == "image" else {}
            )
            probes.append(Probe(kind, kwargs, image))
    if not probes:
        raise UserError(
            "; ".join(notes)
            or "the model takes neither text nor an image nor sound that could be made"
        )
    return probes, notes


def _words(loaded: Loaded) -> dict[str, Any]:
    """A text; where a tokenizer makes next to nothing of it, the first ids. So it is with a folder
    without one, for which Transformers makes one that knows no word. Not through calibration, which
    has no use for a text of few or equal tokens."""
    known = loaded.tokenizer(TEXT)["input_ids"] if loaded.tokenizer is not None else []
    words: Any = loaded.model.get_input_embeddings()
    first = list(range(min(32, len(words.weight))))
    ids = torch.tensor([known if len(known) >= FEW else first])
    ids = ids[:, : position_limit(loaded.model)]
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    return with_decoder_ids(kwargs, speaking(loaded.model).config)


def _heard(loaded: Loaded, path: Path) -> Probe:
    """A sound for a speech recogniser, with the beginning of a text."""
    with wave.open(str(path), "rb") as file:
        samples = struct.unpack(f"<{RATE}h", file.readframes(RATE))
    extract = loaded.processor.feature_extractor
    sound_T = torch.tensor(samples, dtype=torch.float32) / 2**15
    made = extract(sound_T.numpy(), sampling_rate=RATE, return_tensors="pt")
    words = loaded.tokenizer(TEXT, add_special_tokens=False)["input_ids"][:8]
    ids = torch.tensor([[loaded.model.config.decoder_start_token_id, *words]])
    kwargs = {"input_features": made["input_features"], "decoder_input_ids": ids}
    return Probe("speech", kwargs, {"audio0": sound_T})


def _encode(loaded: Loaded, row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    made, _ = samples.build(
        [dict(row)],
        preparers(loaded),
        samples.Reading(1, truncation=False, extra_data_dir=str(folder), prompt=True, quiet=True),
    )
    return made[0].kwargs


def draw(folder: Path) -> Path:
    """A picture with a circle and a square on a plain ground."""
    image = Image.new("RGB", (112, 84), (245, 240, 225))
    pen = ImageDraw.Draw(image)
    pen.ellipse((10, 12, 60, 62), fill=(200, 40, 40))
    pen.rectangle((66, 30, 104, 74), fill=(30, 60, 180))
    path = folder / "probe.png"
    image.save(path)
    return path


def sing(folder: Path) -> Path:
    """A second of a rising tone, 16 bit mono."""
    path = folder / "probe.wav"
    samples = (
        int(12000 * math.sin(2 * math.pi * (220 + 220 * t / RATE) * t / RATE)) for t in range(RATE)
    )
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))
    return path


MAKERS = {"image": draw, "audio": sing}
