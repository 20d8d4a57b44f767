#!/usr/bin/env python3
"""What it brings that the tuner sees rounded inputs: KL by modality with activations rounded as
engines round them, tuned with them and without.

    bench/served.py [--model demo] [--schemes W8A8 W4A8 ...] [--ways rtn auto "auto, unseen"]

Each run in a process of its own. Results go to standard output as Markdown and, with --keep, to a
dated file.
"""

import argparse
import contextlib
import json
import tempfile
import time
from itertools import product
from typing import Any
from unittest import mock

import kept

WAYS: dict[str, dict[str, Any]] = {
    "rtn": {"algorithm": "rtn"},
    "gptq": {"algorithm": "gptq"},
    "gptq, unseen": {"algorithm": "gptq"},
    "auto": {"algorithm": "auto"},
    "auto, unseen": {"algorithm": "auto"},
}


def measured(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the run, and KL of its checkpoint from the model before, by modality, with
    activations rounded."""
    from auto_mmround.checkpoint.loader import from_quantized
    from auto_mmround.evaluate.held_out import held_out
    from auto_mmround.evaluate.metrics import measure
    from auto_mmround.model.loading import load
    from auto_mmround.recipe.recipe import from_mapping
    from auto_mmround.run import job as jobs
    from auto_mmround.run.served import ServedInputs

    blind = mock.patch.object(ServedInputs, "rounding", lambda *_: contextlib.nullcontext())
    with tempfile.TemporaryDirectory() as folder:
        recipe = from_mapping(
            {"model": job["model"], "dataset": job["dataset"], "nsamples": job["samples"],
             "format": "compressed_tensors", "output_dir": folder, "device": "cpu",
             "scheme": job["scheme"], **WAYS[job["way"]], **job["options"]}
        )  # fmt: skip
        loaded = jobs.load_model(recipe)
        prepared = jobs.prepare(recipe, loaded)
        started = time.perf_counter()
        with blind if "unseen" in job["way"] else contextlib.nullcontext():
            (made,) = jobs.run(prepared)
        seconds = time.perf_counter() - started
        reference = load(job["model"])
        tuned = from_quantized(made, activations=True).model
    rows = held_out(reference, job["held_out"] or job["dataset"], limit=job["rows"])
    (found,) = measure([tuned], rows, reference=reference.model)
    return {"seconds": seconds, "kl": found.kl, "perplexity": found.perplexity}


def cells(result: dict[str, Any]) -> list[str]:
    """KL, perplexity and seconds as text, or what went wrong."""
    if "error" in result:
        return [result["error"], "", ""]
    kl = ", ".join(f"{kind} {value:.5f}" for kind, value in result["kl"].items())
    return [kl, f"{result['perplexity']:.3f}", f"{result['seconds']:.0f}"]


def main() -> None:
    """Every scheme in every way."""
    parser = kept.options(__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--held_out")
    parser.add_argument("--schemes", nargs="+", default=["W8A8", "W4A8"])
    parser.add_argument("--ways", nargs="+", default=[*WAYS])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--options", type=json.loads, default={}, help="of every run, JSON")
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measured(json.loads(given.worker))))
        return
    base = {k: v for k, v in vars(given).items() if k not in ("worker", "schemes", "ways", "keep")}
    table = kept.Table("scheme", "way", "KL", "perplexity", "seconds")
    for scheme, way in product(given.schemes, given.ways):
        result = kept.answer(__file__, base | {"scheme": scheme, "way": way})
        table.add(scheme, way, *cells(result))
    kept.keep(given.keep, "served", "Activations in the loop", table)


if __name__ == "__main__":
    main()
