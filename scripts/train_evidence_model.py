"""Train the evidence model's tower: `python scripts/train_evidence_model.py TEXT STAGE --run RUN`.

TEXT is the folder of Qwen2.5-Coder-0.5B-Instruct, whose weights stay as they are; RUN keeps what is
learned so far. The stages, each of which goes on where it was stopped (`--stop`, or killed):

    table    --steps 80 --strips 3 --rounds 5 --bare 0 --rate 1e-3
    tower    --steps 1000 --strips 24 --rate 2e-3
    whole    --steps 100 --strips 3 --rounds 5 --bare 0 --rate 2e-4
    export   writes bench/models/evidence.safetensors

The plan, by count. A token costs the text 0.72 GFLOP forward and as much backward (no gradients of
weights): 7 ms on one core at 200 GFLOP/s in bfloat16. A picture through the tower costs 0.3 GFLOP.
So the text model must be asked little, and the tower may see much:

1. `table` needs no pictures. What a picture's tokens are to tell is a sum of rows of a table, a row
   a feature, which start as the embeddings of words (" left red star;"). Told so, with the system
   message of `evidence_model.SYSTEM`, the text model answers most questions before any training.
   Only the table learns, through the frozen text, what is still wrong (counts, empty panels).
2. `tower` needs no text. The bundled demo model's trained tower learns to name the features of each
   token, by squares, with a linear last layer; that layer and the table are then one layer.
3. `whole`, optional, trains tower and merger through the text model.

What comes before the picture is the same for all, so its keys and values are computed once; all
questions on a picture share its tokens; logits are taken at answers, over the words in use.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from demo_data import patchify
from demo_model import image_tokens, merged, patch_states
from evidence_chats import Chats
from evidence_model import TOWER, build, folded
from evidence_scenes import (
    CHARACTERS,
    FEATURES,
    INDEX,
    QUESTIONS,
    TOKENS,
    characters,
    conversation,
    draw_strip,
    features,
    random_strip,
)  # fmt: skip
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, Qwen2VLForConditionalGeneration

DEMO = Path(__file__).parents[1] / "auto_mmround" / "demo" / "model"
KEPT = Path(__file__).parents[1] / "bench" / "models" / "evidence.safetensors"
SAVE_EVERY = 60  # seconds


class Training:
    """AdamW over named parameters: a constant rate, falling to nothing over the last quarter of the
    steps. Each step draws from a generator of its own, so a run that goes on where it was saved is
    the run that was never stopped."""

    def __init__(self, path: Path, parameters: dict, rate: float, steps: int, seed: int) -> None:
        self.path, self.parameters, self.rate, self.steps = path, parameters, rate, steps
        self.seed, self.step = seed, 0
        self.optimizer = torch.optim.AdamW(
            parameters.values(), rate, betas=(0.9, 0.98), weight_decay=0.0
        )
        if path.is_file():
            self.resume(load_file(path))

    def resume(self, kept: dict) -> None:
        self.step = int(kept["step"])
        for name, parameter in self.parameters.items():
            parameter.data.copy_(kept[name])
            if self.step:
                self.optimizer.state[parameter] = {
                    key: kept[f"{key} {name}"] for key in ("step", "exp_avg", "exp_avg_sq")
                }

    def save(self) -> None:
        kept = {"step": torch.tensor(self.step)}
        for name, parameter in self.parameters.items():
            kept[name] = parameter.data
            kept |= {f"{key} {name}": x for key, x in self.optimizer.state[parameter].items()}
        partial = self.path.with_suffix(".partial")
        save_file({name: x.clone().contiguous() for name, x in kept.items()}, partial)
        partial.replace(self.path)

    def run(self, loss: Callable, show: Callable[[], str], stop: int | None) -> None:
        """Steps on `loss(generator)`, until all are done or, to go on another time, `stop` (0 keeps
        what there is before any)."""
        saved = began = time.monotonic()
        first, last = self.step, self.steps if stop is None else min(self.steps, stop)
        while self.step < last:
            left = (self.steps - self.step) / (0.25 * self.steps)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * min(1.0, left, (self.step + 1) / 10)
            value = loss(np.random.default_rng([self.seed, self.step]))
            self.optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
            self.optimizer.step()
            self.step += 1
            if self.step % 10 == 0 or self.step == last:
                pace = (time.monotonic() - began) / (self.step - first)
                print(f"{self.path.stem} {self.step:5d} {pace:.2f} s/step {show()}", flush=True)
            if time.monotonic() - saved > SAVE_EVERY:
                self.save()
                saved = time.monotonic()
        self.save()


class Reading:
    """The loss of the answers given what the text model is shown, and how many are right."""

    def __init__(self, model, chats: Chats, seed: int) -> None:
        self.model, self.chats = model, chats
        # Words that answers are compared with: those of answers, and the 8192 most frequent.
        rng = np.random.default_rng([seed, 0])
        said, head = set(), model.lm_head.weight
        for _ in range(300):
            ids, learn, *_ = chats.encode(conversation(rng, 8)[1])
            said |= set(ids[learn].tolist())
        said |= {token for words in FEATURES.values() for token in chats.tokens(words)}
        self.words = torch.tensor(sorted({*range(min(8192, len(head))), *said}))
        self.place = torch.full((len(head),), -1)
        self.place[self.words] = torch.arange(len(self.words))
        self.head = head[self.words]
        self.loss, self.share = 0.0, {}

    def __call__(self, seen: torch.Tensor, batch: dict) -> torch.Tensor:
        hidden = self.chats.hidden(seen, batch)
        learn = batch["learn"][:, 1:]
        ids = F.pad(batch["ids"], (TOKENS, 0))[:, 1:]
        logits = (hidden[:, :-1][learn] @ self.head.T).float()
        target = self.place[ids[learn]]
        loss = F.cross_entropy(logits, target)
        self.count(logits.argmax(-1) == target, batch, loss.item())
        return loss

    def count(self, right: torch.Tensor, batch: dict, loss: float) -> None:
        """Running means; an answer is right where all its tokens are."""
        self.loss = loss if not self.loss else 0.95 * self.loss + 0.05 * loss
        learn = batch["learn"][:, 1:]
        wrong = torch.zeros_like(learn)
        wrong[learn] = ~right
        for row, kinds in enumerate(batch["kinds"]):
            for number, kind in enumerate(kinds, 1):
                missed = wrong[row][batch["segments"][row, 1:] == number].any().item()
                before = self.share.get(kind, 0.0)
                self.share[kind] = 0.95 * before + 0.05 * (not missed)

    def show(self) -> str:
        kinds = " ".join(f"{kind} {share:.0%}" for kind, share in sorted(self.share.items()))
        return f"loss {self.loss:.3f} {kinds}"


def first_table(model, chats: Chats) -> torch.Tensor:
    """The embeddings of words for each feature, (features, D)."""
    embedding = model.get_input_embeddings().weight.float()
    rows = [
        embedding[chats.tokens(words)].sum(0) if words else 0 * embedding[0]
        for words in FEATURES.values()
    ]
    return torch.stack(rows)


def spread(table: torch.Tensor, shown: list) -> torch.Tensor:
    """What strips tell, as sums of rows of the table: (B, 12, D)."""
    flat = [token for strip in shown for token in strip]
    offsets = torch.tensor([0, *(len(token) for token in flat)]).cumsum(0)[:-1]
    ids = torch.tensor([i for token in flat for i in token])
    return F.embedding_bag(ids, table, offsets, mode="sum").view(len(shown), TOKENS, -1)


def train_table(args, model, chats: Chats) -> None:
    table = torch.nn.Parameter(first_table(model, chats))
    training = Training(
        args.run / "table.safetensors", {"table": table}, args.rate, args.steps, args.seed
    )
    reading = Reading(model, chats, args.seed)

    def loss(rng):
        batch = chats.batch(rng, args)
        return reading(spread(table, batch["shown"]), batch)

    training.run(loss, reading.show, args.stop)


def feature_tower() -> torch.nn.Module:
    """The demo model's trained tower, in float32, whose last layer names features instead."""
    demo = Qwen2VLForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32)
    tower = demo.model.visual
    last = tower.merger.mlp[2]
    tower.merger.mlp[2] = torch.nn.Linear(last.in_features, len(FEATURES))
    torch.nn.init.normal_(tower.merger.mlp[2].weight, std=0.02)
    torch.nn.init.zeros_(tower.merger.mlp[2].bias)
    return tower


def hot(shown: list) -> torch.Tensor:
    """Features of each token as zeros and ones: (B, 12, features)."""
    return spread(torch.eye(len(FEATURES)), shown)


# Features that exclude each other -> where they start, where they end.
GROUPS = {}
for name, place in INDEX.items():
    group = name.split(" ")[0]
    GROUPS[group] = (GROUPS.get(group, (place,))[0], place + 1)


class Naming:
    """The squared error of what the tower names in drawn strips, and how often it is right."""

    def __init__(self, tower: torch.nn.Module, processor, strips: int) -> None:
        self.tower, self.processor, self.strips = tower, processor, strips
        # Half-way up, single characters are named, so that the blocks above can put them together.
        self.speller = torch.nn.Linear(4 * TOWER["embed_dim"], 2 * len(CHARACTERS))
        self.loss, self.share = 0.0, {}

    def __call__(self, rng: np.random.Generator) -> torch.Tensor:
        strips = [random_strip(rng) for _ in range(self.strips)]
        target = hot([features(strip) for strip in strips])
        with torch.autocast("cpu", torch.bfloat16):
            states = [*patch_states(self.tower, patchify(strips, self.processor, draw_strip), 2)]
            named = merged(self.tower, states[-1])
            spelled = self.speller(states[1].view(len(strips), TOKENS, -1))
        named, spelled = named.float(), spelled.float().view(-1, len(CHARACTERS))
        printed = torch.from_numpy(np.stack([characters(strip) for strip in strips])).flatten()
        there = printed > 0
        spelling = F.cross_entropy(spelled, printed)
        self.average("character", (spelled[there].argmax(-1) == printed[there]).float().mean())
        error = (named - target).square().sum(-1).mean()
        self.loss = 0.95 * (self.loss or error.item()) + 0.05 * error.item()
        return error + 3 * self.choices(named, target) / TOKENS + spelling

    def average(self, name: str, share: torch.Tensor) -> None:
        self.share[name] = 0.95 * self.share.get(name, share.item()) + 0.05 * share.item()

    def choices(self, named: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The cross entropy of each group's features where it is there, a strip. Squares alone
        take long to tell a hundred words apart."""
        lost = named.new_zeros(())
        for group, (start, end) in GROUPS.items():
            there = target[..., start:end].sum(-1) > 0
            logits, want = (
                10 * named[..., start:end][there],
                target[..., start:end][there].argmax(-1),
            )
            if len(want):
                lost = lost + F.cross_entropy(logits, want, reduction="sum") / len(named)
                self.average(group, (logits.argmax(-1) == want).float().mean())
        return lost

    show = Reading.show


def train_tower(args) -> None:
    torch.manual_seed(args.seed)
    tower, processor = feature_tower(), AutoProcessor.from_pretrained(DEMO)
    naming = Naming(tower, processor, args.strips)
    parts = dict(tower.named_parameters()) | {
        f"speller.{name}": x for name, x in naming.speller.named_parameters()
    }
    training = Training(args.run / "tower.safetensors", parts, args.rate, args.steps, args.seed)
    training.run(naming, naming.show, args.stop)


def learned(path: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    """The parameters in a file that `Training` saved."""
    kept = load_file(path)
    return {name: kept[name] for name in names}


def first_whole(args) -> dict[str, torch.Tensor]:
    """The tower as the first two stages leave it."""
    names = dict(feature_tower().named_parameters())
    table = learned(args.run / "table.safetensors", ["table"])["table"]
    return folded(learned(args.run / "tower.safetensors", names), table)


def train_whole(args, model, chats: Chats, processor) -> None:
    tower = model.model.visual.float().requires_grad_(True)
    tower.load_state_dict(first_whole(args))
    training = Training(
        args.run / "whole.safetensors", dict(tower.named_parameters()), args.rate, args.steps,
        args.seed,
    )  # fmt: skip
    reading = Reading(model, chats, args.seed)

    def loss(rng):
        batch = chats.batch(rng, args)
        with torch.autocast("cpu", torch.bfloat16):
            seen = image_tokens(tower, patchify(batch["strips"], processor, draw_strip), 2)
        return reading(seen, batch)

    training.run(loss, reading.show, args.stop)


def export(args, kept: Path) -> None:
    """What was trained, in float16."""
    whole = args.run / "whole.safetensors"
    tower = first_whole(args)
    tower = learned(whole, tower) if whole.is_file() else tower
    kept.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: x.half().contiguous() for name, x in tower.items()}, kept)
    print(f"{kept}: {sum(x.numel() for x in tower.values())} parameters")


def learn(args) -> None:
    """One stage."""
    torch.set_num_threads(1)
    args.run.mkdir(parents=True, exist_ok=True)
    if args.stage == "tower":
        train_tower(args)
        return
    model, processor = build(args.text)
    chats = Chats(model, processor.tokenizer)
    if args.stage == "table":
        train_table(args, model, chats)
    else:
        train_whole(args, model, chats, processor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="folder of the text model")
    parser.add_argument("stage", choices=["table", "tower", "whole", "export"])
    parser.add_argument("--run", type=Path, required=True, help="folder for what is learned so far")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--stop", type=int, help="step to stop at, to go on another time")
    parser.add_argument("--strips", type=int, default=3, help="pictures a step")
    parser.add_argument("--rounds", type=int, default=5, help="questions a picture")
    parser.add_argument("--kinds", nargs="+", default=[*QUESTIONS], help="of questions")
    parser.add_argument(
        "--bare", type=float, default=0.0, help="share of steps with answers but no questions"
    )
    args = parser.parse_args()
    if args.stage == "export":
        export(args, KEPT)
    else:
        learn(args)


if __name__ == "__main__":
    main()
