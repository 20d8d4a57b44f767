"""Rounding to nearest, kept in mind while a block is tuned: what is worse on the held-out samples
is not kept."""

import copy
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, stdev
from typing import NamedTuple

from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.tuner import AddUp, Forward, TunedWeight, TuneResult, mean_error

log = logging.getLogger("auto_mmround")

TINY = 1e-30  # in place of an error of nothing


def errors_by_sample(
    forward: Forward, indices: Sequence[int], add_up: AddUp | None = None
) -> list[float]:
    """`mean_error` of each sample alone."""
    return [mean_error(forward, [i], 1, add_up) for i in indices]


class Nearest(NamedTuple):
    """error: on the held-out samples; None where tuning begins at rounding to nearest. states: of
    the weights, by name; none where what was tuned is kept, whatever it is. A start makes parts of
    its own, so these take no memory but scales. each: measures the weights as they are, and gives
    an error for each held-out sample."""

    error: float | None = None
    states: Mapping[str, Rounding] = {}
    each: Callable[[], Sequence[float]] = list

    @classmethod
    def of(
        cls,
        leaves: Mapping[str, TunedWeight],
        error: float,
        each: Callable[[], Sequence[float]] = list,
    ) -> "Nearest":
        """The weights as they are."""
        return cls(error, {name: copy.copy(leaf.rounding) for name, leaf in leaves.items()}, each)

    def put_back(self, leaves: Mapping[str, TunedWeight]) -> None:
        """The weights, and the parameters that hold them, are rounded to nearest again."""
        for name, leaf in leaves.items():
            leaf.rounding = self.states[name]
            leaf.refresh()

    def at_worst(
        self, result: TuneResult, leaves: Mapping[str, TunedWeight], block: str
    ) -> tuple[TuneResult, bool]:
        """The result of tuning, or rounding to nearest where its error is lower or tuning's is no
        number; and whether it is the latter.

        A start fits the calibration samples. If they are few, or unlike one another, it may do
        worse on others: a channel that only the first word of a text sets, say. But the error of a
        block that makes a sink of attention lies in one token of a sample, and goes up and down
        threefold between samples. So it must be higher beyond doubt.
        """
        known = self.error if self.states else None
        finite = math.isfinite(result.end)
        if finite and (known is None or not result.end > known):
            return result, False
        if finite and not self._beyond_doubt(leaves):
            return result, False
        if finite:
            log.warning(
                "%s: stays rounded to nearest: its held-out error is %.3g so, and %.3g tuned; more"
                " or other samples may help", block, known, result.end,
            )  # fmt: skip
        else:
            log.warning(
                "%s: its held-out error is %g, so tuning cannot be judged: its outputs are too"
                " large, or NaN", block, result.end,
            )  # fmt: skip
        if known is None:
            return result, False
        self.put_back(leaves)
        return replace(result, end=known, best_iter=0), True

    def _beyond_doubt(self, leaves: Mapping[str, TunedWeight]) -> bool:
        """Whether the weights as they are have higher errors than those rounded to nearest: the
        logarithms of the samples' quotients have a mean above two of its standard errors."""
        tuned, now = {name: leaf.rounding for name, leaf in leaves.items()}, self.each()
        self.put_back(leaves)
        logs = [
            math.log(max(mine, TINY) / max(its, TINY))
            for mine, its in zip(now, self.each(), strict=True)
        ]
        for name, leaf in leaves.items():
            leaf.rounding = tuned[name]
            leaf.refresh()
        spread = stdev(logs) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
        return fmean(logs) > 2 * spread
