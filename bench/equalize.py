#!/usr/bin/env python3
"""What equalization brings: KL from full precision on held-out data, by modality; on the bundled
model by default.

    bench/equalize.py [--schemes W4g128 W3g128 ...] [--algorithms rtn gptq]
                      [--limit 48] [--keep bench/results]
                      [--model FOLDER --dataset TEXT.jsonl --held_out TEXT.jsonl]

Every row is one run over the calibration set (demo: text and images); nothing is written but the
table.
"""

import argparse
import datetime
import json
import logging
import re
import time
from pathlib import Path
from typing import Any

import torch

from auto_mmround.evaluate.held_out import held_out
from auto_mmround.evaluate.metrics import measure
from auto_mmround.model.loading import load
from auto_mmround.recipe.recipe import from_mapping
from auto_mmround.run import job as jobs
from auto_mmround.run.finished import Finished
from auto_mmround.run.pipeline import quantize
from auto_mmround.run.record import machine

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "smoothquant 0.5": {"equalize": "smoothquant", "smoothing_strength": 0.5},
    "smoothquant 0.8": {"equalize": "smoothquant", "smoothing_strength": 0.8},
    "awq, no duo": {"equalize": "awq", "duo_scaling": False},
    "awq": {"equalize": "awq"},
}


def main() -> None:
    """Every scheme and algorithm by every method."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--held_out", default="demo")
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--schemes", nargs="+", default=["W4g128", "W4g-1", "W3g128", "W3g-1"])
    parser.add_argument("--algorithms", nargs="+", default=["rtn"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument(
        "--limit", type=int, default=48, help="held-out texts, and as many questions about images"
    )
    parser.add_argument("--keep", type=Path, help="folder for a dated Markdown file")
    found = parser.parse_args()
    logging.disable(logging.WARNING)
    reference = load(found.model)
    inputs = held_out(reference, found.held_out, limit=found.limit)
    lines = [
        "| scheme | algorithm | equalize | KL text | KL image | perplexity | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))
    for scheme in found.schemes:
        bits, group_size, asym = re.fullmatch(r"W(\d)g(-?\d+)(a?)", scheme).groups()  # type: ignore[union-attr]
        for algorithm in found.algorithms:
            for method in found.methods:
                values = {
                    "model": found.model,
                    "dataset": found.dataset,
                    "device": "cpu",
                    "nsamples": found.samples,
                }
                values |= {"seqlen": found.seqlen}
                values |= {
                    "bits": int(bits),
                    "group_size": int(group_size),
                    "sym": not asym,
                    "algorithm": algorithm,
                }
                recipe = from_mapping(values | METHODS[method])
                job = jobs.prepare(recipe, jobs.load_model(recipe))
                started = time.perf_counter()
                quantize(job.loaded.model, job.recipe, job.plan, job.inputs, Finished())
                seconds = time.perf_counter() - started
                (figures,) = measure([job.loaded.model], inputs, reference=reference.model)
                cells = [
                    f"{figures.kl[kind]:.5f}" if kind in figures.kl else "-"
                    for kind in ("text", "image")
                ]
                cells.append(f"{figures.perplexity:.3f}")
                lines.append(
                    f"| {scheme} | {algorithm} | {method} | {' | '.join(cells)} | {seconds:.1f} |"
                )
                print(lines[-1], flush=True)
    if found.keep:
        today, table = datetime.date.today(), "\n".join(lines)
        text = f"# Equalization on the demo model, {today}\n\n{table}\n\n{json.dumps(machine())}\n"
        (found.keep / f"equalize-{today}.md").write_text(text)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
