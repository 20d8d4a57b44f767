"""Samples of a dataset argument, media not read yet."""

from itertools import islice
from typing import Any

from auto_mmround.calibration.datasets import load_rows
from auto_mmround.calibration.rows import Sample


def load_samples(dataset: Any, limit: int | None = None) -> list[Sample]:
    """The first `limit` samples of a dataset argument (all without one), in its order; media not
    read yet.

    Raises UserError (BadSample for a row whose form isn't known).
    """
    sets = load_rows(dataset)
    every = (
        each.sample(i) for each in sets for i in range(min(len(each), each.source.num or len(each)))
    )
    return list(islice(every, limit))
