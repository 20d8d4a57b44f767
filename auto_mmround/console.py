"""What the command line shows: progress, tables, JSON. Everything here only prints; the work is done elsewhere."""

import argparse
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text
from transformers.utils import logging as transformers_logging

from auto_mmround.calibration.template import shipped
from auto_mmround.evaluation.generation import generate_sample
from auto_mmround.evaluation.loader import load_any
from auto_mmround.evaluation.metrics import Metrics, measure
from auto_mmround.evaluation.samples import held_out
from auto_mmround.export.formats import FORMATS
from auto_mmround.model import devices
from auto_mmround.model.families import FAMILIES
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run.pipeline import BlockReport, Watcher
from auto_mmround.run.plan import Plan

console = Console()
notices = Console(stderr=True)


def quiet_libraries() -> None:
    """One voice on the terminal: our log through rich, no bars or advice from the libraries."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    handler = RichHandler(console=notices, show_time=False, show_path=False, markup=False, highlighter=None)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)


class BlockProgress:
    """A bar over the blocks: name, loss before -> after, seconds left, memory."""

    def __init__(self, plan: Plan, recipe: Recipe):
        self.total = sum(stage.depth for stage in plan.stages)
        self.steps = max(recipe.steps, 1)
        self.started = time.perf_counter()
        self.done = 0
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=notices,
            transient=True,
        )
        self.task = self.progress.add_task("capturing inputs", total=self.total * self.steps, left="")

    def watcher(self) -> Watcher:
        """The callbacks for `quantize`."""
        return Watcher(captured=self._captured, step=self._step, block=self._block)

    def _captured(self, done: int, total: int) -> None:
        self.progress.update(self.task, description=f"capturing inputs {done}/{total}")

    def _step(self, block: str, step: int, total: int) -> None:
        position = self.done * self.steps + step
        elapsed = time.perf_counter() - self.started
        left = elapsed / max(position, 1) * (self.total * self.steps - position)
        self.progress.update(self.task, description=block, completed=position, left=f"{left:.0f} s left")

    def _block(self, report: BlockReport) -> None:
        self.done += 1
        self.progress.update(self.task, completed=self.done * self.steps)
        change = "rounded to nearest"
        if report.nearest is not None and report.end is not None:
            change = f"loss {report.nearest:.3e} -> {report.end:.3e}"
        self.progress.console.print(
            f"{report.name}: {report.weights} weights, {change}, {report.seconds:.1f} s, {report.peak_gb:.1f} GB",
            highlight=False,
        )


def quantize_with_progress(recipe: Recipe) -> int:
    """Load, plan, calibrate, tune, write; prints the folders."""
    quiet_libraries()
    started = time.perf_counter()
    loaded = jobs.load_model(recipe)
    job = jobs.prepare(recipe, loaded)
    console.print(summary(job.plan), highlight=False)
    bar = BlockProgress(job.plan, job.recipe)
    with bar.progress:
        folders = jobs.run(job, bar.watcher())
    if recipe.sample_generation:
        show_sample(job)
    memory = max(devices.peak_memory(loaded.model.device).values())
    for folder in folders:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        console.print(f"{folder}  {size / 1e6:,.1f} MB", highlight=False, soft_wrap=True)
    console.print(f"done in {time.perf_counter() - started:.1f} s, peak memory {memory:.1f} GB", highlight=False)
    return 0


def show_sample(job: jobs.Job) -> None:
    """What the quantized model, still in memory, answers to a sample of the recipe's data."""
    dataset = job.recipe.dataset
    inputs = job.inputs or (dataset and held_out(job.loaded, dataset, limit=1, template=job.recipe.template))
    if not inputs:
        console.print("no sample generation: the recipe names no dataset", highlight=False)
        return
    prompt, text = generate_sample(job.loaded, inputs)
    console.rule("sample generation")
    console.print(Text.assemble(prompt, (text, "bold")), soft_wrap=True)
    console.rule()


def summary(plan: Plan) -> str:
    """One line on what will be quantized."""
    kept = Counter(plan.kept.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in kept.most_common(3))
    stages = ", ".join(f"{stage.depth} {stage.name} blocks" for stage in plan.stages)
    return (
        f"{len(plan.quantized)} weights in {stages} at {plan.bits_per_weight():.2f} bits a weight; "
        f"{len(plan.kept)} stay{f' ({reasons})' if reasons else ''}"
    )


def show_plan(recipe: Recipe) -> int:
    """The plan as a table; equal rows of different blocks are shown once, with their count."""
    quiet_libraries()
    plan = jobs.make_plan(jobs.load_model(recipe).model, recipe)
    table = Table(Column("layer", overflow="fold"), "count", "shape", "becomes", title=recipe.model)
    rows: dict[tuple[str, str, str], int] = {}
    for weight in plan.weights:
        scheme = weight.scheme
        fate = f"stays: {weight.reason}"
        if scheme:
            group = "channel" if scheme.group_size == -1 else f"group {scheme.group_size}"
            fate = f"{scheme.bits} bits, {group}, {'symmetric' if scheme.sym else 'asymmetric'}"
        name = ".".join("*" if part.isdigit() else part for part in weight.name.split("."))
        key = (name, f"{weight.out_features} x {weight.in_features}", fate)
        rows[key] = rows.get(key, 0) + 1
    for (name, shape, fate), count in rows.items():
        table.add_row(name, str(count), shape, fate)
    console.print(table)
    console.print(summary(plan), highlight=False)
    console.print(f"formats: {', '.join(fmt.name for fmt in plan.formats)}", highlight=False)
    return 0


def evaluate_and_show(found: argparse.Namespace) -> int:
    """Measure and print a table or JSON."""
    quiet_libraries()
    device = devices.resolve(found.device)
    loaded = load_any(found.model, device=device, remote_code=found.trust_remote_code)
    reference = None
    if found.reference:
        reference = load_any(found.reference, device=device, remote_code=found.trust_remote_code)
    inputs = held_out(
        loaded, found.dataset, template=found.template, extra_data_dir=found.extra_data_dir, limit=found.limit
    )
    models = [loaded.model] if reference is None else [reference.model, loaded.model]
    with Progress(console=notices, transient=True) as bar:
        task = bar.add_task("measuring", total=len(inputs))
        results = measure(
            models, inputs, reference=reference and reference.model, on_sample=lambda i: bar.advance(task)
        )
    if found.json:
        print(json.dumps({"model": found.model, "reference": found.reference, **results[-1].as_dict()}, indent=1))
        return 0
    names = [found.model] if reference is None else [found.reference, found.model]
    console.print(metrics_table(dict(zip(names, results))))
    return 0


def metrics_table(results: Mapping[str, Metrics], title: str | None = None) -> Table:
    """A row a model: accuracy, perplexity, and KL and agreement by modality."""
    modalities = list(dict.fromkeys(name for metrics in results.values() for name in metrics.kl))
    columns = ["accuracy", "perplexity", *(f"KL {m}" for m in modalities), *(f"same top-1 {m}" for m in modalities)]
    table = Table("model", *columns, title=title)
    for name, metrics in results.items():
        cells = [percent(metrics.accuracy), "-" if metrics.perplexity is None else f"{metrics.perplexity:.3f}"]
        cells += [f"{metrics.kl.get(m, 0.0):.5f}" for m in modalities]
        cells += [percent(metrics.agreement.get(m)) for m in modalities]
        table.add_row(name, *cells)
    return table


def percent(share: float | None) -> str:
    """A share as people read it; a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"


def show_formats() -> int:
    """The export formats and what they hold."""
    table = Table("format", "bits", "what it is")
    for fmt in FORMATS.values():
        table.add_row(fmt.name, ", ".join(map(str, fmt.bits)), fmt.summary)
    console.print(table)
    return 0


def show_families() -> int:
    """The families with a table entry or a template; others are found by structure."""
    templates = shipped()
    table = Table("model_type", "family", "plain text calibrates", "template", "processor")
    for model_type, family in FAMILIES.items():
        template = templates.get(family.template or model_type, templates["default"])
        table.add_row(
            model_type, family.title, "yes" if family.text_only else "no", template.model_type, template.processor
        )
    console.print(table)
    console.print("Other families work by structure: their own chat template, blocks found in the module tree.")
    return 0


def rows_as_markdown(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table, for files."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)
