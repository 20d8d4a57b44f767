"""Train the demo vision-language model and write it with its data: `python
scripts/train_demo_model.py`.

A Qwen2-VL of about six million parameters learns, from nothing and on two CPU cores in about half
an hour, to answer questions about drawn scenes (`demo_scenes.py`, `demo_data.py`) and to model
English text (`data/demo_corpus.txt.xz`, public domain); `demo_report.py` measures the result. The
number of steps is fixed and every random draw comes from `--seed`.

Stage 1 trains the vision tower alone to name what each image token shows (a stand-in for the
image-text pretraining of real towers, without which the model takes hours to start seeing).  Stage
2 trains the whole model.
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_data import GRID, ChatEncoder, patchify, read_documents, stream, write_data
from demo_model import VOCABULARY, build_model, build_processor, causal_attention, image_tokens
from demo_report import evaluate, write_readme
from demo_scenes import COLOR_NAMES, COLUMNS, DIGITS, KINDS, ROWS, random_scene
from transformers import Qwen2VLProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SHARDS = 2  # threads that train, one core each


def token_labels(scenes: list) -> torch.Tensor:
    """For each image token, the classes (of `class_words`) of the thing centred in it; 0 for
    none."""
    labels = torch.zeros(len(scenes), GRID**2, 4, dtype=torch.long)
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            classes = (
                KINDS.index(thing.kind),
                COLOR_NAMES.index(thing.color),
                thing.cell // 3,
                thing.cell % 3,
            )
            labels[i, int(thing.y // 28) * GRID + int(thing.x // 28)] = torch.tensor(classes) + 1
    return labels


class Namer:
    """The loss of naming what image tokens show by similarity with the embeddings of the words for
    it."""

    def __init__(self, processor: Qwen2VLProcessor, embedding: torch.nn.Embedding) -> None:
        self.embedding = embedding
        # for kinds, colours, rows and columns: the vocabulary's words for each class (none for 0)
        self.groups = []
        for names in (KINDS, COLOR_NAMES, ROWS, COLUMNS):
            words = torch.zeros(len(names) + 1, VOCABULARY)
            for i, name in enumerate(names):
                for word in (name, f" {name}", *([" digit"] if name in DIGITS else [])):
                    tokens = processor.tokenizer(word)["input_ids"]
                    if len(tokens) == 1:
                        words[i + 1, tokens[0]] = 1.0
            self.groups.append(words)
        # what speaks for class 0
        self.nothing = torch.nn.ParameterList([torch.zeros(1) for _ in self.groups])

    def losses(self, tokens: torch.Tensor, scenes: list) -> list[torch.Tensor]:
        values = []
        for words, bias, label in zip(
            self.groups, self.nothing, token_labels(scenes).flatten(0, 1).T
        ):
            logits = tokens.flatten(0, 1).float() @ (words @ self.embedding.weight).T
            values.append(
                F.cross_entropy(torch.cat([logits[:, :1] + bias, logits[:, 1:]], 1), label)
            )
        return values


def optimizer_and_schedule(parts: list, peak: float, steps: int, warmup: int):
    """AdamW over `parts`, each a list of parameters and its share of the `peak` learning rate."""
    groups = []
    for parameters, share in parts:
        for decay, chosen in ((0.05, lambda p: p.ndim > 1), (0.0, lambda p: p.ndim < 2)):
            group = [p for p in parameters if chosen(p)]
            groups.append({"params": group, "lr": share * peak, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    parameters = [p for group in groups for p in group["params"]]

    def rate(step: int) -> float:
        return min((step + 1) / warmup, 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))

    return parameters, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)


class Workers:
    """Splits each step over threads that use one core each.

    Far faster than one pass with many threads inside every operation, which here are small, and
    when another process takes a core for a moment only one half step waits for it.
    """

    def __init__(self, count: int, parameters: list) -> None:
        torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))
        self.parameters = parameters

    def gradients(self, losses, shards: list) -> np.ndarray:
        """Set the mean gradient of `sum(losses(shard))` over the shards; return the mean of each
        loss."""

        def work(shard):
            with torch.autocast("cpu", torch.bfloat16):
                parts = losses(shard)
            return torch.autograd.grad(sum(parts), self.parameters), [part.item() for part in parts]

        results = list(self.pool.map(work, shards))
        for parameter, *parts in zip(self.parameters, *(gradients for gradients, _ in results)):
            parameter.grad = sum(parts) / len(parts)
        return np.mean([values for _, values in results], axis=0)


def update(parameters: list, optimizer, schedule) -> None:
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


def train_tower(model, processor, namer: Namer, seed: int, steps: int) -> None:
    """Stage 1: each image token becomes similar to the embeddings of the words that name what it
    shows."""
    tower, rng = model.model.visual, stream(seed, "tower")
    learning = [*tower.parameters(), *namer.embedding.parameters(), *namer.nothing]
    parameters, optimizer, schedule = optimizer_and_schedule([(learning, 1.0)], 2e-3, steps, 50)
    workers = Workers(SHARDS, parameters)

    def losses(scenes):
        return namer.losses(image_tokens(tower, patchify(scenes, processor)), scenes)

    for step in range(steps):
        values = workers.gradients(
            losses, [[random_scene(rng) for _ in range(32)] for _ in range(SHARDS)]
        )
        update(parameters, optimizer, schedule)
        if step % 100 == 0 or step == steps - 1:
            print(
                f"tower {step:5d}  kind, colour, row, column loss"
                f" {' '.join(f'{x:.4f}' for x in values)}",
                flush=True,
            )


def text_stretches(tokens: list[list[int]], end: int, length: int, order: np.random.Generator):
    """Endless stretches of text; every epoch joins the documents in another order."""
    while True:
        joined = [token for i in order.permutation(len(tokens)) for token in [*tokens[i], end]]
        for start in range(0, len(joined) - length, length):
            yield torch.tensor([joined[start : start + length]])


def shard_losses(model, processor, namer: Namer, shard) -> tuple[torch.Tensor, ...]:
    """Answers, questions, text and names, each times its weight, of a batch of conversations and a
    stretch of text or None."""
    batch, text = shard
    seen = image_tokens(model.model.visual, patchify(batch["scenes"], processor))
    hidden = model.model(
        input_ids=batch["ids"],
        attention_mask={"full_attention": batch["mask"]},
        position_ids=batch["positions"],
        mm_encoder_outputs={
            "image": BaseModelOutputWithPooling(pooler_output=(seen.flatten(0, 1),))
        },
        use_cache=False,
    ).last_hidden_state
    target, learn, asked = (batch[name][:, 1:] for name in ("ids", "learn", "asked"))
    answers, questions = (model.lm_head(hidden[:, :-1][mask]).float() for mask in (learn, asked))
    prose = torch.zeros(())
    if text is not None:
        words = model.lm_head(
            model.model(input_ids=text[:, :-1], use_cache=False).last_hidden_state[0]
        ).float()
        prose = F.cross_entropy(words, text[0, 1:])
    return (
        F.cross_entropy(answers, target[learn]),
        0.2 * F.cross_entropy(questions, target[asked]),
        0.5 * prose,
        0.5 * sum(namer.losses(seen, batch["scenes"])),
    )


def train_model(
    model, processor, namer: Namer, documents: list[str], seed: int, steps: int
) -> None:
    """Stage 2: each shard of a step sees twelve conversations and a stretch of 512 tokens of text.

    The questions are learned too, at a lower weight: they speak of what is in the images, and this
    gets the text layers to look at the images much sooner than the few tokens of the answers do.
    """
    rng = stream(seed, "train")
    tower = [*model.model.visual.parameters(), *namer.nothing]
    # with the output layer, which is tied to the embedding
    text = [*model.model.language_model.parameters()]
    parameters, optimizer, schedule = optimizer_and_schedule(
        [(text, 1.0), (tower, 0.3)], 2e-3, steps, 60
    )
    workers, encoder = Workers(SHARDS, parameters), ChatEncoder(processor)
    end = processor.tokenizer.convert_tokens_to_ids("<|endoftext|>")
    prose = text_stretches(
        processor.tokenizer(documents)["input_ids"], end, 513, stream(seed, "order")
    )

    losses = partial(shard_losses, model, processor, namer)
    model.model.language_model.set_attn_implementation("train_demo")
    averages, began = np.zeros(4), time.time()
    for step in range(steps):
        easy = step < 0.25 * steps
        shards = [
            (encoder.batch(rng, 12, easy), None if easy else next(prose)) for _ in range(SHARDS)
        ]
        values = workers.gradients(losses, shards) * [1, 5, 2, 2]
        update(parameters, optimizer, schedule)
        averages = values if step == 0 else 0.98 * averages + 0.02 * values
        if step % 25 == 0 or step == steps - 1:
            speed = (time.time() - began) / (step + 1)
            shown = " ".join(f"{value:.4f}" for value in averages)
            print(
                f"model {step:5d}  answers, questions, text, names {shown}  {speed:.2f} s/step",
                flush=True,
            )
    model.model.language_model.set_attn_implementation("sdpa")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent.parent / "auto_mmround" / "demo"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scale",
        type=float,
        default=1.0,
        help="share of the full number of steps (for trying out)",
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    ALL_ATTENTION_FUNCTIONS.register("train_demo", causal_attention)
    began = time.time()
    documents, held_documents = read_documents()
    write_data(args.out, args.seed, documents, held_documents)
    processor = build_processor(documents, args.seed)
    model = build_model(processor)
    namer = Namer(processor, model.get_input_embeddings())
    train_tower(model, processor, namer, args.seed, int(1000 * args.scale))
    train_model(model, processor, namer, documents, args.seed, int(2400 * args.scale))
    seconds = time.time() - began
    model.to(torch.bfloat16).save_pretrained(args.out / "model")
    processor.save_pretrained(args.out / "model")
    processor.image_processor.save_pretrained(args.out / "model")
    print(f"trained in {seconds:.0f} s")
    report = evaluate(args.out)
    write_readme(args.out, report, seconds, args.seed)


if __name__ == "__main__":
    main()
