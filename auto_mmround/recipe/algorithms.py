"""The algorithms, one row each: the way to find codes, and what it needs."""

from collections.abc import Mapping
from typing import NamedTuple


class Steps(NamedTuple):
    """Sign steps per block, first learning rate (None: 1/steps), samples per step. gradients: of
    the model's output, for the weights of tokens. Few samples give several each (`run.session`)."""

    iters: int
    lr: float | None
    batch: int
    gradients: int = 128


class Algorithm(NamedTuple):
    """One algorithm.

    text: for help. start: `file.function` of `numerics` that puts weights where sign steps begin,
    called as `numerics.start.closed_forms` is; None: rounding to nearest. A function needs second
    moments of every layer's inputs, and held-out samples to choose the best step. presets: steps if
    the recipe sets none, by the name of a preset. steps: whether it takes sign steps; 0 steps then
    mean round to nearest. bounded: fewer samples per step if they are long, see
    `run.loss_weights.samples_a_step`.
    """

    text: str
    start: str | None
    presets: Mapping[str, Steps]
    steps: bool = True
    bounded: bool = False


# The presets of `auto`; docs/tuner.md has the table of time and damage. After the closed form, few
# steps are enough.
_AUTO = {
    "light": Steps(16, 0.02, 4, gradients=64),
    "default": Steps(20, 0.02, 8, gradients=96),
    "best": Steps(60, 0.01, 8),
}
PRESETS = tuple(_AUTO)
_NONE = {"default": Steps(0, None, 8)}
_CLOSED_FORM = "start.closed_forms"

ALGORITHMS: dict[str, Algorithm] = {
    "auto": Algorithm("closed form, then few sign steps", _CLOSED_FORM, _AUTO, bounded=True),
    "sign_round": Algorithm(
        "many sign steps from round to nearest", None, {"default": Steps(200, None, 8)}
    ),
    "gptq": Algorithm("closed form alone", _CLOSED_FORM, _NONE, steps=False),
    "rtn": Algorithm("round to nearest", None, _NONE, steps=False),
}
