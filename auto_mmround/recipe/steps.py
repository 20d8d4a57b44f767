"""How many sign steps, at what rate, on how many samples, where the recipe says nothing."""

from typing import NamedTuple


class Steps(NamedTuple):
    """Sign steps a block, first learning rate (None: 1/steps), samples that run together and make a step."""

    iters: int
    lr: float | None
    batch: int


# Where the recipe says nothing: `auto` starts from the closed form, so few steps do.
STEPS = {
    "auto": Steps(20, 0.02, 8),
    "sign_round": Steps(200, None, 8),
    "gptq": Steps(0, None, 8),
    "rtn": Steps(0, None, 8),
}
# Those of `auto` by preset; docs/tuner.md has the table of time and damage.
PRESETS = {"light": Steps(16, 0.02, 4), "default": STEPS["auto"], "best": Steps(60, 0.01, 8)}
