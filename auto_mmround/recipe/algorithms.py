"""The algorithms, one row each: how codes are found, and what that needs."""

from collections.abc import Mapping
from typing import NamedTuple


class Steps(NamedTuple):
    """Sign steps a block, first learning rate (None: 1/steps), samples that run together and make a
    step."""

    iters: int
    lr: float | None
    batch: int


class Algorithm(NamedTuple):
    """text: for help. start: where sign steps begin: "nearest", or "closed_form", which needs
    second moments of every layer's inputs and samples that are kept for the choice of the best
    step. presets: steps where the recipe says nothing, by the name of a preset. steps: whether it
    takes sign steps; then 0 of them mean round to nearest.
    tower_bound: fewer samples a step where each has a thousand tokens or more, see
      `run.weights.accumulated`.
    """

    text: str
    start: str
    presets: Mapping[str, Steps]
    steps: bool = True
    tower_bound: bool = False


# The presets of `auto`; docs/tuner.md has the table of time and damage. The closed form is near:
# few steps do.
_AUTO = {"light": Steps(16, 0.02, 4), "default": Steps(20, 0.02, 8), "best": Steps(60, 0.01, 8)}
PRESETS = tuple(_AUTO)
_NONE = {"default": Steps(0, None, 8)}

ALGORITHMS: dict[str, Algorithm] = {
    "auto": Algorithm("closed form, then few sign steps", "closed_form", _AUTO, tower_bound=True),
    "sign_round": Algorithm(
        "many sign steps from round to nearest", "nearest", {"default": Steps(200, None, 8)}
    ),
    "gptq": Algorithm("closed form alone", "closed_form", _NONE, steps=False),
    "rtn": Algorithm("round to nearest", "nearest", _NONE, steps=False),
}
