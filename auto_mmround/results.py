"""What the API's methods give back: plain values, with a table of them for notebooks and prints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from auto_mmround.evaluate.metrics import Metrics
from auto_mmround.evaluate.scoring import Score
from auto_mmround.recipe.patterns import starred
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run.plan import Plan
from auto_mmround.verify.verify import Verification


@dataclass(frozen=True)
class Listing:
    """A table: its title, the names of its columns, its rows, and lines below it."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def __str__(self) -> str:
        table = [self.head, *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(self.head))]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table]
        return "\n".join([self.title, *lines, *self.notes])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(cell)}</th>" for cell in self.head)
        body = "".join(
            f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in self.rows
        )
        notes = "".join(f"<p>{escape(note)}</p>" for note in self.notes)
        caption = f"<caption>{escape(self.title)}</caption>"
        return f"<table>{caption}<tr>{head}</tr>{body}</table>{notes}"


@dataclass(frozen=True)
class Shown:
    """Something with a table of itself."""

    rows: Listing = field(repr=False)

    def __str__(self) -> str:
        return str(self.rows)

    def _repr_html_(self) -> str:
        return self.rows._repr_html_()


@dataclass(frozen=True)
class Planned(Shown):
    """What becomes of every weight. bits_per_weight: with scales and zero points."""

    plan: Plan = field(repr=False)
    bits_per_weight: float


@dataclass(frozen=True)
class Evaluated(Shown):
    """figures: by model ("quantized", and "reference" where there is one). scores: lines of tasks.
    record: all of it as plain values."""

    figures: Mapping[str, Metrics]
    scores: Sequence[Score]
    record: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Verified(Shown):
    """right: of every folder. verifications: one a folder."""

    right: bool
    verifications: Sequence[Verification] = field(repr=False)


@dataclass(frozen=True)
class Page:
    """A report: a page without network or scripts, which a notebook shows in a frame."""

    path: Path

    def _repr_html_(self) -> str:
        page = escape(self.path.read_text(encoding="utf-8"), quote=True)
        return f'<iframe srcdoc="{page}" style="width: 100%; height: 40em; border: 0"></iframe>'


def _told(scheme: Scheme) -> str:
    """A scheme in words."""
    group = {-1: "channel", 0: "tensor"}.get(scheme.group_size, f"group {scheme.group_size}")
    symmetry = "symmetric" if scheme.sym else "asymmetric"
    values = symmetry if scheme.data_type == "int" else scheme.data_type
    fate = f"{scheme.bits} bits, {group}, {values}"
    data_type, bits, _ = scheme.inputs
    return f"{fate}, inputs {data_type} of {bits} bits" if scheme.act_bits < 16 else fate


def plan_rows(plan: Plan) -> list[tuple[str, str, str, str]]:
    """(layer, count, shape, what it becomes). Equal rows of different blocks are one."""
    rows: dict[tuple[str, str, str], int] = {}
    for weight in plan.all:
        scheme = weight.scheme
        fate = _told(scheme) if scheme else f"stays: {weight.reason}"
        key = (starred(weight.name), f"{weight.out_features} x {weight.in_features}", fate)
        rows[key] = rows.get(key, 0) + 1
    return [(name, str(count), shape, fate) for (name, shape, fate), count in rows.items()]


def planned(plan: Plan, title: str) -> Planned:
    """The result of `AutoRoundMLLM.plan`."""
    bits = plan.bits_per_weight()
    rows = Listing(title, ("layer", "count", "shape", "becomes"), plan_rows(plan),
                (f"{bits:.2f} bits a weight",))  # fmt: skip
    return Planned(rows, plan, bits)


def evaluated(
    figures: Mapping[str, Metrics], scores: Sequence[Score], record: Mapping[str, Any]
) -> Evaluated:
    """The result of `AutoRoundMLLM.evaluate`."""
    modalities = dict.fromkeys(modality for metrics in figures.values() for modality in metrics.kl)
    head = ("model", "accuracy", "perplexity", *(f"KL {modality}" for modality in modalities))
    rows = [
        (
            name,
            "-" if metrics.accuracy is None else f"{100 * metrics.accuracy:.1f} %",
            "-" if metrics.perplexity is None else f"{metrics.perplexity:.3f}",
            *(f"{metrics.kl.get(modality, 0.0):.5f}" for modality in modalities),
        )
        for name, metrics in figures.items()
    ]
    notes = [f"{each.benchmark} ({each.metric}): {each.quantized:.4f}" for each in scores]
    return Evaluated(Listing("measured", head, rows, notes), figures, scores, record)


def verified(results: Sequence[Verification]) -> Verified:
    """The result of `AutoRoundMLLM.verify`."""
    rows = []
    for each in results:
        errors = [finding.line() for finding in each.findings if finding.severity == "error"]
        told = errors[0] if errors else f"format {each.format}"
        rows.append((each.folder.name, "files", "WRONG" if errors else "right", told))
        rows += [
            (each.folder.name, v.engine, v.status, v.reason or v.line()) for v in each.verdicts
        ]
    right = all(each.right for each in results)
    return Verified(Listing("verified", ("folder", "by", "verdict", "why"), rows), right, results)
