#!/usr/bin/env python3
"""GGUF's K types, tuned on their own grid against tuned on a plain grid and fitted afterwards: KL
on held-out data.

    bench/gguf_k.py [--types q4_k q3_k q2_k] [--algorithms rtn auto] [--limit 48]
                    [--keep bench/results] [--model FOLDER --dataset TEXT --held_out TEXT]

"plain" is the first half of "fitted": what a K type's scheme gives with a float16 scale and an
integer zero point a group, which no K type can hold. Values are those of the files, bit for bit
(tests/test_gguf.py); none is written here.
"""

import argparse
import datetime
import json
import logging
import resource
from pathlib import Path
from typing import Any

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
from auto_mmround.run.record import machine


def main() -> None:
    """Every type and algorithm: plain, fitted, on the grid."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--held_out", default="demo")
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--types", nargs="+", default=["q4_k", "q3_k", "q2_k"])
    parser.add_argument("--algorithms", nargs="+", default=["rtn", "auto"])
    parser.add_argument("--tuned", nargs="+", choices=["plain", "grid"], default=["plain", "grid"])
    parser.add_argument(
        "--minmax_lr", type=float, help="another rate of the scales' factors than the default"
    )
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
        "| type | algorithm | weights | KL text | KL image | perplexity | moved | processor s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines))

    def row(kind: SuperType, algorithm: str, weights: str, model: Any, *rest: str) -> None:
        (figures,) = measure([model], inputs, reference=reference.model)
        cells = [
            f"{figures.kl[kind]:.5f}" if kind in figures.kl else "-" for kind in ("text", "image")
        ]
        cells += [f"{figures.perplexity:.3f}", *rest]
        lines.append(f"| {kind.name} | {algorithm} | {weights} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)

    for kind in (SUPER_TYPES[name.upper()] for name in found.types):
        for algorithm in found.algorithms:
            for weights in found.tuned:
                name = "fake" if weights == "plain" else f"gguf:{kind.name.lower()}"
                values = {
                    "model": found.model,
                    "dataset": found.dataset,
                    "device": "cpu",
                    "nsamples": found.samples,
                }
                values |= {"seqlen": found.seqlen, "format": name, "algorithm": algorithm}
                values |= {"bits": kind.bits, "group_size": kind.group, "sym": kind.sym}
                recipe = from_mapping(
                    values | ({} if found.minmax_lr is None else {"minmax_lr": found.minmax_lr})
                )
                job, done = jobs.prepare(recipe, jobs.load_model(recipe)), Finished()
                started = _processor_seconds()
                quantize(job.loaded.model, job.recipe, job.plan, job.inputs, done)
                row(
                    kind,
                    algorithm,
                    weights,
                    job.loaded.model,
                    "",
                    f"{_processor_seconds() - started:.0f}",
                )
                if weights == "plain":
                    planned = [w for w in job.plan.weights if w.scheme]
                    fitted = {w.name: onto(done.codes[w.name], kind) for w in planned}
                    write_back(
                        job.loaded.model, planned, {n: codes for n, (codes, _) in fitted.items()}
                    )
                    moved = sum(share for _, share in fitted.values()) / len(fitted)
                    row(kind, algorithm, "fitted", job.loaded.model, f"{moved:.1%}", "")
    if found.keep:
        today, table = datetime.date.today(), "\n".join(lines)
        text = (
            f"# GGUF's K types on {Path(found.model).name},"
            f" {today}\n\n{table}\n\n{json.dumps(machine())}\n"
        )
        (found.keep / f"gguf-k-{today}.md").write_text(text)


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
