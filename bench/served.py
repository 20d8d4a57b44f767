#!/usr/bin/env python3
"""What it brings that the tuner sees rounded inputs: KL by modality with activations rounded as
engines round them, tuned with them and without.

    bench/served.py [--model demo] [--schemes W8A8 W4A8 ...] [--ways rtn auto "auto, unseen"]

Each run in a process of its own. Results go to standard output as Markdown and, with --keep, to a
dated file.
"""

import argparse
import contextlib
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

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


def main() -> None:
    """Every scheme in every way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--held_out")
    parser.add_argument("--schemes", nargs="+", default=["W8A8", "W4A8"])
    parser.add_argument("--ways", nargs="+", default=[*WAYS])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--options", type=json.loads, default={}, help="of every run, JSON")
    parser.add_argument("--keep", type=Path, help="folder for a dated Markdown file")
    given = parser.parse_args()
    if given.worker:
        print(json.dumps(measured(json.loads(given.worker))))
        return
    base = {k: v for k, v in vars(given).items() if k not in ("worker", "schemes", "ways", "keep")}
    lines = ["| scheme | way | KL | perplexity | seconds |", "|---|---|---|---|---|"]
    print("\n".join(lines))
    for scheme in given.schemes:
        for way in given.ways:
            job = json.dumps(base | {"scheme": scheme, "way": way})
            command = [sys.executable, __file__, "--worker", job]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                cells = [(done.stderr.strip().splitlines() or ["no output"])[-1][:200], "", ""]
            else:
                result = json.loads(done.stdout.strip().splitlines()[-1])
                kl = ", ".join(f"{kind} {value:.5f}" for kind, value in result["kl"].items())
                cells = [kl, f"{result['perplexity']:.3f}", f"{result['seconds']:.0f}"]
            lines.append(f"| {scheme} | {way} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    if given.keep:
        from auto_mmround.run.record import machine

        today, command = datetime.date.today(), " ".join(sys.argv)
        text = "\n".join([f"# Activations in the loop, {today}", "", *lines, ""])
        text += f"\n{json.dumps(machine())}\n\nCommand: `{command}`\n"
        (given.keep / f"served-{today}.md").write_text(text)


if __name__ == "__main__":
    main()
