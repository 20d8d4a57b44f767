#!/usr/bin/env python3
"""Draws the figures of docs/ as SVG from the tables in bench/results/; a test holds them against
each other.

    python scripts/docs_figures.py

Figures follow the reader's light or dark scheme, and hold text, not paths: small, and searchable.
"""

from collections.abc import Callable, Sequence
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


def svg(title: str, description: str, body: Sequence[str]) -> str:
    """A complete file; the description is for those who don't see it."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
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


PEERS = (  # file, title, (method, label) in it: each panel compares within one table
    (
        "tuner-2026-11-27.md",
        "with auto-round",
        {
            "gptq": ("gptq", 2, 5),
            "auto light": ("auto, light", 2, 5),
            "auto": ("auto", 2, 5),
            "auto-round": ("auto-round", 2, 5),
            "auto-round alg_ext": ("auto-round, alg_ext", 2, 5),
        },
    ),
    (
        "recipes-2026-11-27.md",
        "with llm-compressor",
        {
            "gptq, no Fisher": ("gptq, no Fisher", 8, 2),
            "gptq": ("gptq", 8, 2),
            "llm-compressor": ("llm-compressor", 8, 2),
        },
    ),
)


Label = tuple[float, float, float]  # left end, height, right end


def free(taken: list[Label], left: float, height: float, width: float) -> float:
    """The height nearest to the wanted one at which a label meets no other; it is taken then."""
    for step in (0, -15, 15, -30, 30, 45, 60):
        clear = all(
            abs(height + step - other) >= 14 or left > end or left + width < begin
            for begin, other, end in taken
        )
        if clear:
            break
    taken.append((left, height + step, left + width))
    return height + step


def peers() -> str:
    """KL against processor seconds beside other tools, Gemma 3 270M at 4 bits: a panel a table."""
    body, said, half = [], [], WIDTH / 2
    for i, (file, title, methods) in enumerate(PEERS):
        rows = {row[1]: row for row in reversed(table(file)) if row[0] == "W4g128"}
        points = [
            (label, float(rows[name][seconds]), float(rows[name][kl]))
            for name, (label, seconds, kl) in methods.items()
        ]
        most = max(seconds for _, seconds, _ in points)
        start, end = i * half + LEFT, (i + 1) * half - RIGHT
        x, y = axis(0, 1.05 * most, start, end), axis(0, 0.25, HEIGHT - BOTTOM, TOP)
        body.append(text(start, TOP - 6, f"KL {title}", kind="soft"))
        for tick in (0.0, 0.1, 0.2):
            body.append(
                f'<line class="grid" x1="{start:.1f}" x2="{end:.1f}" y1="{y(tick):.1f}"'
                f' y2="{y(tick):.1f}"/>'
            )
            body.append(text(start - 8, y(tick) + 4, f"{tick:.1f}", "end", "soft"))
        for part in (0.0, 0.5, 1.0):
            words = f"{part * most:.0f}"
            body.append(text(x(part * most), HEIGHT - BOTTOM + 20, words, "middle", "soft"))
        body.append(text((start + end) / 2, HEIGHT - 10, "processor seconds", "middle"))
        taken: list[Label] = []
        for label, seconds, kl in sorted(points, key=lambda point: -point[2]):
            kind = "other" if label.startswith(("auto-round", "llm")) else "ours"
            body.append(f'<circle class="{kind}" cx="{x(seconds):.1f}" cy="{y(kl):.1f}" r="5"/>')
            left, words = seconds > 0.6 * most, f"{label} {kl:.3f}"
            place = x(seconds) + (-9 if left else 9)
            begin = place - (7 * len(words) if left else 0)
            height = free(taken, begin, y(kl) + 4, 7 * len(words))
            body.append(text(place, height, words, "end" if left else "start"))
        said += [f"{label}: {seconds:.0f} s, KL {kl:.3f}" for label, seconds, kl in points]
    return svg(
        "Damage against time beside other tools, Gemma 3 270M, 4 bits", "; ".join(said), body
    )


def by_modality() -> str:
    """KL of the bundled model by modality, rounded to nearest and tuned."""
    rows = [
        (row[0], float(row[3]), float(row[4]))
        for row in table("demo-2026-11-22.md")
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
    body.append(f'<rect class="other" x="{LEFT}" y="{HEIGHT - 20}" width="11" height="11"/>')
    body.append(text(LEFT + 17, HEIGHT - 10, "rounded to nearest"))
    body.append(f'<rect class="ours" x="{LEFT + 160}" y="{HEIGHT - 20}" width="11" height="11"/>')
    body.append(text(LEFT + 177, HEIGHT - 10, "tuned"))
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
