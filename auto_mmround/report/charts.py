"""Charts as inline SVG.

Horizontal places are in percent, so that a chart fits any width while its text keeps its size.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

HEIGHT, TOP, BOTTOM = 190, 10, 22  # pixels: of a chart, and of the margins inside it
COLORS = 6
LEFT = 46  # pixels for the labels of the vertical axis


@dataclass(frozen=True)
class Scale:
    """A vertical axis from low to high; logarithmic or from 0."""

    low: float
    high: float
    log: bool

    def y(self, value: float, height: int = HEIGHT) -> float:
        """Pixels from the top."""
        if self.log:
            part = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return round(height - BOTTOM - min(part, 1.0) * (height - TOP - BOTTOM), 1)

    def ticks(self) -> list[float]:
        """Round values to label.

        Powers of ten (with 2 and 5 between a few of them), or three to six even steps.
        """
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(powers) <= 3 else (1,)
            values = [step * 10.0**power for power in powers for step in steps]
            return [value for value in values if self.low <= value <= self.high * 1.0001]
        step = _round_step((self.high - self.low) / 4)
        return [i * step for i in range(int(self.high / step + 1e-9) + 1)]


def scale(values: Iterable[float]) -> Scale:
    """Logarithmic if positive values lie more than a factor of 20 apart."""
    finite = [value for value in values if math.isfinite(value)]
    top = max(finite, default=1.0)
    small = min((value for value in finite if value > 0), default=1.0)
    if top > 20 * small:
        return Scale(small / 1.5, top * 1.5, True)
    return Scale(0.0, top * 1.05 or 1.0, False)


def _round_step(step: float) -> float:
    base = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(base * k for k in (1, 2, 5, 10) if base * k >= step)


def figure(value: float | None, digits: int = 3) -> str:
    """A number in few significant digits; a dash for none."""
    if value is None:
        return "–"
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value)))) if value else 0
        return f"{value:,.{min(places, 6)}f}"
    return f"{value:.{digits - 1}e}"


def chart(
    title: str, summary: str, body: Iterable[str], axis: Scale, labels: Sequence[str]
) -> Markup:
    """A plot with its axis and a few labels below. Screen readers read out title and summary."""
    grid = []
    for tick in axis.ticks():
        y = axis.y(tick)
        grid.append(f'<line class="grid" x1="0" x2="100%" y1="{y}" y2="{y}"/>')
    ticks = "".join(
        f'<text class="tick" x="{LEFT - 8}" y="{axis.y(t) + 4}" text-anchor="end">{t:g}</text>'
        for t in axis.ticks()
    )
    below = []
    for i in _some(len(labels)):
        x = f"{center(i, len(labels)):.2f}%"
        below.append(
            f'<text class="tick" x="{x}" y="{HEIGHT - 5}"'
            f' text-anchor="middle">{escape(labels[i])}</text>'
        )
    return Markup(
        f'<div class="plot"><svg class="axis" width="{LEFT}" height="{HEIGHT}"'
        f' aria-hidden="true">{ticks}</svg>'
        f'<svg class="marks" height="{HEIGHT}" role="img"><title>{escape(title)}</title>'
        f"<desc>{escape(summary)}</desc>{''.join(grid)}{''.join(body)}{''.join(below)}</svg></div>"
    )


def center(i: int, count: int) -> float:
    """The middle of column i of count, in percent."""
    return 100 * (i + 0.5) / count


def _some(count: int) -> list[int]:
    """At most five places, with the first and the last."""
    return (
        sorted({round(i * (count - 1) / 4) for i in range(5)}) if count > 5 else list(range(count))
    )


def drops(
    title: str,
    labels: Sequence[str],
    nearest: Sequence[float],
    start: Sequence[float],
    end: Sequence[float],
) -> Markup:
    """One column per block: a ring for rounding to nearest, a dash for the start, a dot for the
    end."""
    axis = scale([*nearest, *start, *end])
    marks = []
    for i, (high, middle, low) in enumerate(zip(nearest, start, end, strict=True)):
        x, ys = f"{center(i, len(labels)):.2f}%", [axis.y(value) for value in (high, middle, low)]
        tip = escape(f"{labels[i]}: {figure(high)} → {figure(middle)} → {figure(low)}")
        marks.append(
            f'<g><title>{tip}</title><line class="drop" x1="{x}" x2="{x}" y1="{ys[0]}"'
            f' y2="{ys[2]}"/><circle class="nearest" cx="{x}" cy="{ys[0]}" r="3.5"/><circle'
            f' class="start" cx="{x}" cy="{ys[1]}" r="2"/><circle class="end" cx="{x}" cy="{ys[2]}"'
            ' r="3.5"/></g>'
        )
    falls = sum(low < high for high, low in zip(nearest, end, strict=True))
    summary = (
        f"Error of {len(labels)} blocks, {'logarithmic' if axis.log else 'linear'} scale. It fell"
        f" in {falls} of them; sum {figure(sum(nearest))} rounded to nearest, {figure(sum(end))} at"
        " the end."
    )
    return chart(title, summary, marks, axis, labels)


def columns(title: str, labels: Sequence[str], values: Sequence[float], unit: str) -> Markup:
    """One bar per block."""
    axis = scale([0.0, *values]) if not values else Scale(0.0, max(values) * 1.05 or 1.0, False)
    width = 100 / max(len(values), 1)
    bars = []
    for i, value in enumerate(values):
        y = axis.y(value)
        bars.append(
            f'<rect class="bar" x="{i * width + width * 0.15:.2f}%" width="{width * 0.7:.2f}%"'
            f' y="{y}" height="{max(HEIGHT - BOTTOM - y, 0.5):.1f}"><title>{escape(labels[i])}:'
            f" {figure(value)} {unit}</title></rect>"
        )
    summary = f"{len(values)} blocks, from {figure(min(values))} to {figure(max(values))} {unit}."
    return chart(title, summary, bars, axis, labels)


def line(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, tuple[int, Sequence[float]]],
    unit: str = "",
    from_zero: bool = False,
) -> Markup:
    """One line per series, one dot per block. series: name -> (number of its colour, values)."""
    values = [value for _, values_of in series.values() for value in values_of]
    axis = Scale(0.0, max(values) * 1.05 or 1.0, False) if from_zero else scale(values)
    marks = []
    for name, (color, values_of) in series.items():
        k = color % COLORS
        marks += [
            f'<line class="s{k}" x1="{center(i - 1, len(labels)):.2f}%"'
            f' x2="{center(i, len(labels)):.2f}%" y1="{axis.y(values_of[i - 1])}"'
            f' y2="{axis.y(values_of[i])}"/>'
            for i in range(1, len(values_of))
        ]
        marks += [
            f'<circle class="s{k}" cx="{center(i, len(labels)):.2f}%" cy="{axis.y(value)}" r="3">'
            f"<title>{escape(name)}, {escape(labels[i])}: {figure(value)} {unit}</title></circle>"
            for i, value in enumerate(values_of)
        ]
    sums = "; ".join(
        f"{name}: {figure(values_of[0])} to {figure(values_of[-1])}"
        for name, (_, values_of) in series.items()
        if values_of
    )
    return chart(title, f"{sums} {unit}".strip(), marks, axis, labels)


def scatter(title: str, points: Mapping[str, tuple[int, float, float, str]]) -> Markup:
    """One dot a run. points: letter -> (number of its colour, across, up, words on `across`)."""
    axis = Scale(0.0, max(up for _, _, up, _ in points.values()) * 1.05 or 1.0, False)
    widest = max(across for _, across, _, _ in points.values()) or 1.0
    left, right = center(0, 3), center(2, 3)  # where the chart writes its first and last label
    marks, told = [], []
    for letter, (color, across, up, words) in points.items():
        x, y = f"{left + (right - left) * across / widest:.2f}%", axis.y(up)
        tip = escape(f"{letter}: {figure(up)} at {words}")
        marks.append(
            f'<circle class="s{color % COLORS}" cx="{x}" cy="{y}" r="4"><title>{tip}</title>'
            f'</circle><text class="tick" x="{x}" y="{y - 8}" text-anchor="middle">'
            f"{escape(letter)}</text>"
        )
        told.append(str(tip))
    last = max(points.values(), key=lambda point: point[1])[3]
    return chart(title, "; ".join(told), marks, axis, ["0", "", last])


def bar(value: float, largest: float, style: str = "end") -> Markup:
    """One bar inside a table row; its figure stands beside it."""
    width = 100 * value / largest if largest > 0 else 0.0
    return Markup(
        f'<svg class="bar-row" height="12" aria-hidden="true"><rect class="{style}" x="0" y="1"'
        f' height="10" width="{max(width, 0.4):.2f}%" rx="1"/></svg>'
    )


def strips(rows: Mapping[str, Sequence[int]], places: Mapping[str, Sequence[str]]) -> list[Markup]:
    """For each row a strip with a cell a block, darker for more bits. places: "3" or "3.0" for each
    value. Rows whose names begin alike share their columns; what lies in one block shares its
    cell."""
    columns: dict[str, set[str]] = {}
    for name, numbers in places.items():
        own = columns.setdefault(name.partition("*")[0], set())
        own.update(number.partition(".")[0] for number in numbers)
    every = {value for values in rows.values() for value in values}
    return [
        _strip(name, dict(zip(places[name], values)), columns[name.partition("*")[0]], every)
        for name, values in rows.items()
    ]


def _strip(name: str, bits: Mapping[str, int], columns: Iterable[str], every: set[int]) -> Markup:
    ordered = sorted(columns, key=lambda number: int(number or 0))
    wide, low, high = 100 / len(ordered), min(every), max(every)
    cells = []
    for i, column in enumerate(ordered):
        inside = {place: b for place, b in bits.items() if place.partition(".")[0] == column}
        for k, (place, value) in enumerate(inside.items()):
            shade = 0.08 + 0.52 * (value - low) / max(high - low, 1)
            cells.append(
                f'<rect class="end" x="{wide * (i + k / len(inside)):.2f}%" y="1" height="16"'
                f' width="{wide / len(inside):.3f}%" fill-opacity="{shade:.2f}">'
                f"<title>{escape(place)}: {value} bits</title></rect>"
            )
        if len(ordered) <= 40 and len(set(inside.values())) == 1:
            cells.append(
                f'<text x="{center(i, len(ordered)):.2f}%" y="13" text-anchor="middle"'
                f' aria-hidden="true">{next(iter(inside.values()))}</text>'
            )
    told = " ".join(str(value) for value in bits.values())
    return Markup(
        f'<svg class="strip" height="18" role="img"><title>{escape(name)}: bits block by block'
        f"</title><desc>{told}</desc>{''.join(cells)}</svg>"
    )
