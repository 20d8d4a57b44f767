"""What the demo model learns from, and the data written with it: conversations about drawn scenes,
and text."""

from __future__ import annotations

import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import torch
from demo_scenes import ALL_KINDS, LOOKUPS, SIZE, conversation, draw_indices, single_question
from transformers import Qwen2VLProcessor

HERE = Path(__file__).parent
GRID = SIZE // 28  # image tokens on a side
# The streams that random numbers come from keep the scenes of the four uses apart.
STREAMS = {"tower": 1, "train": 2, "calibration": 3, "heldout": 4, "order": 5}
PROMPT = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def stream(seed: int, name: str) -> np.random.Generator:
    return np.random.default_rng([seed, STREAMS[name]])


def read_documents() -> tuple[list[str], list[str]]:
    """Documents of 1600 to 1900 characters: those to train on, and every 27th, which is held
    out."""
    documents = (
        lzma.decompress((HERE / "data" / "demo_corpus.txt.xz").read_bytes()).decode().splitlines()
    )
    return [d for i, d in enumerate(documents) if i % 27], documents[::27]


def patchify(scenes: list, processor: Qwen2VLProcessor, draw=draw_indices) -> torch.Tensor:
    """The image processor's `pixel_values` of drawn scenes of one size, as (image, patch, values).

    Colours are normalised in the palette, so that the pixels only need looking up.
    """
    mean, std = (
        np.float32(processor.image_processor.image_mean),
        np.float32(processor.image_processor.image_std),
    )
    colors = np.stack([(scene.palette.astype(np.float32) / 255 - mean) / std for scene in scenes])
    indices = np.stack([np.asarray(draw(scene)) for scene in scenes])
    rows, columns = (size // 28 for size in indices.shape[1:])
    # (image, block row, row in block, pixel row, block column, column in block, pixel column), as
    # the processor does
    indices = indices.reshape(-1, rows, 2, 14, columns, 2, 14).transpose(0, 1, 4, 2, 5, 3, 6)
    indices = (
        torch.from_numpy(np.ascontiguousarray(indices))
        .reshape(len(scenes), 4 * rows * columns, 196)
        .long()
    )
    # image, patch, 196, 3
    looked_up = torch.from_numpy(colors)[torch.arange(len(scenes))[:, None, None], indices]
    return looked_up.transpose(2, 3).unsqueeze(3).expand(-1, -1, -1, 2, -1).flatten(2)


class ChatEncoder:
    """Turns conversations into padded batches of token ids, M-RoPE positions and an attention
    mask."""

    def __init__(self, processor: Qwen2VLProcessor) -> None:
        self.processor, self.known = processor, {}

    def tokens(self, text: str) -> list[int]:
        if text not in self.known:
            self.known[text] = self.processor.tokenizer(text)["input_ids"]
        return self.known[text]

    def encode(
        self, questions: list[tuple[str, str]], images: int, newline: str, follow: bool
    ) -> list[np.ndarray]:
        """Ids, which of them are answers, positions and segments of one conversation.

        With `follow` the questions are rounds of one conversation.  Otherwise each is the first and
        only question about the images: all come after one start, at the same positions, each in a
        segment that does not see the others.  It is as if every question had a copy of the images
        to itself, at a fraction of the cost.
        """
        image = IMAGE.replace("<|image_pad|>", "<|image_pad|>" * GRID**2)
        start = self.tokens(
            PROMPT + "<|im_start|>user\n" + newline.join([image] * images) + newline
        )
        ids, learn, segments = [*start], [False] * len(start), [0] * len(start)
        for number, (question, answer) in enumerate(questions, 1):
            again = "\n<|im_start|>user\n" if follow and number > 1 else ""
            asked = self.tokens(f"{again}{question}<|im_end|>\n<|im_start|>assistant\n")
            reply = self.tokens(f"{answer}<|im_end|>")
            ids += asked + reply
            learn += [False] * len(asked) + [True] * len(reply)
            segments += [0 if follow else number] * (len(asked) + len(reply))
        segments = np.array(segments)
        positions = np.zeros((3, len(ids)), np.int64)
        rows, columns = np.divmod(np.arange(GRID**2), GRID)
        place = now = number = after_images = 0
        while place < len(ids):
            if segments[place] != number:
                after_images = now if number == 0 else after_images
                now, number = after_images, segments[place]
            if ids[place] == self.processor.image_token_id:
                positions[:, place : place + GRID**2] = now + np.stack([0 * rows, rows, columns])
                now, place = now + GRID, place + GRID**2
            else:
                positions[:, place] = now
                now, place = now + 1, place + 1
        return [np.array(ids), np.array(learn), positions, segments]

    def batch(self, rng: np.random.Generator, size: int, easy: bool) -> dict:
        """A batch of `size` conversations; `easy` ones only look things up in one image."""
        scenes, encoded = [], []
        for _ in range(size):
            images = 1 if easy or rng.random() < 0.6 else 2
            about, questions = conversation(rng, images, 7, LOOKUPS if easy else ())
            follow = rng.random() < 0.15
            scenes += about
            newline = "\n" if rng.random() < 0.8 else ""
            encoded.append(
                self.encode(questions[:4] if follow else questions, images, newline, follow)
            )
        longest = max(len(ids) for ids, *_ in encoded)
        ids = torch.full((size, longest), self.processor.tokenizer.pad_token_id)
        learn, asked = torch.zeros(2, size, longest, dtype=torch.bool)
        positions, segments = (
            torch.zeros(3, size, longest, dtype=torch.long),
            torch.zeros(size, longest),
        )
        for row, parts in enumerate(encoded):
            one, answer, place, segment = (torch.from_numpy(part) for part in parts)
            ids[row, : len(one)], learn[row, : len(one)], positions[:, row, : len(one)] = (
                one,
                answer,
                place,
            )
            asked[row, : len(one)], segments[row, : len(one)] = (
                ~answer & (one != self.processor.image_token_id),
                segment,
            )
        sees = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
        mask = torch.zeros(size, longest, longest).masked_fill(~sees.tril(), -torch.inf)
        return {
            "ids": ids,
            "learn": learn,
            "asked": asked,
            "positions": positions,
            "mask": mask,
            "scenes": scenes,
        }


# --------------------------------------------------------------------------------------------------
# what is written


def write_conversations(
    folder: Path, name: str, items: list, draw=draw_indices, picture="<image>\n", system=""
) -> None:
    """LLaVA-style conversations next to their images. picture: what stands for one."""
    shutil.rmtree(folder / "images", ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    rows = []
    for number, (kind, (scenes, questions)) in enumerate(items):
        files = [
            f"{number:04d}{'ab'[i] if len(scenes) > 1 else ''}.png" for i in range(len(scenes))
        ]
        for scene, file in zip(scenes, files):
            draw(scene).save(folder / "images" / file, optimize=True)
        turns = [{"from": "system", "value": system}] if system else []
        for i, (question, answer) in enumerate(questions):
            shown = picture * len(scenes) if i == 0 else ""
            turns += [
                {"from": "human", "value": shown + question},
                {"from": "gpt", "value": answer},
            ]
        files = files if len(files) > 1 else files[0]
        rows.append(
            {"id": f"{name}-{number:04d}", "kind": kind, "image": files, "conversations": turns}
        )
    file = "vqa.json" if name == "heldout" else "llava.json"
    (folder / file).write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def write_data(out: Path, seed: int, documents: list[str], held_documents: list[str]) -> None:
    """Held-out: as many single questions of each kind.  Calibration: one to three rounds on one or
    two images."""
    rng = stream(seed, "heldout")
    write_conversations(
        out / "heldout",
        "heldout",
        [(kind, single_question(rng, kind)) for _ in range(50) for kind in ALL_KINDS],
    )
    rng = stream(seed, "calibration")
    talks = [conversation(rng, 1 if i % 5 < 3 else 2, 1 + i % 3) for i in range(192)]
    write_conversations(out / "calibration", "calibration", [("mixed", talk) for talk in talks])
    write_texts(out, documents, held_documents)


def write_texts(out: Path, documents: list[str], held_documents: list[str]) -> None:
    """`heldout/text.jsonl`, and 192 of the others as `calibration/text.jsonl`."""
    for folder, texts in (
        ("heldout", held_documents),
        ("calibration", documents[:: len(documents) // 192][:192]),
    ):
        (out / folder / "text.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts)
        )
