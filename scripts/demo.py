#!/usr/bin/env python3
"""The whole journey on the bundled model: quantize to 4 and 3 bits, export, measure what is left,
prove the exports.

Run by `make demo`. The last table and the lines below it are the result; everything is also written
to `.demo/result.json`, and with `--keep DIR` as a dated Markdown file into DIR.
"""

import argparse
import datetime
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.console import metrics_table, percent
from auto_mmround.evaluate import evaluate, tasks
from auto_mmround.evaluate.held_out import held_out
from auto_mmround.evaluate.metrics import Metrics, measure
from auto_mmround.evaluate.prompts import Data
from auto_mmround.model import devices
from auto_mmround.model.loading import Loaded
from auto_mmround.printing import console, quiet_libraries, show
from auto_mmround.progress import RunProgress
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.report import report
from auto_mmround.run import job as jobs
from auto_mmround.run.record import machine
from auto_mmround.verify import proof
from auto_mmround.verify.verify import verify

BASE = Recipe(model="demo", dataset="demo", output_dir=".demo", overwrite=True)
FORMATS = "auto_round,auto_round:auto_awq,auto_gptq,auto_awq"


def quantized(recipe: Recipe) -> tuple[jobs.Job, list[Path]]:
    """Run a recipe on a fresh copy of the model; the job's model holds the quantized weights
    afterwards."""
    job = jobs.prepare(recipe, jobs.load_model(recipe))
    bar = RunProgress(job.plan, job.recipe)
    with bar.progress:
        return job, jobs.run(job, bar.watcher(), prove=proof.prove)


def prove(job: jobs.Job, folders: list[Path]) -> list[str]:
    """A line an export, which keeps its verdict; raises SystemExit if one is not what was tuned."""
    state = job.loaded.model.state_dict()
    tuned = {f"{name}.weight": state[f"{name}.weight"] for name in job.plan.quantized}
    lines, failed = [], False
    for folder in folders:
        state = from_quantized(folder).model.state_dict()
        wrong = [name for name in tuned if not torch.equal(state[name], tuned[name])]
        found = verify(folder, ["transformers"])
        (verdict,) = found.verdicts
        line = (
            f"{folder.name}: {len(wrong)} weights differ from the tuned ones"
            if wrong
            else verdict.line()
        )
        failed |= bool(wrong or verdict.error or not found.right)
        report.keep_verdicts(folder, [asdict(verdict)])
        console.print(line, soft_wrap=True)
        lines.append(line)
    if failed:
        raise SystemExit("demo: an export is not what was tuned")
    return lines


def fill_reports(
    folders: list[Path], models: dict[str, Loaded], figures: dict[str, Metrics]
) -> None:
    """The figures and a few answers of a checkpoint and the models it is compared with, into its
    report."""
    started, data = time.perf_counter(), Data()
    found = tasks.side_by_side(tasks.Setting(models, data))
    found.scores, found.figures = list(tasks.forced_scores(figures, data.title)), figures
    names = {"reference": "demo", "baseline": "round to nearest", "quantized": folders[0].name}
    made = evaluate.record(
        found, names, models, data, ["ppl", "kl", "samples"], time.perf_counter() - started
    )
    for folder in folders:
        evaluate.keep(folder, made | {"command": "make demo"})


def as_markdown(results: dict[str, Metrics], lines: list[str], seconds: float, peak: float) -> str:
    """The result as a dated page."""
    rows = [
        [
            name,
            percent(m.accuracy),
            f"{m.perplexity:.3f}",
            *(f"{m.kl.get(k, 0):.5f}" for k in ("text", "image")),
        ]
        for name, m in results.items()
    ]
    facts = machine()
    versions = ", ".join(f"{name} {version}" for name, version in facts["packages"].items())
    heads = ["weights", "accuracy", "perplexity", "KL text", "KL image"]
    table = "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * 5, *rows])
    return (
        f"# `make demo`, {datetime.date.today()}\n\n{table}\n\n"
        + "".join(f"- {line}\n" for line in lines)
        + f"\n{seconds:.0f} s, peak memory {peak:.1f} GB; {facts['system']}, {facts['threads']}"
        " threads; " + f"Python {facts['python']}, {versions}. Command: `make bench`.\n"
    )


@dataclass
class Run:
    """One width: the bits, its folders, and the models that its report compares."""

    bits: int
    job: jobs.Job
    folders: list[Path]
    models: dict[str, Loaded]

    @property
    def names(self) -> tuple[str, str, str]:
        """What the tables call the models."""
        return "full precision", f"W{self.bits} round to nearest", f"W{self.bits} tuned"


def run(bits: int, full: Loaded) -> Run:
    """Tune at that width, and round to nearest for comparison."""
    recipe = replace(BASE, bits=bits, format=FORMATS if bits == 4 else "auto_round")
    plain, _ = quantized(replace(recipe, iters=0, format="auto_round", output_dir=".demo/rtn"))
    job, folders = quantized(recipe)
    models = {"reference": full, "baseline": plain.loaded, "quantized": job.loaded}
    return Run(bits, job, folders, models)


def measured(full: Loaded, runs: list[Run]) -> dict[str, Metrics]:
    """Figures of all models on held-out data, by name."""
    models = {name: model for each in runs for name, model in zip(each.names, each.models.values())}
    inputs = held_out(full, "demo")
    console.print(f"measuring {len(models)} models on {len(inputs)} held-out samples")
    found = measure([each.model for each in models.values()], inputs, reference=full.model)
    return dict(zip(models, found, strict=True))


def keep(
    folder: Path | None, results: dict[str, Metrics], lines: list[str], seconds: float, peak: float
) -> None:
    """What was found, into `.demo/result.json`, and with the date into a folder if there is one."""
    console.print(f"{seconds:.0f} s, peak memory {peak:.1f} GB")
    record = {name: metrics.as_dict() for name, metrics in results.items()}
    found = {"results": record, "exports": lines, "seconds": seconds, "peak_gb": peak}
    Path(".demo/result.json").write_text(json.dumps(found, indent=1) + "\n")
    if folder:
        path = folder / f"demo-{datetime.date.today()}.md"
        path.write_text(as_markdown(results, lines, seconds, peak))
        console.print(f"kept in {path}")


def not_better(results: dict[str, Metrics], each: Run) -> str | None:
    """A complaint, if tuning did not lower every KL."""
    _, nearest, tuned = (results[name].kl for name in each.names)
    worse = [name for name in nearest if tuned[name] >= nearest[name]]
    lost = ", ".join(worse)
    return f"demo: at {each.bits} bits tuning did not lower the KL of {lost}" if worse else None


def main() -> None:
    """Everything, in order."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, help="folder for a dated Markdown file of the result")
    folder = parser.parse_args().keep
    quiet_libraries()
    started = time.perf_counter()
    full = jobs.load_model(BASE)
    runs = [run(bits, full) for bits in (4, 3)]
    results = measured(full, runs)
    console.print("loading the four W4 exports in Transformers")
    lines = prove(runs[0].job, runs[0].folders)
    for each in runs:
        figures = (results[name] for name in each.names)
        fill_reports(each.folders, each.models, dict(zip(each.models, figures, strict=True)))
    show(metrics_table(results, title="the demo model on held-out text and questions on images"))
    for line in lines:
        console.print(line, soft_wrap=True)
    peak = max(devices.peak_memory(full.model.device).values())
    keep(folder, results, lines, time.perf_counter() - started, peak)
    page = runs[0].folders[0] / "report.html"
    console.print(f"to look at: {page}", soft_wrap=True)
    for complaint in filter(None, (not_better(results, each) for each in runs)):
        sys.exit(complaint)


if __name__ == "__main__":
    main()
