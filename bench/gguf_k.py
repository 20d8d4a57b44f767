#!/usr/bin/env python3
"""GGUF's K types, tuned on their own grid against tuned on a plain grid and fitted afterwards: KL
on held-out data.

    bench/gguf_k.py [--types q4_k q3_k q2_k] [--algorithms rtn auto] [--limit 48]
                    [--keep bench/results] [--model FOLDER --dataset TEXT --held_out TEXT]

"plain" is the first half of "fitted": what a K type's scheme gives with a float16 scale and an
integer zero point a group, which no K type can hold. Values are those of the files, bit for bit
(tests/test_gguf.py); none is written here.
"""

import logging
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import kept
import torch

from auto_mmround.evaluate.held_out import held_out
from auto_mmround.evaluate.metrics import measure
from auto_mmround.export.gguf.k import SUPER_TYPES, SuperType, onto
from auto_mmround.model.loading import load
from auto_mmround.recipe.recipe import from_mapping
from auto_mmround.run import job as jobs
from auto_mmround.run.finished import Finished
from auto_mmround.run.leaves import write_back
from auto_mmround.run.pipeline import quantize


def trials(
    values: dict[str, Any], kind: SuperType, weights: str
) -> Iterator[tuple[Any, list[str]]]:
    """(model, cells of its row) of the plain grid and of what is fitted to it, or of the K type's
    own grid. The second model is the first, changed."""
    name = "fake" if weights == "plain" else f"gguf:{kind.name.lower()}"
    scheme = {"bits": kind.bits, "group_size": kind.group, "sym": kind.sym, "format": name}
    recipe = from_mapping(values | scheme)
    job, done = jobs.prepare(recipe, jobs.load_model(recipe)), Finished()
    started = time.process_time()
    quantize(job.loaded.model, job.recipe, job.plan, job.inputs, done)
    yield job.loaded.model, [weights, "", f"{time.process_time() - started:.0f}"]
    if weights == "plain":
        planned = [w for w in job.plan.weights if w.scheme]
        fitted = {w.name: onto(done.codes[w.name], kind) for w in planned}
        write_back(job.loaded.model, planned, {n: codes for n, (codes, _) in fitted.items()})
        moved = sum(share for _, share in fitted.values()) / len(fitted)
        yield job.loaded.model, ["fitted", f"{moved:.1%}", ""]


def main() -> None:
    """Every type and algorithm: plain, fitted, on the grid."""
    parser = kept.held_out_options(__doc__)
    parser.add_argument("--types", nargs="+", default=["q4_k", "q3_k", "q2_k"])
    parser.add_argument("--algorithms", nargs="+", default=["rtn", "auto"])
    parser.add_argument("--tuned", nargs="+", choices=["plain", "grid"], default=["plain", "grid"])
    parser.add_argument(
        "--minmax_lr", type=float, help="another rate of the scales' factors than the default"
    )
    found = parser.parse_args()
    logging.disable(logging.WARNING)
    reference = load(found.model)
    inputs = held_out(reference, found.held_out, limit=found.limit)
    table = kept.Table(
        "type", "algorithm", "weights", "KL text", "KL image", "perplexity", "moved", "processor s"
    )
    rate = {} if found.minmax_lr is None else {"minmax_lr": found.minmax_lr}
    for name, algorithm, weights in product(found.types, found.algorithms, found.tuned):
        kind = SUPER_TYPES[name.upper()]
        values = kept.held_out_values(found) | {"algorithm": algorithm} | rate
        for model, (title, *rest) in trials(values, kind, weights):
            (figures,) = measure([model], inputs, reference=reference.model)
            table.add(kind.name, algorithm, title, *kept.kl_cells(figures), *rest)
    kept.keep(found.keep, "gguf-k", f"GGUF's K types on {Path(found.model).name}", table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
