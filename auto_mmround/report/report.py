"""The report of a run, as `report.json` and one `report.html`.

It reads the folder alone: `recipe.toml`, `run.json`, weights, `eval.json`, `verify.json`.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from auto_mmround import strict
from auto_mmround.errors import UserError
from auto_mmround.recipe.files import read
from auto_mmround.recipe.patterns import starred
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.report import charts
from auto_mmround.report.headline import differing_first, headline, spoken, trade
from auto_mmround.report.records import dumped, of_our_form, put, read_record, well_formed
from auto_mmround.report.sizes import size, sizes

EVALUATION, VERDICTS = "eval.json", "verify.json"
ERRORS = ("nearest", "start", "end")
VERDICT = ("engine", "version", "status", "reason", "layers", "planned", "gap")
WORST = 10


def ours(folder: Path) -> bool:
    """Whether a folder is a writable result of a run of ours."""
    return (
        (folder / "run.json").is_file()
        and (folder / "recipe.toml").is_file()
        and os.access(folder, os.W_OK)
    )


@well_formed
def collect(folder: Path) -> dict[str, Any]:
    """The content of the report, as plain values. Raises UserError if the folder is no output of
    ours."""
    if not (folder / "run.json").is_file() or not (folder / "recipe.toml").is_file():
        raise UserError(
            f"{folder} has no run.json and recipe.toml: it is not the result of one of our runs"
        )
    run, recipe = read_record(folder / "run.json"), read(folder / "recipe.toml")
    measured = run.get("measured", {})
    blocks = [block | measured.get("blocks", {}).get(block["name"], {}) for block in run["blocks"]]
    tuned = [block for block in blocks if _measured(block)]
    return {
        "name": folder.resolve().name,
        "version": run["auto_mmround"],
        "recipe": recipe,
        "chosen": _chosen(recipe),
        "scheme": scheme_label(recipe),
        "numbers": number_label(recipe),
        "model": Path(str(recipe["model"]).rstrip("/")).name,
        "notes": run["notes"],
        "plan": {
            "quantized": run["quantized"],
            "kept": _kept(run["kept"]),
            "bits_per_weight": run["bits_per_weight"],
            "stages": dict(Counter(block["stage"] for block in blocks)),
        },
        "sizes": sizes(folder, str(recipe["model"])),
        "machine": measured.get("machine", {}),
        "seconds": measured.get("seconds"),
        "peak_gb": measured.get("peak_gb"),
        "blocks": blocks,
        "damage": {key: sum(block[key] for block in tuned) for key in ERRORS} if tuned else None,
        "worst_layers": _worst_layers(blocks),
        "mixed": _mixed(run),
        "worst": sorted(tuned, key=lambda block: -block["end"])[:WORST],
        "calibration": run["calibration"],
        "checked": run.get("checked", False),
        "verify": _verdicts(folder / VERDICTS),
        "evaluation": evaluation(folder),
    }


def _measured(row: Mapping[str, Any]) -> bool:
    """Whether a block or a layer has its errors; null stands for one that was not finite."""
    return all(row.get(key) is not None for key in ERRORS)


def _worst_layers(blocks: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The layers whose own output loses most."""
    layers = [
        {"name": name, **errors}
        for block in blocks
        for name, errors in block.get("layers", {}).items()
        if _measured(errors)
    ]
    return sorted(layers, key=lambda layer: -layer["end"])[:WORST]


def _mixed(run: Mapping[str, Any]) -> dict[str, Any] | None:
    """Where bits differ: the number of weights by bits, and each kind of layer's bits block by
    block; places: the numbers in the layers' names, "3" or "3.0" (of an expert)."""
    bits = {name: layer["bits"] for name, layer in run.get("codes", {}).items() if "bits" in layer}
    if len(set(bits.values())) < 2:
        return None
    rows: dict[str, list[int]] = {}
    places: dict[str, list[str]] = {}
    for name in sorted(
        bits, key=lambda name: [int(part) if part.isdigit() else -1 for part in name.split(".")]
    ):
        template = starred(name)
        rows.setdefault(template, []).append(bits[name])
        places.setdefault(template, []).append(".".join(filter(str.isdigit, name.split("."))))
    expected = run.get("mixed")
    shares = {"mixed": expected["expected"]} | expected["uniform"] if expected else {}
    return {
        "counts": dict(sorted(Counter(bits.values()).items())),
        "rows": rows,
        "places": places,
        "sets": expected["sets"] if expected else [],
        "expected": shares,
        "measured": expected.get("measured", {}) if expected else {},
    }


def scheme_label(recipe: Mapping[str, Any]) -> str:
    """`W4A16`, or the name of a float grid, as in model cards; several where layers differ."""
    layers = _layers(recipe)
    if any("scheme" in each for each in layers):
        return "+".join(
            sorted({str(each.get("scheme", f"W{each.get('bits')}")) for each in layers})
        )
    if recipe.get("data_type", "int") != "int":
        return str(recipe["data_type"]).upper()
    bits = recipe.get("target_bits") or recipe.get("bits", 4)
    inputs = str(recipe.get("act_data_type") or "").upper()
    return f"W{bits:g}A{inputs or min(int(recipe.get('act_bits', 16)), 16)}"


def number_label(recipe: Mapping[str, Any]) -> str:
    """`INT4`, `FP8`: the number format of a weight."""
    if recipe.get("data_type", "int") != "int" or any("scheme" in e for e in _layers(recipe)):
        return scheme_label(recipe)
    return f"INT{recipe.get('target_bits') or recipe.get('bits', 4)}"


def _layers(recipe: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What `layer_config` says of layers that are quantized."""
    every = (recipe.get("layer_config") or {}).values()
    return [each for each in every if "scheme" in each or each.get("bits", 16) < 16]


@well_formed
def keep_verdicts(folder: Path, verdicts: Sequence[Mapping[str, Any]]) -> None:
    """Store the verdicts of `verify`: engine, version, status, reason, layers, planned, gap.

    The newest verdict of an engine counts. A verdict that did not run replaces no other.
    """
    kept = {row["engine"]: row for row in _verdicts(folder / VERDICTS)}
    for verdict in verdicts:
        if verdict["status"] != "not run" or verdict["engine"] not in kept:
            kept[verdict["engine"]] = {key: strict.finite(verdict.get(key)) for key in VERDICT}
    put(folder / VERDICTS, dumped({"verdicts": list(kept.values())}))


@well_formed
def keep_evaluation(folder: Path, record: Mapping[str, Any]) -> None:
    """Add an evaluation to the folder's record. It replaces an older one of the same question."""
    path = folder / EVALUATION
    old = read_record(path)["evaluations"] if path.is_file() else []
    key = ("reference", "baseline", "model_dtype", "dataset", "limit", "language", "tasks")
    kept = [each for each in old if any(each.get(name) != record.get(name) for name in key)]
    put(path, dumped({"evaluations": [*kept, record]}))


def evaluation(folder: Path) -> dict[str, Any] | None:
    """All evaluations of a folder as one: the newest value of each figure counts."""
    if not (folder / EVALUATION).is_file():
        return None
    scores: dict[tuple[str, str, str], dict[str, Any]] = {}
    figures: dict[str, Any] = {}
    for record in read_record(folder / EVALUATION)["evaluations"]:
        scores |= {
            (score["benchmark"], score["split"], score["metric"]): score
            for score in record["scores"]
        }
        facts = {
            key: value
            for key, value in record.items()
            if key not in ("scores", "figures", "samples")
        }
        figures |= {key: record[key] for key in ("figures", "samples") if record.get(key)} | facts
        if record.get("figures"):
            figures["measured_on"] = record["dataset"]
    return figures | {"scores": list(scores.values())}


@well_formed
def write(folder: Path) -> Path:
    """Write `report.json` and `report.html` of a run into its folder; returns the page."""
    report = collect(folder)
    put(folder / "report.json", dumped(report))
    page = folder / "report.html"
    put(page, environment().get_template("report.html").render(view(report), charts=charts))
    return page


def compare(folders: Sequence[Path], page: Path) -> Path:
    """One page with several runs side by side, as A, B, ..; returns its path."""
    reports = [collect(folder) for folder in folders]
    names = ["/".join(folder.resolve().parts[-2:]) for folder in folders]
    letters = [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(folders))]
    with of_our_form(", ".join(names)):
        template = environment().get_template("compare.html")
        page.parent.mkdir(parents=True, exist_ok=True)
        runs = list(zip(letters, names, reports))
        text = template.render(
            runs=runs,
            letters=letters,
            rows=_compared(reports),
            trades={what: trade(reports, letters, what) for what in ("size", "time")},
            stages=_lines(letters, reports),
            charts=charts,
        )
    put(page, text)
    return page


def environment() -> Environment:
    """The page templates, with their filters."""
    made = Environment(
        loader=PackageLoader("auto_mmround.report", "pages"),
        autoescape=lambda name: name is not None and name.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters |= {
        fn.__name__: fn for fn in (charts.figure, size, percent, duration, short_name, spoken)
    } | {"zip": zip}
    return made


def view(report: dict[str, Any]) -> dict[str, Any]:
    """The values that the templates need beside the report."""
    evaluated = report["evaluation"] or {}
    return {
        "report": report,
        "stages": _tuned(report["blocks"]),
        "labels": [_axis_label(block, len(report["plan"]["stages"])) for block in report["blocks"]],
        "figures": evaluated.get("figures", {}),
        "scores": evaluated.get("scores", []),
        "samples": differing_first(evaluated.get("samples", [])),
        "answer": headline(report, evaluated.get("figures", {})),
        "roles": [
            role for role in ("reference", "baseline", "quantized") if role in _roles(evaluated)
        ],
        "width": evaluated.get("reference_dtype") or "reference",
    }


def _roles(evaluated: Mapping[str, Any]) -> set[str]:
    scored = {
        role
        for score in evaluated.get("scores", [])
        for role in ("reference", "baseline")
        if score[role] is not None
    }
    answered = {role for sample in evaluated.get("samples", []) for role in sample["answers"]}
    return {"quantized", *scored, *answered, *evaluated.get("figures", {})}


def _axis_label(block: Mapping[str, Any], stages: int) -> str:
    number = short_name(block["name"])
    return f"{block['stage']} {number}" if stages > 1 else number


def short_name(block: str) -> str:
    """A block's number in its list, for axes. Other names stay whole."""
    head, _, number = block.rpartition(".")
    return number if head and number.isdigit() else block


def _chosen(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that differ from the defaults."""
    usual = asdict(Recipe())
    return {key: value for key, value in recipe.items() if key not in usual or usual[key] != value}


def _kept(kept: Mapping[str, str]) -> list[dict[str, Any]]:
    """Reason -> number of weights, and their names with a star for block numbers."""
    names_of: dict[str, list[str]] = {}
    for name, reason in kept.items():
        names_of.setdefault(reason, []).append(starred(name))
    return [
        {"reason": reason, "count": len(names), "names": list(dict.fromkeys(names))}
        for reason, names in names_of.items()
    ]


def _verdicts(path: Path) -> list[dict[str, Any]]:
    """The findings of `verify`, one row per engine."""
    if not path.is_file():
        return []
    return [{key: row.get(key) for key in VERDICT} for row in read_record(path)["verdicts"]]


def _compared(reports: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any], str]]:
    """(title, one value per run, how it is written) of every line of the comparison, without
    empty lines."""
    rows: list[tuple[str, list[Any], str]] = [
        ("model", [report["model"] for report in reports], "text"),
        ("scheme", [report["scheme"] for report in reports], "text"),
        ("group size", [report["recipe"].get("group_size") for report in reports], "text"),
        ("algorithm", [_algorithm(report["recipe"]) for report in reports], "text"),
        ("bits a weight", [report["plan"]["bits_per_weight"] for report in reports], "figure"),
        ("size of the weights", [report["sizes"]["weights"] for report in reports], "size"),
        ("time", [report["seconds"] for report in reports], "duration"),
        ("peak memory, GB", [report["peak_gb"] for report in reports], "figure"),
    ]
    figures = [
        ((report["evaluation"] or {}).get("figures") or {}).get("quantized", {})
        for report in reports
    ]
    rows += [
        (f"KL, {modality}", [each.get("kl", {}).get(modality) for each in figures], "figure")
        for modality in dict.fromkeys(name for each in figures for name in each.get("kl", {}))
    ]
    scores = [
        {_label(s): s for s in (report["evaluation"] or {}).get("scores", [])} for report in reports
    ]
    for label in dict.fromkeys(label for each in scores for label in each):
        rows.append((label, [each.get(label, {}).get("quantized") for each in scores], "figure"))
        left = [each.get(label, {}).get("recovery") for each in scores]
        rows.append(("recovery, %", left, "recovery"))
    return [row for row in rows if any(value is not None for value in row[1])]


def _algorithm(recipe: Mapping[str, Any]) -> str:
    return "rtn" if recipe.get("iters") == 0 else str(recipe.get("algorithm"))


def _label(score: Mapping[str, Any]) -> str:
    return f"{score['benchmark']} {score['split']} ({score['metric']})".replace("  ", " ")


def _lines(
    letters: Sequence[str], reports: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Stage -> end errors of its blocks, for every run with the same number of blocks there."""
    lines: dict[str, dict[str, Any]] = {}
    for i, report in enumerate(reports):
        for stage, blocks in _tuned(report["blocks"]).items():
            names = [short_name(block["name"]) for block in blocks]
            entry = lines.setdefault(stage, {"labels": names, "series": {}})
            if len(entry["labels"]) == len(names):
                entry["series"][letters[i]] = (i, [block["end"] for block in blocks])
    return lines


def _tuned(blocks: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Stage -> its blocks that have an error."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for block in blocks:
        if _measured(block):
            stages.setdefault(block["stage"], []).append(block)
    return stages


def percent(value: float | None, places: int = 2) -> str:
    """A figure that is already in percent."""
    return "–" if value is None else f"{value:.{places}f} %"


def duration(seconds: float | None) -> str:
    """Seconds in a unit that fits."""
    if seconds is None:
        return "–"
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"
