"""Answers and transcripts compared with expected ones, and recovery as in model cards.

Pure functions of texts.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from auto_mmround.errors import UserError

TOLERANCE = 0.05  # ChartQA's relaxed accuracy (Masry et al., 2022): numbers may be off by 5 %
ARTICLES = {"a", "an", "the"}
NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")


@dataclass(frozen=True)
class Score:
    """One line of a recovery table.

    reference: the score of the model before quantization, None if it was not measured. baseline: of
    a third checkpoint to compare with, such as one rounded to nearest. unit: "%" or "". count:
    samples.
    """

    benchmark: str
    split: str
    metric: str
    quantized: float
    count: int
    reference: float | None = None
    baseline: float | None = None
    unit: str = ""
    lower_is_better: bool = False

    @property
    def recovery(self) -> float | None:
        """In percent, see `recovery`."""
        return recovery(self.reference, self.quantized, self.lower_is_better)

    def as_dict(self) -> dict[str, Any]:
        """Plain figures for JSON, with the recovery."""
        return asdict(self) | {"recovery": self.recovery}


def recovery(
    reference: float | None, quantized: float, lower_is_better: bool = False
) -> float | None:
    """Percent of the reference's quality that is left; 100 is even, less is worse.

    100 x quantized / reference for scores, 100 x reference / quantized for errors and perplexities.
    None without a reference, or if the quotient means nothing, as when the reference has nothing
    right.
    """
    if reference is None or (reference == 0 and not lower_is_better):
        return None
    if reference == quantized:
        return 100.0
    above, below = (reference, quantized) if lower_is_better else (quantized, reference)
    return 100 * above / below if below > 0 else None


def number(text: str) -> float | None:
    """The number that the whole text is: `1,200`, `$3.50`, `12 %`; None for any other text."""
    bare = text.strip().rstrip(".").strip("$€£% ")
    return float(bare.replace(",", "")) if NUMBER.fullmatch(bare) else None


def normalised(text: str) -> str:
    """Lower case, without punctuation and articles, blanks collapsed."""
    plain = "".join(
        " " if unicodedata.category(c)[0] in "PS" else c
        for c in unicodedata.normalize("NFKC", text)
    )
    return " ".join(word for word in plain.casefold().split() if word not in ARTICLES)


def exact_match(answer: str, expected: str) -> bool:
    """The same text, apart from blanks around it."""
    return answer.strip() == expected.strip()


def relaxed_match(answer: str, expected: str) -> bool:
    """Two numbers at most 5 % apart, else equal when normalised."""
    got, wanted = number(answer), number(expected)
    if got is None or wanted is None:
        return normalised(answer) == normalised(expected)
    return abs(got - wanted) <= TOLERANCE * abs(wanted)


def share(
    answers: Sequence[str], expected: Sequence[str], match: Callable[[str, str], bool]
) -> float:
    """Percent of the answers that match."""
    return 100 * sum(map(match, answers, expected)) / len(expected)


def normaliser(language: str | None, tokenizer: Any = None) -> Callable[[str], str]:
    """Whisper's normaliser for a language, a code or a name; None is English.

    For English it is the English one, with the tokenizer's table of spellings if there is one; else
    the basic one.
    """
    from transformers.models.whisper.english_normalizer import (
        BasicTextNormalizer,
        EnglishTextNormalizer,
    )

    if language in (None, "en", "english"):
        return EnglishTextNormalizer(getattr(tokenizer, "english_spelling_normalizer", None) or {})
    return BasicTextNormalizer()


def error_rates(
    said: Sequence[str], heard: Sequence[str], normalise: Callable[[str], str]
) -> tuple[float, float]:
    """(word, character) error rate in percent over all samples, after normalising.

    A rate is edits / length of the said text. Needs the package jiwer. Raises UserError if nothing
    was said.
    """
    import jiwer

    pairs = [(normalise(a).strip(), normalise(b).strip()) for a, b in zip(said, heard, strict=True)]
    pairs = [pair for pair in pairs if pair[0]]
    if not pairs:
        raise UserError("word error rate: every reference text is empty after normalising")
    truth, guess = [a for a, _ in pairs], [b for _, b in pairs]
    return 100 * jiwer.wer(truth, guess), 100 * jiwer.cer(truth, guess)
