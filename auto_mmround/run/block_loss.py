"""What the sign steps of a block are given."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from auto_mmround.model import devices
from auto_mmround.model.chains import Chain
from auto_mmround.numerics.tuner import TuneConfig
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.loss_weights import ErrorWeights


def forward_of(
    student: Chain,
    blocks: Sequence[nn.Module],
    first: int,
    target: Chain,
    loss_weights: ErrorWeights,
    places: Mapping[int, int],
) -> Callable[[Sequence[int]], Any]:
    """A function of samples: the student's outputs behind ``blocks``, the teacher's, and the
    weights of errors.

    places: number of a sample in the run -> its place in the chain; samples of other processes are
      missing."""

    def forward(indices: Sequence[int]) -> Any:
        for group, output in student.forward(
            blocks, first, [places[i] for i in indices if i in places]
        ):
            hidden = [target.hidden[i] for i in group]
            wanted = torch.cat(hidden) if len(hidden) > 1 else hidden[0]
            # In the shape of what the blocks read: a query that all windows of a sound share
            # broadcasts.
            batch, *rest = student.hidden[group[0]].shape[:-1]
            weights = loss_weights.of(group, (len(group) * batch, *rest)).to(output.device)
            yield output, devices.sent(wanted, output.device), _fitting(weights, output)

    return forward


def _fitting(weights: Tensor, output: Tensor) -> Tensor:
    """The weights of tokens that are read, for those that are given: on average, where a block
    merges tokens."""
    read, given = weights.shape[:-1], output.shape[:-1]
    if len(read) == len(given) and all(a in (1, b) for a, b in zip(read, given)):
        return weights
    return weights.flatten(0, -2).mean(0).expand(*given, -1)


def tune_config(recipe: Recipe, first: int, batch_size: int, samples: int) -> TuneConfig:
    """How a block is tuned. batch_size: samples that run together. samples: of a step."""
    factor_lr = 0.0 if not recipe.enable_minmax_tuning else recipe.minmax_lr
    return TuneConfig(
        iters=recipe.steps,
        lr=recipe.learning_rate,
        factor_lr=factor_lr,
        batch_size=batch_size,
        samples=samples,
        keep_best=not recipe.not_use_best_mse,
        trim=recipe.trim,
        patience=recipe.dynamic_max_gap,
        seed=recipe.seed + first,
    )
