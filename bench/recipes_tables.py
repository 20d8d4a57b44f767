"""The Markdown tables of bench/recipes.py."""

from typing import Any

import whisper
from recipes_cases import THEIRS
from whisper import FULL


def cell(value: float | None, form: str) -> str:
    """A cell; empty for nothing."""
    return "" if value is None else f"{value:{form}}"


def text_row(title: str, found: dict[str, Any], full: dict[str, Any]) -> str:
    """One line of a text model's table. Recovery is the share of full precision's accuracy that is
    left."""
    recovered = [
        f"{100 * found[key]:.2f} ({100 * found[key] / full[key]:.2f} %)" if full.get(key) else ""
        for key in ("next_token", "accuracy")
    ]
    cells = [title, *(cell(found["kl"].get(kind), ".5f") for kind in ("text", "image")),
             cell(found["perplexity"], ".3f"), *recovered, *costs(found)]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def costs(found: dict[str, Any]) -> list[str]:
    """Cells of time and memory."""
    forms = (("seconds", ".0f"), ("cpu_seconds", ".1f"), ("peak_gb", ".2f"))
    return [cell(found.get(key), form) for key, form in forms]


def speech_row(
    title: str, found: dict[str, Any], full: dict[str, Any], card: dict[str, Any] | None
) -> str:
    """One line of Whisper's table; ``card``: the released recipe by llm-compressor at the same
    bits."""
    voices = list(found["voices"].values())
    kl = [value for voice in voices for value in voice["kl"]]
    cells = [
        title,
        *(f"{whisper.rate([voice]):.2f}" for voice in voices),
        f"{whisper.rate(voices):.2f}",
    ]
    for other in (full, card):
        same = other is None or other is found
        cells.append("" if same else "{:+.2f} to {:+.2f}".format(*whisper.interval(other, found)))
    return f"| {' | '.join([*cells, f'{sum(kl) / len(kl):.5f}', *costs(found)])} |"


def tables(found: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """Markdown tables of all results, one a model."""
    text = []
    for case in [case for case, _, method in found if method == FULL]:
        full = found[case, "-", FULL]
        time_columns = ["seconds", "CPU seconds", "peak GB"]
        if case == "whisper":
            columns = [*(f"WER {voice}" for voice in full["voices"]), "WER",
                "against full precision",
                       "against llm-compressor", "KL"]  # fmt: skip
        else:
            columns = ["KL text", "KL image", "perplexity", "next token right", "answers right"]
        columns = ["weights", "method", *columns, *time_columns]
        lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        for (model, scheme, method), result in found.items():
            if model == case:
                title = f"{scheme} | {method}"
                card = found.get((case, scheme, THEIRS))
                lines.append(
                    speech_row(title, result, full, card)
                    if case == "whisper"
                    else text_row(title, result, full)
                )
        text.append(f"## {case}\n\n" + "\n".join(lines))
    return "\n\n".join(text)
