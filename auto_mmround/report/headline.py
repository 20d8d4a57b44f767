"""The answer that a report opens with: size, damage and verdicts, in words."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from auto_mmround.report.sizes import size

# Nats a token up to which the damage has a name.
WORDS = ((0.001, "hardly any"), (0.01, "little"), (0.1, "some"), (float("inf"), "much"))


def damage_word(kl: float) -> str:
    """How much a KL is, in a word or two."""
    return next(word for most, word in WORDS if kl <= most)


def headline(report: Mapping[str, Any], figures: Mapping[str, Any]) -> list[str]:
    """Sentences for the first screen, as far as things are known. figures: by role."""
    sizes = report["sizes"]
    sentences = []
    if sizes.get("source"):
        share = 100 * sizes["weights"] / sizes["source"]
        before, after = size(sizes["source"]), size(sizes["weights"])
        sentences.append(f"The weights shrank from {before} to {after}: {share:.0f} %.")
    kls = (figures.get("quantized") or {}).get("kl") or {}
    told = [
        f"{damage_word(kl)} on {modality} ({kl:.2g})"
        for modality, kl in kls.items()
        if kl is not None
    ]
    if told:
        sentences.append(f"Damage, as KL in nats a token: {', '.join(told)}.")
    else:
        sentences.append("Damage is not measured yet: `auto-round-mllm eval` does that.")
    if report.get("checked"):
        sentences.append("The files were read back: they hold what was tuned.")
    rows = report["verify"]
    wrong = [row for row in rows if row["status"] == "wrong"]
    right = [row["engine"] for row in rows if row["status"] == "right"]
    sentences += [f"WRONG by {row['engine']}: {row['reason']}." for row in wrong]
    if right:
        sentences.append(f"Proved right by {', '.join(right)}.")
    elif not wrong:
        sentences.append("No engine was asked yet: `auto-round-mllm verify` does that.")
    return sentences


def spoken(text: str) -> Markup:
    """A line for a page: what stands in backquotes is code."""
    return Markup(re.sub(r"`([^`]*)`", r"<code>\1</code>", str(escape(text))))


def trade(
    reports: Sequence[Mapping[str, Any]], letters: Sequence[str], against: str
) -> dict[str, tuple[int, float, float, str]]:
    """Points for `charts.scatter`: the largest KL of each run that was measured against its "size"
    in MB or its "time" in seconds; empty for fewer than two runs."""
    points = {}
    for i, (letter, report) in enumerate(zip(letters, reports)):
        figures = ((report["evaluation"] or {}).get("figures") or {}).get("quantized", {})
        kls = [kl for kl in figures.get("kl", {}).values() if kl is not None]
        across = report["sizes"]["weights"] / 1e6 if against == "size" else report["seconds"]
        if kls and across is not None:
            words = f"{across:,.1f} {'MB' if against == 'size' else 's'}"
            points[letter] = (i, float(across), max(kls), words)
    return points if len(points) > 1 else {}


def differing_first(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Samples with answers; those whose answers differ from the reference's come first."""

    def same(sample: Mapping[str, Any]) -> bool:
        answers = sample["answers"]
        return answers.get("reference") in (None, answers.get("quantized"))

    return sorted(samples, key=same)
