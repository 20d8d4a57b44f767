#!/usr/bin/env python3
"""Draws the figures of docs/ as SVG from the tables in bench/results/; a test holds them against
each other.

    python scripts/docs_figures.py

Figures follow the reader's light or dark scheme, and hold text, not paths: small, and searchable.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS, FIGURES = ROOT / "bench" / "results", ROOT / "docs" / "figures"
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 64, 24, 20, 52
STYLE = """\
text{font:13px system-ui,sans-serif;fill:#333}.soft{fill:#777}.grid{stroke:#ddd}
.ours{fill:#00897b}.other{fill:#b26a00}
.path{stroke:#00897b;fill:none;stroke-width:1.5;stroke-dasharray:4 3}
@media(prefers-color-scheme:dark){text{fill:#ddd}.soft{fill:#999}.grid{stroke:#444}.ours{fill:#4db6ac}.other{fill:#ffb74d}
.path{stroke:#4db6ac}}"""


def table(name: str) -> list[list[str]]:
    """The rows of the first table of a results file, without its head."""
    lines = (RESULTS / name).read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    return rows[2:]


def svg(title: str, description: str, body: Sequence[str], height: float = HEIGHT) -> str:
    """A complete file; the description is for those who don't see it."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">'
    parts = [
        head,
        f"<title>{title}</title><desc>{description}</desc><style>{STYLE}</style>",
        *body,
        "</svg>",
        "",
    ]
    return "\n".join(parts)


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "") -> str:
    chosen = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{chosen}>{words}</text>'


def axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """A value's place between two pixels."""
    return lambda value: start + (value - low) / (high - low) * (end - start)


def time_and_damage() -> str:
    """KL against seconds: every method of the tuner's two results, Gemma 3 270M at 3 bits."""
    points = [
        (row[1], float(row[2]), float(row[5]))
        for name in ("tuner-2026-11-22-presets.md", "tuner-2026-11-22.md")
        for row in table(name)
        if row[0] == "W3g128"
        and (row[1] == "auto-round" if name == "tuner-2026-11-22.md" else row[1] != "rtn")
    ]
    x, y = axis(0, 650, LEFT, WIDTH - RIGHT), axis(0, 0.6, HEIGHT - BOTTOM, TOP)
    body = []
    for tick in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        body.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}"'
            f' y2="{y(tick):.1f}"/>'
        )
        body.append(text(LEFT - 8, y(tick) + 4, f"{tick:.1f}", "end", "soft"))
    body += [
        text(x(tick), HEIGHT - BOTTOM + 20, f"{tick}", "middle", "soft")
        for tick in range(0, 601, 100)
    ]
    body.append(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, "seconds on two cores", "middle"))
    body.append(text(LEFT, TOP - 6, "KL to the full model, held-out text", kind="soft"))
    ours = sorted((seconds, kl) for name, seconds, kl in points if name != "auto-round")
    body.append(
        f'<polyline class="path" points="{" ".join(f"{x(s):.1f},{y(k):.1f}" for s, k in ours)}"/>'
    )
    for i, (name, seconds, kl) in enumerate(points):
        kind = "other" if name == "auto-round" else "ours"
        body.append(f'<circle class="{kind}" cx="{x(seconds):.1f}" cy="{y(kl):.1f}" r="5"/>')
        label = f"{name.replace('auto-round', 'auto-round 0.16.1, 200 steps')} {kl:.3f}"
        left = seconds > 500
        below = 20 if i and i % 2 == 0 else -9  # neighbours' labels keep apart
        body.append(
            text(x(seconds) + (-9 if left else 9), y(kl) + below, label, "end" if left else "start")
        )
    said = "; ".join(f"{name}: {seconds:.0f} s, KL {kl:.3f}" for name, seconds, kl in points)
    return svg("Time and damage, Gemma 3 270M, 3 bits in groups of 128", said, body)


# file, title, columns of seconds and KL, method -> (label, its side of the point): each panel
# compares within one table
PEERS: tuple[tuple[str, str, int, int, dict[str, tuple[str, str]]], ...] = (
    (
        "tuner-2026-11-27.md",
        "beside auto-round",
        2,
        5,
        {
            "gptq": ("gptq", "above"),
            "auto light": ("auto, light", "below"),
            "auto": ("auto", "right"),
            "auto-round": ("auto-round", "left"),
            "auto-round alg_ext": ("auto-round, alg_ext", "left"),
        },
    ),
    (
        "recipes-2026-11-27.md",
        "beside llm-compressor",
        8,
        2,
        {
            "gptq, no Fisher": ("gptq, unweighted", "under"),
            "gptq": ("gptq", "above"),
            "llm-compressor": ("llm-compressor", "right"),
        },
    ),
)
# side of a point -> where its label stands
SIDES = {
    "left": (-10, 4, "end"),
    "right": (10, 4, "start"),
    "above": (0, -10, "middle"),
    "below": (0, 20, "middle"),
    "under": (-4, 20, "start"),
}
PANEL = 176  # height


def peers() -> str:
    """KL against processor minutes beside other tools, Gemma 3 270M at 4 bits: a panel a table."""
    words = "KL to the full model against processor minutes: further down and left is better"
    body, said = [text(LEFT, 16, words, kind="soft")], []
    minutes = axis(math.log(1), math.log(40), LEFT, WIDTH - RIGHT)
    for i, (file, title, seconds, kl, methods) in enumerate(PEERS):
        rows = {row[1]: row for row in reversed(table(file)) if row[0] == "W4g128"}
        top = 44 + i * PANEL
        y = axis(0, 0.2, top + PANEL - 40, top)
        body.append(text(WIDTH - RIGHT, top + PANEL - 52, title, "end"))
        for tick in (0.0, 0.1, 0.2):
            line = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"'
            body.append(f'<line class="grid" {line}/>')
            body.append(text(LEFT - 8, y(tick) + 4, f"{tick:.1f}", "end", "soft"))
        for tick in (1, 2, 5, 10, 20, 40) if i + 1 == len(PEERS) else ():
            place = minutes(math.log(tick))
            body.append(text(place, y(0) + 20, f"{tick} min", "middle", "soft"))
        for name, (label, side) in methods.items():
            took, damage = float(rows[name][seconds]) / 60, float(rows[name][kl])
            x, (right, down, anchor) = minutes(math.log(took)), SIDES[side]
            kind = "other" if label.startswith(("auto-round", "llm")) else "ours"
            body.append(f'<circle class="{kind}" cx="{x:.1f}" cy="{y(damage):.1f}" r="5"/>')
            body.append(text(x + right, y(damage) + down, f"{label} {damage:.3f}", anchor))
            said.append(f"{title}, {label}: {took:.1f} min, KL {damage:.3f}")
    height = 44 + len(PEERS) * PANEL + 20
    body += key(height - 20, {"ours": "auto_mmround", "other": "other tools"})
    title = "Damage against time beside other tools, Gemma 3 270M, 4 bits"
    return svg(title, "; ".join(said), body, height)


def key(y: float, kinds: Mapping[str, str]) -> Iterator[str]:
    """Squares in the colours, and what they stand for."""
    x = LEFT
    for kind, words in kinds.items():
        yield f'<rect class="{kind}" x="{x}" y="{y}" width="11" height="11"/>'
        yield text(x + 17, y + 10, words)
        x += 160


def by_modality() -> str:
    """KL of the bundled model by modality, rounded to nearest and tuned."""
    rows = [
        (row[0], float(row[3]), float(row[4]))
        for row in table("demo-2026-11-30.md")
        if row[0] != "full precision"
    ]
    y = axis(0, 0.03, HEIGHT - BOTTOM, TOP)
    body = []
    for tick in (0, 0.01, 0.02, 0.03):
        body.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}"'
            f' y2="{y(tick):.1f}"/>'
        )
        body.append(text(LEFT - 8, y(tick) + 4, f"{tick:g}", "end", "soft"))
    step = (WIDTH - LEFT - RIGHT) / (2 * len(rows))
    for i, (name, *values) in enumerate(rows):
        kind = "ours" if "tuned" in name else "other"
        for j, value in enumerate(values):
            group = (i // 2) * 2 + j  # W4 text, W4 image, W3 text, W3 image
            left = LEFT + group * 2 * step + (i % 2) * step * 0.8 + step * 0.2
            body.append(
                f'<rect class="{kind}" x="{left:.1f}" y="{y(value):.1f}" width="{step * 0.75:.1f}" '
                f'height="{HEIGHT - BOTTOM - y(value):.1f}"/>'
            )
            body.append(
                text(left + step * 0.375, y(value) - 4, f"{value:.5f}".rstrip("0"), "middle")
            )
            if i % 2 == 0:
                label = f"{name[:2]} {('text', 'image')[j]}"
                body.append(text(left + step * 0.775, HEIGHT - BOTTOM + 18, label, "middle"))
    body.append(text(LEFT, TOP - 6, "KL to the full model, held out", kind="soft"))
    body += key(HEIGHT - 20, {"other": "rounded to nearest", "ours": "tuned"})
    said = "; ".join(f"{name}: text {one:g}, image {two:g}" for name, one, two in rows)
    return svg("Damage by modality, the bundled model", said, body)


def grids() -> str:
    """Why the symmetric scale takes a sign: one group's values, on both grids of 3 bits."""
    values = (-0.41, -0.22, -0.08, 0.05, 0.13, 0.3, 0.52, 0.7)
    x, body = axis(-0.8, 0.8, LEFT, WIDTH - RIGHT), []
    rows = (
        (70, 0.7 / 3, range(-4, 4), "range from -0.93 to 0.7: steps of 0.233"),
        (200, -0.7 / 4, range(-4, 4), "full range, negative scale: steps of 0.175"),
    )
    for top, scale, codes, name in rows:
        levels = [scale * code for code in codes if abs(scale * code) <= 0.8]
        body.append(text(LEFT, top - 34, name))
        body.append(
            f'<line class="grid" x1="{x(-0.8):.1f}" x2="{x(0.8):.1f}" y1="{top + 40}"'
            f' y2="{top + 40}"/>'
        )
        for level in levels:
            body.append(
                f'<rect class="ours" x="{x(level) - 1:.1f}" y="{top + 30}" width="2" height="20"/>'
            )
            body.append(text(x(level), top + 66, f"{round(level / scale)}", "middle", "soft"))
        for value in values:
            nearest = min(levels, key=lambda level: abs(level - value))
            body.append(
                f'<line class="grid" x1="{x(value):.1f}" x2="{x(nearest):.1f}" y1="{top}"'
                f' y2="{top + 30}"/>'
            )
            body.append(f'<circle class="other" cx="{x(value):.1f}" cy="{top}" r="4"/>')
    return svg(
        "A group of weights on two symmetric grids of 3 bits",
        "; ".join(row[3] for row in rows),
        body,
    )


DRAWN: dict[str, Callable[[], str]] = {
    "time.svg": time_and_damage,
    "peers.svg": peers,
    "modality.svg": by_modality,
    "grid.svg": grids,
}


def main() -> None:
    """All figures."""
    FIGURES.mkdir(exist_ok=True)
    for name, draw in DRAWN.items():
        (FIGURES / name).write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
