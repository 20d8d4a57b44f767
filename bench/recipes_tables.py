"""The Markdown tables of bench/recipes.py."""

from typing import Any

import kept
import whisper
from recipes_cases import THEIRS
from whisper import FULL


def cell(value: float | None, form: str) -> str:
    """A cell; empty for nothing."""
    return "" if value is None else f"{value:{form}}"


def text_cells(found: dict[str, Any], full: dict[str, Any]) -> list[str]:
    """Cells of a text model's table. Recovery is the share of full precision's accuracy that is
    left."""
    recovered = [
        f"{100 * found[key]:.2f} ({100 * found[key] / full[key]:.2f} %)" if full.get(key) else ""
        for key in ("next_token", "accuracy")
    ]
    kl = (cell(found["kl"].get(kind), ".5f") for kind in ("text", "image"))
    return [*kl, cell(found["perplexity"], ".3f"), *recovered]


def costs(found: dict[str, Any]) -> list[str]:
    """Cells of time and memory."""
    forms = (("seconds", ".0f"), ("cpu_seconds", ".1f"), ("peak_gb", ".2f"))
    return [cell(found.get(key), form) for key, form in forms]


def tables(found: dict[tuple[str, str, str], dict[str, Any]]) -> str:
    """Markdown tables of all results, one a model."""
    text = []
    for case in [case for case, _, method in found if method == FULL]:
        full = found[case, "-", FULL]
        if case == "whisper":
            voices = (f"WER {voice}" for voice in full["voices"])
            columns = [*voices, "WER", "against full precision", f"against {THEIRS}", "KL"]
        else:
            columns = ["KL text", "KL image", "perplexity", "next token right", "answers right"]
        lines = kept.head(["weights", "method", *columns, "seconds", "CPU seconds", "peak GB"])
        for scheme, method in [key[1:] for key in found if key[0] == case]:
            result, theirs = found[case, scheme, method], found.get((case, scheme, THEIRS))
            cells = (
                whisper.judged(result, (full, theirs))
                if case == "whisper"
                else text_cells(result, full)
            )
            lines.append(kept.line([scheme, method, *cells, *costs(result)]))
        text.append(f"## {case}\n\n" + "\n".join(lines))
    return "\n\n".join(text)
