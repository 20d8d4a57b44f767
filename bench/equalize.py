#!/usr/bin/env python3
"""What equalization brings: KL from full precision on held-out data, by modality; on the bundled
model by default.

    bench/equalize.py [--schemes W4g128 W3g128 ...] [--algorithms rtn gptq]
                      [--limit 48] [--keep bench/results]
                      [--model FOLDER --dataset TEXT.jsonl --held_out TEXT.jsonl]

Every row is one run over the calibration set (demo: text and images); nothing is written but the
table.
"""

import logging
import time
from itertools import product
from pathlib import Path
from typing import Any

import kept
import torch

from auto_mmround.evaluate.held_out import held_out
from auto_mmround.evaluate.metrics import measure
from auto_mmround.model.loading import load
from auto_mmround.recipe.recipe import from_mapping
from auto_mmround.run import job as jobs
from auto_mmround.run.finished import Finished
from auto_mmround.run.pipeline import quantize

METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "smoothquant 0.5": {"equalize": "smoothquant", "smoothing_strength": 0.5},
    "smoothquant 0.8": {"equalize": "smoothquant", "smoothing_strength": 0.8},
    "awq, no duo": {"equalize": "awq", "duo_scaling": False},
    "awq": {"equalize": "awq"},
}


def seconds_of(job: jobs.Job) -> float:
    """Quantize in memory."""
    started = time.perf_counter()
    quantize(job.loaded.model, job.recipe, job.plan, job.inputs, Finished())
    return time.perf_counter() - started


def main() -> None:
    """Every scheme and algorithm by every method."""
    parser = kept.held_out_options(__doc__)
    parser.add_argument("--schemes", nargs="+", default=["W4g128", "W4g-1", "W3g128", "W3g-1"])
    parser.add_argument("--algorithms", nargs="+", default=["rtn"])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    found = parser.parse_args()
    logging.disable(logging.WARNING)
    reference = load(found.model)
    inputs = held_out(reference, found.held_out, limit=found.limit)
    table = kept.Table(
        "scheme", "algorithm", "equalize", "KL text", "KL image", "perplexity", "seconds"
    )
    for scheme, algorithm, method in product(found.schemes, found.algorithms, found.methods):
        values = kept.held_out_values(found) | kept.scheme(scheme) | METHODS[method]
        recipe = from_mapping(values | {"algorithm": algorithm})
        job = jobs.prepare(recipe, jobs.load_model(recipe))
        seconds = seconds_of(job)
        (figures,) = measure([job.loaded.model], inputs, reference=reference.model)
        table.add(scheme, algorithm, method, *kept.kl_cells(figures), f"{seconds:.1f}")
    kept.keep(found.keep, "equalize", f"Equalization on {Path(found.model).name}", table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
