"""Measure the demo model on its held-out data, whole and with rounded weights, and write its model
card.

`python scripts/demo_report.py` measures the model that is there again; `train_demo_model.py` calls
the same functions.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)


def round_to_nearest(weight: torch.Tensor, bits: int, group: int = 128) -> torch.Tensor:
    """Symmetric rounding; the largest weight of each group, sign and all, lands on the end of the
    grid."""
    grouped = weight.float().reshape(weight.shape[0], -1, group)
    largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True))
    scale = largest / -(2 ** (bits - 1))
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    levels = (grouped / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return (levels * scale).reshape(weight.shape).to(weight.dtype)


def round_text_layers(
    model: Qwen2VLForConditionalGeneration, bits: int
) -> Qwen2VLForConditionalGeneration:
    rounded = copy.deepcopy(model)
    for module in rounded.model.language_model.layers.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight.data = round_to_nearest(module.weight.data, bits)
    return rounded


def load_rows(folder: Path) -> list[dict]:
    """The held-out questions, with their prompt, images and answer."""
    rows = json.loads((folder / "vqa.json").read_text())
    for row in rows:
        files = [row["image"]] if isinstance(row["image"], str) else row["image"]
        row["images"] = [Image.open(folder / "images" / file).convert("RGB") for file in files]
        question, answer = (turn["value"] for turn in row["conversations"])
        row["prompt"], row["answer"] = PROMPT.format(question.replace("<image>", IMAGE)), answer
    return rows


@torch.no_grad()
def answer_all(
    model, processor, rows: list[dict], batch: int = 36
) -> tuple[list[str], torch.Tensor]:
    """Greedy answers, and the log-probabilities of the first answer token."""
    answers, first = [], []
    processor.tokenizer.padding_side = "left"
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        inputs = processor(
            text=[row["prompt"] for row in part],
            images=[row["images"] for row in part],
            padding=True,
            return_tensors="pt",
        )
        out = model.generate(
            **inputs,
            max_new_tokens=16,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        fresh = out.sequences[:, inputs["input_ids"].shape[1] :]
        answers += processor.batch_decode(fresh, skip_special_tokens=True)
        first.append(F.log_softmax(out.logits[0].float(), -1))
    return answers, torch.cat(first)


@torch.no_grad()
def text_log_probabilities(model, processor, texts: list[str]) -> tuple[float, torch.Tensor]:
    """Perplexity per token over the held-out documents, and every 8th token's log-probabilities."""
    total, count, kept = 0.0, 0, []
    for text in texts:
        ids = processor.tokenizer(text, return_tensors="pt")["input_ids"]
        logs = F.log_softmax(model(input_ids=ids).logits[0, :-1].float(), -1)
        total -= logs.gather(1, ids[0, 1:, None]).sum().item()
        count += ids.shape[1] - 1
        kept.append(logs[::8])
    return math.exp(total / count), torch.cat(kept)


def divergence(whole: torch.Tensor, other: torch.Tensor) -> float:
    return (whole.exp() * (whole - other)).sum(-1).mean().item()


def evaluate(out: Path) -> dict:
    """Accuracy by question kind, perplexity and KL divergence, at bf16 and rounded to 4, 3 and 2
    bits."""
    model = Qwen2VLForConditionalGeneration.from_pretrained(
        out / "model", dtype=torch.float32
    ).eval()
    processor = AutoProcessor.from_pretrained(out / "model")
    rows = load_rows(out / "heldout")
    texts = [
        json.loads(line)["text"]
        for line in (out / "heldout" / "text.jsonl").read_text().splitlines()
    ]
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "questions": len(rows),
        "texts": len(texts),
    }
    asked = Counter(row["kind"] for row in rows)
    whole = None
    for name, bits in (("full", 0), ("W4", 4), ("W3", 3), ("W2", 2)):
        tried = round_text_layers(model, bits) if bits else model
        answers, first = answer_all(tried, processor, rows)
        perplexity, logs = text_log_probabilities(tried, processor, texts)
        whole = whole or (first, logs)
        right = Counter(
            row["kind"] for row, answer in zip(rows, answers) if answer == row["answer"]
        )
        report[name] = {
            "accuracy": 100 * sum(right.values()) / len(rows),
            "by_kind": {kind: 100 * right[kind] / asked[kind] for kind in asked},
            "perplexity": perplexity,
            "answer_kl": divergence(whole[0], first),
            "text_kl": divergence(whole[1], logs),
        }
        print(name, json.dumps(report[name]), flush=True)
    return report


CARD = """\
# Demo model

A Qwen2-VL (`Qwen2VLForConditionalGeneration`) of {millions:.1f} million parameters, trained from nothing by
`python scripts/train_demo_model.py --seed {seed}` in {seconds:.0f} seconds on two CPU cores.  It answers short
questions about drawn scenes and models English text.  It is meant for trying out and testing quantization: small
enough to ship, trained well enough that rounding its weights costs something that can be measured.

* Text: 5 layers, hidden 256, MLP 768, 8 heads of 32 (4 key/value heads), tied embeddings, 2048 byte-level BPE tokens.
* Vision: 4 blocks, width 128, 4 heads, MLP 512, patches of 14, 2x2 merge; a 112x112 image becomes 16 tokens.
* Prompt: the Qwen2-VL chat template with "You are a helpful assistant." as the system message; `<image>` lines first.
* Training: first the vision tower alone learned to make image tokens similar to the embeddings of the words for what
  they show; then the whole model, for a quarter of its steps on questions that look one thing up in one image, and
  for the rest on all questions and on stretches of text. AdamW, cosine schedule.

## What is here

* `model/`: the Hugging Face folder (bf16 safetensors).
* `heldout/`: `vqa.json` ({questions} questions, as many of each kind, LLaVA layout) with `images/`, and `text.jsonl`
  ({texts} documents).  None of it was trained on.
* `calibration/`: `llava.json` (192 conversations of one to three rounds on one or two images) with `images/`, and
  `text.jsonl` (192 documents of the training text).  The scenes come from a random stream of their own.

## Held-out results

Accuracy is the exact match of greedy answers, in percent.  W4, W3 and W2 round the Linear weights of the text layers
to nearest (symmetric, groups of 128), without any calibration.  KL is against the full model, in nats: over the first
answer token, and over every eighth text token.

{table}

## Licence

The scenes are drawn by the project's own scripts.  The text is the King James Version (1611), which is in the public
domain.  The model and its data are under the licence of the project.
"""  # noqa: E501


def write_readme(out: Path, report: dict, seconds: float, seed: int) -> None:
    columns = ["full", "W4", "W3", "W2"]
    lines = ["| | bf16 | W4 | W3 | W2 |", "|---|---|---|---|---|"]

    def line(name: str, values: list[float], digits: int) -> None:
        lines.append(f"| {name} | " + " | ".join(f"{value:.{digits}f}" for value in values) + " |")

    for kind in report["full"]["by_kind"]:
        line(f"accuracy: {kind}", [report[column]["by_kind"][kind] for column in columns], 1)
    line("**accuracy: all**", [report[column]["accuracy"] for column in columns], 1)
    line("text perplexity", [report[column]["perplexity"] for column in columns], 2)
    line("KL, answers", [report[column]["answer_kl"] for column in columns], 4)
    line("KL, text", [report[column]["text_kl"] for column in columns], 4)
    card = CARD.format(
        millions=report["parameters"] / 1e6,
        seed=seed,
        seconds=seconds,
        questions=report["questions"],
        texts=report["texts"],
        table="\n".join(lines),
    )
    (out / "README.md").write_text(card)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "auto_mmround" / "demo"
    )
    evaluate(parser.parse_args().out)
