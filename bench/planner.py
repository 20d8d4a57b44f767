#!/usr/bin/env python3
"""What `plan` predicts against what a run takes, one right after the other, each in a process of
its own.

    bench/planner.py [--demo] [--gemma FOLDER --text TEXT.txt] [--whisper FOLDER] [--processor]
                     [--keep bench/results]

Predicted and real minutes (after loading), peak memory of the process and bytes written. Whisper
runs on made-up
spectrograms: what they say changes no figure here.
"""

import argparse
import json
import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import kept

JOBS: dict[str, dict[str, Any]] = {
    "demo": {"model": "demo", "dataset": "demo", "nsamples": 32, "seqlen": 64, "iters": 8},
    "gemma": {"nsamples": 16, "seqlen": 256, "iters": 4, "bits": 3},
    "whisper": {
        "nsamples": 8,
        "quant_nontext_module": True,
        "group_size": 64,
        "iters": 4,
        "batch_size": 4,
        "model_dtype": "bfloat16",
    },
}


def rows(name: str, values: dict[str, Any], text: str) -> Any:
    """Calibration rows in memory, None for the recipe's own."""
    import torch

    if name == "whisper":
        draw = torch.Generator().manual_seed(0)
        return [
            {
                "input_features": torch.randn(1, 80, 3000, generator=draw),
                "decoder_input_ids": torch.arange(40)[None],
            }
            for _ in range(values["nsamples"])
        ]
    if name == "gemma":
        from transformers import AutoTokenizer

        ids = AutoTokenizer.from_pretrained(values["model"])(Path(text).read_text())["input_ids"]
        length = values["seqlen"]
        return [
            {"input_ids": ids[i * length : (i + 1) * length]} for i in range(values["nsamples"])
        ]
    return None


def worker(task: dict[str, Any]) -> None:
    """Predict or run; the last line of standard output is the result as JSON."""
    from auto_mmround.model import devices
    from auto_mmround.recipe.recipe import Recipe
    from auto_mmround.run import estimate as planner
    from auto_mmround.run import job as jobs

    logging.disable(logging.WARNING)
    clock = time.process_time if task["processor"] else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        recipe = Recipe(**task["values"], device="cpu", output_dir=folder)
        loaded = jobs.load_model(recipe)
        job = jobs.prepare(recipe, loaded, rows(task["name"], task["values"], task["text"]))
        started = clock()
        if task["predict"]:
            found = planner.estimate(job, clock=clock)
            result = {
                "seconds": sum(found.seconds.values()),
                "memory": found.memory,
                "disk": sum(found.sizes.values()),
            }
            result |= {"parts": dict(found.seconds), "took": clock() - started}
        else:
            (out,) = jobs.run(job)
            result = {
                "seconds": clock() - started,
                "disk": sum(p.stat().st_size for p in out.rglob("*")),
            }
            result["memory"] = devices.peak_memory(loaded.model.device)["process"] * 1e9
    print(json.dumps(result))


def run(task: dict[str, Any]) -> dict[str, Any]:
    """The worker's result."""
    found = kept.answer(__file__, task)
    return sys.exit(found["error"]) if "error" in found else found


def main() -> None:
    """Every model that is named."""
    parser = kept.options(__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--gemma")
    parser.add_argument("--whisper")
    parser.add_argument("--text")
    parser.add_argument(
        "--processor",
        action="store_true",
        help="processor seconds, for machines that do other work",
    )
    found = parser.parse_args()
    if found.worker:
        worker(json.loads(found.worker))
        return
    table = kept.Table("model", "figure", "predicted", "real", "predicted / real")
    for name, values in JOBS.items():
        if not getattr(found, name):
            continue
        given = values if name == "demo" else values | {"model": getattr(found, name)}
        task = {"name": name, "values": given, "text": found.text, "processor": found.processor}
        guess, real = (run(task | {"predict": predict}) for predict in (True, False))
        print(
            f"<!-- {name}: measuring took {guess['took']:.1f} s; {guess['parts']} -->",
            file=sys.stderr,
        )
        for figure, scale, unit in (
            ("seconds", 1, "s"),
            ("memory", 1e9, "GB"),
            ("disk", 1e6, "MB"),
        ):
            one, two = guess[figure] / scale, real[figure] / scale
            table.add(name, f"{figure} ({unit})", *(f"{x:.2f}" for x in (one, two, one / two)))
    kept.keep(found.keep, "planner", "Planner", table)


if __name__ == "__main__":
    main()
