#!/usr/bin/env python3
"""Does the cost of tuning grow linearly in tokens, steps and layers? Three points each, on a random
Llama.

    bench/cost.py [--keep DIR]

Processor seconds of quantizing (all threads), so that other work on the machine counts little. A
straight line through the first and the last point predicts the middle one; the last column says by
how much it misses.
"""

import sys
import time

import kept
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.finished import Finished
from auto_mmround.run.pipeline import quantize
from auto_mmround.run.plan import make_plan

BASE = {"layers": 4, "samples": 32, "steps": 20}
POINTS = {"layers": (2, 4, 8), "samples": (32, 64, 128), "steps": (10, 20, 40)}
LENGTH = 128  # tokens a sample


def seconds(layers: int, samples: int, steps: int) -> float:
    """Processor seconds of one run."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1536, num_hidden_layers=layers, num_attention_heads=8,
        vocab_size=2000,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().bfloat16()
    recipe = Recipe(bits=4, iters=steps, device="cpu")
    plan = make_plan(model, recipe)
    text = torch.zeros(LENGTH, dtype=torch.int8)
    inputs = [
        ModelInput(
            "",
            {"input_ids": torch.randint(0, 2000, (1, LENGTH))},
            text,
            torch.ones(LENGTH, dtype=torch.bool),
        )
        for _ in range(samples)
    ]
    started = time.process_time()
    quantize(model, recipe, plan, inputs, Finished())
    return time.process_time() - started


def table() -> str:
    """Markdown: each quantity at three points."""
    seconds(1, 8, 1)  # what is done once in a process
    lines = [
        "| what grows | points | processor seconds | middle against the line |",
        "|---|---|---|---|",
    ]
    for name, points in POINTS.items():
        low, middle, high = found = [seconds(**BASE | {name: value}) for value in points]
        share = (points[1] - points[0]) / (points[2] - points[0])
        line = low + share * (high - low)
        shown = (
            f"{' · '.join(map(str, points))} | {' · '.join(f'{s:.1f}' for s in found)} |"
            f" {middle / line - 1:+.0%}"
        )
        lines.append(
            f"| {name if name != 'samples' else f'samples of {LENGTH} tokens'} | {shown} |"
        )
        print(lines[-1], file=sys.stderr)
    return "\n".join(lines)


def main() -> None:
    """Print the table; keep it with the date if asked."""
    folder = kept.options(__doc__).parse_args().keep
    found = table()
    print(found)
    kept.keep(folder, "cost", "Cost of tuning", found)


if __name__ == "__main__":
    main()
