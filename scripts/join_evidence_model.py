"""Join the evidence model from its text model and the trained tower, and draw its data:
`python scripts/join_evidence_model.py TEXT_FOLDER OUT`.

OUT/model is an ordinary folder, with processor, tokenizer and chat template. OUT/heldout has
`vqa.json` (as many questions of each kind) and `text.jsonl`, OUT/calibration `llava.json` and
`text.jsonl`, as the bundled model has them; from random streams that training does not use.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

import numpy as np
from demo_data import read_documents, write_conversations, write_texts
from evidence_model import SYSTEM, join
from evidence_scenes import QUESTIONS, conversation, draw_strip, single_question

TRAINED = Path(__file__).parents[1] / "bench" / "models" / "evidence.safetensors"
STREAMS = {"calibration": (101, 1), "heldout": (102, 1)}  # training draws from (seed, step)


def single(rng: np.random.Generator, kind: str) -> tuple[str, tuple[list, list]]:
    strip, asked = single_question(rng, kind)
    return kind, ([strip], [asked])


def talk(rng: np.random.Generator, rounds: int) -> tuple[str, tuple[list, list]]:
    strip, asked = conversation(rng, rounds)
    return "mixed", ([strip], [asked[1:] for asked in asked])


def write_data(out: Path, each: int, seed: int = 0) -> None:
    """Held-out: `each` questions of every kind. Calibration: 192 talks of one to three rounds."""
    # Word for word what the tower was trained with, whatever template the rows go through.
    write = partial(write_conversations, draw=draw_strip, picture="<image>", system=SYSTEM)
    rng = np.random.default_rng([seed, *STREAMS["heldout"]])
    asked = [single(rng, kind) for _ in range(each) for kind in QUESTIONS]
    write(out / "heldout", "heldout", asked)
    rng = np.random.default_rng([seed, *STREAMS["calibration"]])
    talks = [talk(rng, 1 + i % 3) for i in range(192)]
    write(out / "calibration", "calibration", talks)
    write_texts(out, *read_documents())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="folder of the text model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--trained", type=Path, default=TRAINED)
    parser.add_argument("--each", type=int, default=40, help="held-out questions of every kind")
    args = parser.parse_args()
    model, processor = join(args.text, args.trained)
    model.save_pretrained(args.out / "model")
    processor.save_pretrained(args.out / "model")
    processor.image_processor.save_pretrained(args.out / "model")
    write_data(args.out, args.each)


if __name__ == "__main__":
    main()
