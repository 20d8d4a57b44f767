"""Answers, transcripts and recovery, against figures worked out by hand or printed by a released
card."""

import math
from types import SimpleNamespace

import pytest

from auto_mmround.evaluate.scoring import (
    Score,
    error_rates,
    exact_match,
    normalised,
    normaliser,
    number,
    recovery,
    relaxed_match,
    share,
)

# The word error rates that the released Whisper-small W4A16 card prints, with its recovery column.
# Two of its five figures are slips of its arithmetic (94.30, 73.93): 100 x 7.4884 / 7.9422 is
# 94.29, 100 x 16.2557 / 22.2870 is 72.94.
CARD = [
    (3.4435, 3.5246, 97.70, 97.70),
    (7.4884, 7.9422, 94.30, 94.29),
    (23.0642, 25.5212, 90.37, 90.37),
    (6.2002, 6.5092, 95.25, 95.25),
    (16.2557, 22.2870, 73.93, 72.94),
]


@pytest.mark.parametrize("reference, quantized, printed, right", CARD)
def test_recovery_of_error_rates_is_that_of_the_released_card(reference, quantized, printed, right):
    assert round(recovery(reference, quantized, lower_is_better=True), 2) == right
    assert abs(printed - right) < 1


@pytest.mark.parametrize(
    "reference, quantized, lower, wanted",
    [
        (80.0, 76.0, False, 95.0),
        (80.0, 84.0, False, 105.0),
        (None, 5.0, True, None),
        (0.0, 0.0, True, 100.0),
        (0.0, 5.0, True, 0.0),
        (5.0, 0.0, True, None),
        (0.0, 5.0, False, None),
        (0.0, 0.0, False, None),
    ],
)
def test_recovery(reference, quantized, lower, wanted):
    assert recovery(reference, quantized, lower) == wanted
    score = Score(
        "set", "split", "metric", quantized, 7, reference=reference, lower_is_better=lower
    )
    assert score.as_dict()["recovery"] == wanted


@pytest.mark.parametrize(
    "text, wanted",
    [("1,200", 1200.0), (" $3.50 ", 3.5), ("12 %", 12.0), ("-4", -4.0), (".5", 0.5), ("7.", 7.0)]
    + [(text, None) for text in ("seven", "", "3 apples", "1.2.3", "4-5", "%")],
)
def test_number(text, wanted):
    assert number(text) == wanted


@pytest.mark.parametrize(
    "answer, expected, relaxed",
    [
        ("1,240", "1200", True),
        ("1261", "1200", False),
        ("-10", "10", False),
        ("0", "0", True),
        ("0.01", "0", False),
        ("The red ball.", "red ball", True),
        ("A RED, ball!", "the Red  ball", True),
        ("Café", "Cafe\u0301", True),
        ("red balls", "red ball", False),
        ("two", "2", False),
        ("", "red", False),
    ],
)
def test_relaxed_match(answer, expected, relaxed):
    assert relaxed_match(answer, expected) is relaxed


def test_exact_match_minds_everything_but_outer_blanks():
    assert exact_match(" a cat\n", "a cat") and not exact_match("A cat", "a cat")
    assert share(["a", "B", "c"], ["a", "b", "c"], exact_match) == pytest.approx(200 / 3)
    assert normalised("An apple; a day") == "apple day"


def test_error_rates_count_edits_over_what_was_said():
    pytest.importorskip("jiwer", reason="jiwer is in the extra `eval`")
    # One word of eight substituted, one left out.
    said, heard = ["the cat sat on the mat", "good morning"], ["the cat sat on a mat", "good"]
    words, letters = error_rates(said, heard, str)
    assert words == pytest.approx(100 * 2 / 8)
    assert 0 < letters < 100 and not math.isclose(words, letters)
    assert error_rates(["Mr. Brown paid"], ["mister brown PAID"], normaliser(None)) == (0, 0)


def test_other_languages_use_the_basic_normaliser():
    assert normaliser("de")("Mr. Brown, GUT!").split() == ["mr", "brown", "gut"]
    assert normaliser("en")("Mr. Brown").split() == ["mister", "brown"]

    british = SimpleNamespace(english_spelling_normalizer={"colour": "color"})
    assert normaliser("en", british)("Colour") == "color"
