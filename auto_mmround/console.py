"""What the command line prints: progress, tables, JSON. Other modules do the work."""

import argparse
import shlex
import time
import webbrowser
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.progress import Progress
from rich.table import Column, Table
from rich.text import Text

from auto_mmround.errors import UserError
from auto_mmround.evaluate.evaluate import HowLoaded, evaluate, keep
from auto_mmround.evaluate.generation import generate_sample
from auto_mmround.evaluate.held_out import held_out
from auto_mmround.evaluate.metrics import Metrics
from auto_mmround.evaluate.prompts import Data
from auto_mmround.evaluate.tasks import Measured
from auto_mmround.model import devices
from auto_mmround.model.loading import Loaded, find_folder
from auto_mmround.next_step import first_question
from auto_mmround.printing import Telling, console, notices, quiet_libraries, show, show_json
from auto_mmround.progress import Events, RunProgress
from auto_mmround.publish import Place, push, repositories
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.report import card, report
from auto_mmround.results import plan_rows
from auto_mmround.run import job as jobs
from auto_mmround.run.estimate import Estimate, estimate
from auto_mmround.run.finished import compute_alike
from auto_mmround.run.out_of_memory import phase
from auto_mmround.run.places import check_before_loading, places
from auto_mmround.run.plan import Plan
from auto_mmround.run.processes import joined, launched
from auto_mmround.run.staying import Staying, cost_of_untying, staying
from auto_mmround.run.writing_cost import check_disk
from auto_mmround.verify.limits import refusals
from auto_mmround.verify.proof import prove
from auto_mmround.verify.side_files import check_source
from auto_mmround.verify.verify import verify


@phase("quantizing")
def quantize_with_progress(
    recipe: Recipe, telling: Telling | None = None, place: Place | None = None
) -> int:
    """Load, plan, calibrate, tune, write; prints the folders. place: of the Hub, gets them too."""
    quiet_libraries(telling)
    started = time.perf_counter()
    with joined(devices.resolve(recipe.device, launched().local_rank)) as processes:
        for one in (console, notices) if not processes.first else ():
            one.quiet = True
        if processes.first:
            check_before_loading(recipe)
            if recipe.check:
                check_source(find_folder(recipe.model))
        compute_alike(places(recipe)[0], recipe.restart, processes)
        events = Events(telling if processes.first else Telling(quiet=True))
        with events.told():
            events.at(f"loading {recipe.model}")
            loaded = jobs.load_model(recipe, processes=processes)
            events.at("planning, and reading samples")
            job = prepare_with_progress(recipe, loaded)
            refused = refusals(loaded.model, job.plan, recipe.read_by)
            for line in (
                summary(job.plan),
                *mixed_lines(job.mixed),
                *cost_of_untying(loaded, job.plan),
                *refused,
            ):
                if not events.telling.quiet:
                    console.print(line, soft_wrap=True)
            check_disk(job)
            bar = RunProgress(job.plan, job.recipe, events)
            with bar.progress:
                folders = jobs.run(job, bar.watcher(), processes, prove)
            if not processes.first:
                return 0
            bar.show_table()
            _show_folders(job, folders, events, started)
            for folder, repo in repositories(folders, place).items() if place else ():
                events.at(f"sending {folder.name} to {repo.repo}")
                console.print(push(folder, repo), soft_wrap=True)
    return 0


def _show_folders(job: jobs.Job, folders: Sequence[Path], events: Events, started: float) -> None:
    """What was written, the report, and what to do next."""
    if job.recipe.sample_generation:
        show_sample(job)
    memory = max(devices.peak_memory(job.loaded.model.device).values())
    for folder in folders:
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        report.write(folder)
        events.happened("written", folder=str(folder), bytes=size)
        console.print(f"{folder}  {size / 1e6:,.1f} MB", soft_wrap=True)
    seconds = time.perf_counter() - started
    events.happened("done", seconds=round(seconds, 1), peak_gb=round(memory, 2))
    if events.telling.quiet:
        return
    question = first_question(folders[0], job.recipe.trust_remote_code)
    for line in (
        f"report: {folders[0] / 'report.html'}",
        f"done in {report.duration(seconds)}, peak memory {memory:.1f} GB",
        f"ask it: {question}",
    ):
        console.print(line, soft_wrap=True)


def prepare_with_progress(recipe: Recipe, loaded: Loaded) -> jobs.Job:
    """`jobs.prepare`, with a bar while bits are chosen."""
    with Progress(console=notices, transient=True, disable=not notices.is_terminal) as bar:
        task = bar.add_task("measuring layers", visible=False)
        return jobs.prepare(
            recipe,
            loaded,
            on_measured=lambda done, total: bar.update(
                task, completed=done, total=total, visible=True
            ),
        )


def mixed_lines(mixed: Mapping[str, Any] | None) -> list[str]:
    """What the choice of bits expects; nothing if nothing was measured."""
    if mixed is None:
        return []
    counts = Counter(layer["bits"] for layer in mixed["layers"].values())
    chosen = ", ".join(f"{count} at {bits}" for bits, count in sorted(counts.items(), key=str))
    expected = {"mixed": mixed["expected"]} | {
        f"all {bits}": each for bits, each in mixed["uniform"].items()
    }
    expected |= {
        f"{name}, measured": mixed["measured"][name]
        for name in ("mixed", "line")
        if "measured" in mixed
    }
    figures = "; ".join(
        f"{name} " + " / ".join(f"{nats:.2g}" for nats in each) for name, each in expected.items()
    )
    return [
        f"mixed bits: {chosen}; expected nats a token before tuning, {' / '.join(mixed['sets'])}:"
        f" {figures}"
    ]


def show_sample(job: jobs.Job) -> None:
    """The answer of the quantized model, still in memory, to a sample of the recipe's data."""
    dataset = job.recipe.dataset
    inputs = job.inputs or (
        dataset and held_out(job.loaded, dataset, limit=1, template=job.recipe.template)
    )
    if job.loaded.streamed:
        console.print("no sample generation: the model was never in memory as a whole")
        return
    if not inputs:
        console.print("no sample generation: the recipe names no dataset")
        return
    prompt, text = generate_sample(job.loaded, inputs)
    console.print("sample generation:")
    console.print(Text.assemble(prompt, (text, "bold")), soft_wrap=True)


def summary(plan: Plan) -> str:
    """One line on what will be quantized."""
    kept = Counter(weight.reason for weight in plan.all if weight.reason)
    quantized = sum(1 for weight in plan.all if weight.scheme)
    reasons = ", ".join(f"{count} {reason}" for reason, count in kept.most_common(3))
    stages = ", ".join(f"{stage.depth} {stage.name} blocks" for stage in plan.stages)
    return (
        f"{quantized} weights in {stages} at {plan.bits_per_weight():.2f} bits a weight; "
        f"{kept.total()} stay{f' ({reasons})' if reasons else ''}"
    )


@phase("planning")
def show_plan(recipe: Recipe, telling: Telling | None = None, as_json: bool = False) -> int:
    """The plan as a table, or as JSON: what becomes of the weights, what stays, what it takes."""
    quiet_libraries(telling)
    loaded = jobs.load_model(recipe)
    # Mixed bits depend on the calibration samples; other plans do not.
    job = None if recipe.target_bits is None else prepare_with_progress(recipe, loaded)
    plan = job.plan if job else jobs.planned(recipe, loaded)
    stays, formats = staying(loaded, plan, recipe), [fmt.name for fmt in plan.formats]
    notes = mixed_lines(job.mixed if job else None)
    notes += cost_of_untying(loaded, plan)
    notes += refusals(loaded.model, plan, recipe.read_by)
    known = job is not None or not recipe.needs_samples or recipe.dataset is not None
    if as_json:
        costs = estimate(job or jobs.prepare(recipe, loaded)) if known else None
        keys = "layer", "count", "shape", "becomes"
        facts = {"model": recipe.model, "bits_per_weight": plan.bits_per_weight()}
        facts |= {"layers": [dict(zip(keys, row, strict=True)) for row in plan_rows(plan)]}
        facts |= {"stays": [row.as_dict() for row in stays], "formats": formats, "notes": notes}
        took = costs and asdict(costs) | {"fits": costs.fits}
        show_json(facts | {"estimate": took})
        return 0
    table = Table(Column("layer", overflow="fold"), "count", "shape", "becomes", title=recipe.model)
    for row in plan_rows(plan):
        table.add_row(*row)
    show(table)
    show(staying_table(stays))
    for line in (summary(plan), f"formats: {', '.join(formats)}", *notes):
        console.print(line, soft_wrap=True)
    if not known:
        console.print("name --dataset for an estimate of time and memory")
        return 0
    return show_estimate(estimate(job or jobs.prepare(recipe, loaded)))


def staying_table(stays: Sequence[Staying]) -> Table:
    """What stays in 16 bits, and what would shrink it."""
    table = Table("stays in 16 bits", Column("MB", justify="right"), "shrinks with")
    for row in stays:
        table.add_row(row.part, f"{row.nbytes / 1e6:,.1f}", row.flag or "-")
    table.add_row("all", f"{sum(row.nbytes for row in stays) / 1e6:,.1f}", "")
    return table


def show_estimate(costs: Estimate) -> int:
    """Minutes, memory and disk. Raises UserError with helpful flags if the run can't fit."""
    parts = ", ".join(f"{name} {seconds / 60:.1f}" for name, seconds in costs.seconds.items())
    console.print(f"time: {sum(costs.seconds.values()) / 60:.1f} minutes after loading ({parts})")
    if len(costs.presets) > 1:
        each = ", ".join(f"{name} {took / 60:.1f}" for name, took in costs.presets.items())
        console.print(f"minutes by preset: {each}")
    some, every = costs.used
    if 0 < some < every:
        console.print(f"samples: {some} of {every} pass the blocks; more are not needed")
    memory = f"{costs.memory / 1e9:.1f} GB at the peak, {costs.free_memory / 1e9:.1f} GB can be had"
    sizes = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in costs.sizes.items())
    console.print(f"memory: {memory}")
    console.print(f"disk: {sizes}; {costs.free_disk / 1e9:,.1f} GB are free")
    if not costs.fits:
        raise UserError(f"this run does not fit ({memory}); try {'; or '.join(costs.advice)}")
    return 0


@phase("evaluating", "use --device cpu, or a larger machine")
def evaluate_and_show(flags: argparse.Namespace) -> int:
    """Measure, keep the record beside a checkpoint of ours, and print tables or JSON."""
    quiet_libraries()
    folder = Path(flags.model)
    if flags.model_card and not (folder / "run.json").is_file():
        raise UserError(f"model_card: {folder} is not the result of one of our runs")
    if report.ours(folder):
        report.collect(folder)  # complains of records that the new one can't be kept beside
    data = Data(flags.dataset, flags.template, flags.extra_data_dir, flags.limit, flags.language)
    with Progress(console=notices, transient=True, disable=not notices.is_terminal) as bar:
        bars: dict[str, Any] = {}

        def progress(title: str, done: int, total: int) -> None:
            if title not in bars:
                bars[title] = bar.add_task(title, total=total)
            bar.update(bars[title], completed=done)

        findings, record = evaluate(
            flags.model,
            data,
            reference=flags.reference,
            baseline=flags.baseline,
            names=flags.tasks,
            way=HowLoaded(flags.device, flags.trust_remote_code, flags.stream, flags.model_dtype),
            progress=progress,
        )
    record["command"] = shlex.join(["auto-round-mllm", "eval", *flags.words])
    if flags.json:
        flat = findings.figures["quantized"].as_dict() if findings.figures else {}
        show_json(flat | record)
    else:
        show_measured(findings, record)
    # what was measured is told even if it can't be kept
    page = keep(folder, record)
    card_file = card.write(folder) if flags.model_card else None
    for path in filter(None, (page, card_file)):
        if not flags.json:
            console.print(str(path), soft_wrap=True)
    return 0


def show_measured(findings: Measured, record: Mapping[str, Any]) -> None:
    """Tables of what was measured: figures by modality, scores with recovery, answers side by
    side."""
    roles = [role for role in ("reference", "baseline") if record[role]] + ["quantized"]
    if findings.figures:
        names = roles if len(roles) > 1 else [str(record["model"])]
        show(metrics_table({name: findings.figures[role] for name, role in zip(names, roles)}))
    if findings.scores:
        titles = roles if len(roles) > 1 else ["score"]
        table = Table(
            "benchmark",
            "split",
            *(Column(title, justify="right") for title in titles),
            "recovery (%)",
        )
        for score in findings.scores:
            values = [getattr(score, role) for role in roles]
            cells = ["-" if value is None else f"{value:.4f}" for value in values]
            left = "-" if score.recovery is None else f"{score.recovery:.2f}"
            table.add_row(f"{score.benchmark} ({score.metric})", score.split, *cells, left)
        show(table)
    for sample in findings.samples:
        console.print(f"\n{sample['question']}")
        lines = {
            "expected": sample["expected"],
            **{role: sample["answers"][role] for role in roles},
        }
        for title, text in lines.items():
            if text is not None:
                console.print(f"  {title:<10} {text}")


def show_report(folders: Sequence[str], output: str | None, opened: bool = False) -> int:
    """Write a run's report again, or a comparison of several runs, and name the page. opened: in
    the browser too."""
    quiet_libraries()
    if output is not None and not output.strip():
        raise UserError("output is empty: name a file for the page, such as report.html")
    if len(folders) == 1 and output is None:
        page = report.write(Path(folders[0]))
    else:
        page = report.compare([Path(folder) for folder in folders], Path(output or "report.html"))
    console.print(str(page), soft_wrap=True)
    if opened and not webbrowser.open(page.resolve().as_uri()):
        raise UserError(f"no browser could be started here: open {page} yourself")
    return 0


@phase("verifying", "use a larger machine")
def verify_and_show(flags: argparse.Namespace) -> int:
    """The findings on a folder and one line per engine, or JSON; 1 if something is wrong."""
    quiet_libraries()
    engines: list[str] | None = None
    if flags.engine is not None:
        engines = [name.strip() for name in flags.engine.split(",") if name.strip()]
    result = verify(
        flags.folder,
        [] if engines == ["none"] else engines,
        source=flags.source,
        remote_code=flags.trust_remote_code,
        timeout=flags.timeout,
        stream=flags.stream,
    )
    if flags.json:
        show_json(result.as_dict())
    else:
        errors = sum(finding.severity == "error" for finding in result.findings)
        lines = [finding.line() for finding in result.findings]
        mark = "WRONG" if errors else "right"
        lines.append(f"{mark} {flags.folder.name}: files, format {result.format}, {errors} errors")
        for line in [*lines, *(verdict.line() for verdict in result.verdicts), *result.notes]:
            console.print(line, soft_wrap=True)
    if result.verdicts and report.ours(flags.folder):
        report.keep_verdicts(flags.folder, [asdict(verdict) for verdict in result.verdicts])
        report.write(flags.folder)
    return 0 if result.right else 1


def metrics_table(results: Mapping[str, Metrics], title: str | None = None) -> Table:
    """One row per model: accuracy, perplexity, and KL and agreement by modality."""
    modalities = list(dict.fromkeys(name for metrics in results.values() for name in metrics.kl))
    columns = [
        "accuracy",
        "perplexity",
        *(f"KL {m}" for m in modalities),
        *(f"same top-1 {m}" for m in modalities),
    ]
    table = Table("model", *columns, title=title)
    for name, metrics in results.items():
        cells = [
            percent(metrics.accuracy),
            "-" if metrics.perplexity is None else f"{metrics.perplexity:.3f}",
        ]
        cells += [f"{metrics.kl.get(m, 0.0):.5f}" for m in modalities]
        cells += [percent(metrics.agreement.get(m)) for m in modalities]
        table.add_row(name, *cells)
    return table


def percent(share: float | None) -> str:
    """A share in percent; a dash if there is none."""
    return "-" if share is None else f"{100 * share:.1f} %"
