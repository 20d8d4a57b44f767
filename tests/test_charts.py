"""Drawings of a report: figures, axes, strips of bits."""

import re

import pytest

from auto_mmround.report import charts


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"),
        (0, "0"),
        (4.1563, "4.16"),
        (0.000831, "0.000831"),
        (1234.5, "1,234"),
        (3e-7, "3.00e-07"),
    ],
)
def test_figures_keep_three_digits(value, text):
    assert charts.figure(value) == text


@pytest.mark.parametrize(
    "values", [[1e-4, 1e-3, 0.5], [0.2, 0.5, 1.1], [0.0, 0.0], [3.0], [0.0, 5.0]]
)
def test_every_value_and_tick_lies_inside_the_plot(values):
    axis = charts.scale(values)
    places = [axis.y(value) for value in [*values, *axis.ticks()]]
    assert all(charts.TOP - 0.1 <= y <= charts.HEIGHT - charts.BOTTOM + 0.1 for y in places)
    assert sorted(values, reverse=True) == [
        v for _, v in sorted(zip(map(axis.y, values), values), key=lambda p: p[0])
    ]
    assert 1 <= len(axis.ticks()) <= 12


def test_strips_of_bits_share_columns():
    """A kind that only some blocks have stands below those blocks; experts share a cell."""
    rows = {"a.*.q": [4, 2], "a.*.e.*.up": [8, 4], "a.*.mlp": [4]}
    places = {"a.*.q": ["0", "1"], "a.*.e.*.up": ["1.0", "1.1"], "a.*.mlp": ["1"]}
    q, up, mlp = (
        re.findall(r'<rect[^>]* x="([^"]*)"[^>]*width="([^"]*)" fill-opacity="([^"]*)"', strip)
        for strip in charts.strips(rows, places)
    )
    assert [(x, wide) for x, wide, _ in q] == [("0.00%", "50.000%"), ("50.00%", "50.000%")]
    assert [x for x, _, _ in up] == ["50.00%", "75.00%"] and mlp[0][0] == "50.00%"
    shades = {bits: shade for (_, _, shade), bits in zip([*q, *up, *mlp], (4, 2, 8, 4, 4))}
    assert float(shades[2]) < float(shades[4]) < float(shades[8])
    assert "1.1: 4 bits" in charts.strips(rows, places)[1]
