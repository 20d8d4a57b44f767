"""Rounding to nearest, kept in mind while a block is tuned: what is worse on the held-out samples
is not kept."""

import copy
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.tuner import TunedWeight, TuneResult

log = logging.getLogger("auto_mmround")


class Nearest(NamedTuple):
    """error: on the held-out samples; None where tuning begins at rounding to nearest. states: of
    the weights, by name; none where what was tuned is kept, whatever it is. A start makes parts of
    its own, so these take no memory but scales."""

    error: float | None = None
    states: Mapping[str, Rounding] = {}

    @classmethod
    def of(cls, leaves: Mapping[str, TunedWeight], error: float) -> "Nearest":
        """The weights as they are."""
        return cls(error, {name: copy.copy(leaf.rounding) for name, leaf in leaves.items()})

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
        worse on others: a channel that only the first word of a text sets, say.
        """
        known = self.error if self.states else None
        finite = math.isfinite(result.end)
        if finite and (known is None or not result.end > known):
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
