#!/usr/bin/env python3
"""What padding costs on samples of very different length: nothing is padded here, and this counts
whether that is so.

    bench/padding.py [--model demo] [--samples 200] [--longest 1500] [--steps 40] [--batch_size 8]

Texts, images and conversations of 1 to 1,500 tokens go through the first text block and the first
block of each tower, once as a whole and then in random batches with gradients, as tuning does.
Printed: positions that the blocks computed, those that are tokens of a sample, what a batch padded
to its longest sample would have computed, and memory.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from auto_mmround.calibration.inputs import PAD, ModelInput
from auto_mmround.model.capture import capture
from auto_mmround.model.structure import find_stages
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs


@dataclass(frozen=True)
class Waste:
    """One stage: positions computed, positions that are tokens, and what padding to the longest
    would compute."""

    stage: str
    samples: int
    computed: int
    tokens: int
    padded: int

    @property
    def share(self) -> float:
        """Part of the computed positions that is padding."""
        return 1 - self.tokens / self.computed


@dataclass(frozen=True)
class Found:
    """waste: a row a stage. lengths: shortest and longest sample. memory_mb: of the process after
    each step."""

    waste: list[Waste]
    lengths: tuple[int, int]
    memory_mb: list[float]

    @property
    def growth(self) -> float:
        """Highest memory in the last quarter of the steps against the highest before it, minus
        1."""
        last = len(self.memory_mb) - len(self.memory_mb) // 4
        return max(self.memory_mb[last:]) / max(self.memory_mb[:last]) - 1


def rows(
    count: int, longest: int, words: Callable[[int], str], seed: int = 0
) -> list[dict[str, Any]]:
    """A third bare tokens from 1 on, a third one image and a question, a third two images and two
    turns."""
    draw = random.Random(seed)
    made: list[dict[str, Any]] = []
    for i in range(count):
        length = 1 if i == 0 else longest if i == 3 else round(longest ** draw.random())
        if i % 3 == 0:
            ids = [3 + draw.randrange(90) for _ in range(length)]
            made.append(
                {
                    "input_ids": ids,
                    "attention_mask": [[1] * length],
                    "mm_token_type_ids": [[0] * length],
                }
            )
            continue
        images = [
            Image.new("RGB", (56 + 28 * draw.randrange(6), 84), (i % 256, 90, 200))
            for _ in range(i % 3)
        ]
        turns = [
            ("user", "<image>" * len(images) + words(5)),
            ("assistant", words(1 + length // 3)),
        ]
        turns += [("user", words(3)), ("assistant", words(1 + length // 6))] if i % 3 == 2 else []
        made.append(
            {"image": images, "messages": [{"role": role, "content": text} for role, text in turns]}
        )
    return made


def resident_mb() -> float:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


@contextmanager
def counting(block: nn.Module) -> Iterator[list[int]]:
    """The number of positions of each hidden state that a block is given, while the context
    lasts."""
    seen: list[int] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = next(
            value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)
        )
        seen.append(hidden.shape[:-1].numel())

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def measure(
    model: Any, inputs: Sequence[ModelInput], batch_size: int, steps: int, seed: int = 0
) -> Found:
    """Run the first block of every stage over all inputs, and the text's in random batches with
    gradients."""
    chains = capture(model, find_stages(model), [made.kwargs for made in inputs])
    waste, memory = [], []
    for chain in chains.values():
        block = model.get_submodule(chain.stage.blocks[0])
        lengths = [hidden.shape[:-1].numel() for hidden in chain.hidden]
        real = list(lengths)
        if chain.stage.name == "text":
            real = [int((inputs[i].modality_T != PAD).sum()) for i in chain.sample]
        cut = [lengths[at : at + batch_size] for at in range(0, len(lengths), batch_size)]
        with counting(block) as seen:
            chain.advanced([block], 0, batch_size)
        padded = sum(max(batch) * len(batch) for batch in cut)
        waste.append(Waste(chain.stage.name, len(chain), sum(seen), sum(real), padded))
    draw = random.Random(seed)
    for parameter in block.parameters():
        parameter.requires_grad_(True)
    for _ in range(steps):
        for _, output in chain.forward(
            [block], 0, draw.sample(range(len(chain)), min(batch_size, len(chain)))
        ):
            output.float().square().mean().backward()
        model.zero_grad(set_to_none=True)
        memory.append(resident_mb())
    model.requires_grad_(False)
    return Found(waste, (min(real), max(real)), memory)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--longest", type=int, default=1500)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    draw = random.Random(1)
    recipe = Recipe(
        model=given.model, nsamples=given.samples, seqlen=given.longest, device="cpu", amp=False
    )
    loaded = jobs.load_model(recipe)
    vocabulary = ["tree", "house", "river", "stone", "bird", "and", "under", "the"]
    data = rows(
        given.samples, given.longest, lambda count: " ".join(draw.choices(vocabulary, k=count))
    )
    job = jobs.prepare(recipe, loaded, dataset=data)
    found = measure(loaded.model, job.inputs, given.batch_size, given.steps)
    if given.json:
        print(json.dumps(asdict(found)))
        return
    print(f"{len(job.inputs)} samples of {found.lengths[0]} to {found.lengths[1]} tokens\n")
    print(
        "| stage | entries | computed | tokens | padding | if each batch were padded |\n"
        + "|---" * 6
        + "|"
    )
    for row in found.waste:
        would = 1 - row.tokens / row.padded
        print(
            f"| {row.stage} | {row.samples} | {row.computed:,} | {row.tokens:,} | {row.share:.1%} |"
            f" {would:.1%} |"
        )
    print(f"\nmemory over {given.steps} steps: {found.memory_mb[0]:.0f} MB, at last "
          f"{found.memory_mb[-1]:.0f} MB; the last quarter's peak against "
          f"the peak before: {found.growth:+.1%}")  # fmt: skip


if __name__ == "__main__":
    main()
