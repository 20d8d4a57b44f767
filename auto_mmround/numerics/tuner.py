"""Tune the weights of one block so that its output stays near the teacher's.

The block is an ordinary module whose tuned parameters hold W~. Each iteration draws samples,
compares the block's output with the teacher's, and lets every `Rounding` that has a gradient take
one sign step (p <- p - lr * sign(dL/dp), lr falling linearly to 0). With one batch a step, a hook
does this the moment the gradient is complete, so gradients of a block never pile up. With several
batches it is done behind the last of them at the latest.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from auto_mmround.numerics.grids import Codes
from auto_mmround.numerics.rounding import PLAIN, Kernels, Rounding

# One forward over some samples: (output, target, weight), several when lengths differ. Shapes (B,
# T, D), (B, T, D) and (B, T, 1) or (B, T, D); a weight of 0 takes a token out of the loss.
Forward = Callable[[Sequence[int]], Iterable[tuple[Tensor, Tensor, Tensor]]]
HELD_OUT = 8  # samples, at most
SUBSAMPLE = 2**16  # errors that a quantile is taken of
# sums over processes, in place; None where there is one process
AddUp = Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True)
class TuneConfig:
    """Steps and rates. ``lr`` 0 or None means 1/iters, ``factor_lr`` None means lr and 0 means
    fixed ranges."""

    iters: int = 200
    lr: float | None = None
    factor_lr: float | None = None
    batch_size: int = 8
    samples: int | None = None  # of a step; None: batch_size
    keep_best: bool = True  # False: keep the last parameters, as `not_use_best_mse` asks
    patience: int = -1  # stop after so many iterations without a better held-out loss; -1: never
    checks: int = 5  # how often the held-out loss is looked at, at most
    trim: float = 0.0  # share of the largest weighted errors of a batch that steps do not see
    seed: int = 42


@dataclass(frozen=True)
class TuneResult:
    """Mean squared error per element on the held-out samples, before, after, and the iteration it
    belongs to."""

    start: float
    end: float
    best_iter: int
    seconds: float = 0.0  # of the steps and of the looks at the held-out samples between them


@dataclass
class TunedWeight:
    """A module parameter that holds W~, its rounding state, and how to see it as (out, in) rows.

    input_scale: (1,), of static activations.
    """

    parameter: torch.nn.Parameter
    rounding: Rounding
    transposed: bool = False  # transformers' Conv1D keeps (in, out)
    input_scale: Tensor | None = None

    def rows(self, tensor: Tensor) -> Tensor:
        """The parameter, or its gradient, as (out, in), in the same memory."""
        return tensor.t() if self.transposed else tensor.flatten(1)

    def codes(self) -> Codes:
        """What goes to disk."""
        return self.rounding.codes()._replace(input_scale=self.input_scale)

    def show_original(self) -> None:
        """Write the weight as it was into the parameter, in place."""
        self.rows(self.parameter.data).copy_(self.rounding.original())

    def refresh(self) -> None:
        """Write W~ into the parameter, in place."""
        self.rounding.write(self.rows(self.parameter.data))


def held_out_split(count: int, wanted: int = HELD_OUT) -> tuple[list[int], list[int]]:
    """Indices to train on and a fixed few, evenly spread, to choose the best by; with under 16
    samples all are both."""
    if count < 16:
        return list(range(count)), list(range(count))
    few = min(wanted, count // 8)
    held = [i * count // few for i in range(few)]
    return [i for i in range(count) if i not in set(held)], held


def looked_at(step: int, iters: int, checks: int = TuneConfig.checks) -> bool:
    """Whether the held-out loss is looked at behind this step (from 1): ``checks`` times at most,
    the last included."""
    return step == iters or step % math.ceil(iters / checks) == 0


def mean_error(
    forward: Forward, indices: Sequence[int], batch_size: int, add_up: AddUp | None = None
) -> float:
    """Weighted mean squared error per element over the samples, in float32, without gradients."""
    return _mean_error(forward, indices, batch_size, add_up).item()


def _mean_error(
    forward: Forward, indices: Sequence[int], batch_size: int, add_up: AddUp | None = None
) -> Tensor:
    """The same on the outputs' device, which nothing waits for."""
    sums: Tensor | None = None  # squares, elements
    with torch.no_grad():
        for at in range(0, len(indices), batch_size):
            for output, target, weight in forward(indices[at : at + batch_size]):
                if sums is None:  # not every accelerator has doubles
                    dtype = torch.float64 if output.is_cpu else torch.float32
                    sums = torch.zeros(2, dtype=dtype, device=output.device)
                sums[0] += squared_error(output, target, weight)
                sums[1] += weight.sum().to(sums.dtype) * output.shape[-1] / weight.shape[-1]
    if sums is None:
        sums = torch.zeros(2, dtype=torch.float64)
    if add_up:
        sums = sums.cpu().double()  # a process that has none of the samples has them there
        add_up([sums])
    return sums[0] / sums[1].clamp(min=1.0)


def squared_error(output: Tensor, target: Tensor, weight: Tensor, trim: float = 0.0) -> Tensor:
    """Sum of weighted squared differences, float32; without the largest ``trim`` of them, as told
    by a subsample."""
    errors = (output.float() - target.float()).square() * weight
    if trim:
        few = errors.detach().flatten()[:: max(1, errors.numel() // SUBSAMPLE)]
        errors = errors * (errors.detach() <= quantile(few, 1 - trim))
    return errors.sum()


def quantile(values_N: Tensor, share: float) -> Tensor:
    """As torch's, which computes its rank in float64 on the device."""
    at, sorted_N = share * (len(values_N) - 1), values_N.sort().values
    low = int(at)
    return torch.lerp(sorted_N[low], sorted_N[min(low + 1, len(values_N) - 1)], at - low)


def tune_block(
    weights: Sequence[TunedWeight],
    forward: Forward,
    sample_count: int,
    config: TuneConfig,
    on_step: Callable[[int], None] = lambda step: None,
    add_up: AddUp | None = None,
    kernels: Kernels = PLAIN,
) -> TuneResult:
    """Tune ``weights`` in place; afterwards the parameters hold the W~ that `Rounding.codes` gives.

    The best parameters are chosen on fixed held-out samples, the start and the last step included,
    so the result is never worse there than the start. With ``iters`` 0 the weights are rounded to
    nearest and only measured. Several processes: ``forward`` runs a process's own of the samples,
    ``add_up`` sums gradients and errors. kernels: of `Rounding.step`.
    """
    for weight in weights:
        weight.refresh()
    train, held = held_out_split(sample_count)
    start = _mean_error(forward, held, config.batch_size, add_up)
    if config.iters == 0 or not weights:
        return TuneResult(start.item(), start.item(), 0)
    started = time.perf_counter()
    best = _Best(start, weights)
    draw = _draws(train, config)
    with _sign_descent(weights, config, add_up, kernels) as learn:
        for step in range(1, config.iters + 1):
            learn(forward, next(draw), 1.0 - (step - 1) / config.iters)
            on_step(step)
            if not looked_at(step, config.iters, config.checks):
                continue
            loss = _mean_error(forward, held, config.batch_size, add_up)
            best.offer(loss, step, always=step == config.iters and not config.keep_best)
            if 0 < config.patience <= step - best.read()[1]:
                break
    best.restore()
    end, step = best.read()
    seconds = time.perf_counter() - started
    return TuneResult(start.item(), end, int(step), seconds)


class _Best:
    """The best parameters so far; on an accelerator the host learns which only by asking."""

    def __init__(self, loss: Tensor, weights: Sequence[TunedWeight]):
        self._loss_step = torch.stack([loss, torch.zeros_like(loss)])
        self._kept = [(weight, weight.rounding.kept()) for weight in weights]

    def offer(self, loss: Tensor, step: int, always: bool) -> None:
        """Keep the parameters as they are now, if this is better."""
        better = (loss < self._loss_step[0]) | always
        if better.is_cpu and not better:
            return
        now = torch.stack([loss, torch.full_like(loss, step)])
        self._loss_step = torch.where(better, now, self._loss_step)
        for weight, kept in self._kept:
            weight.rounding.keep(kept, better.to(kept.q_OGg.device))

    def read(self) -> tuple[float, int]:
        """Loss, and the step it belongs to."""
        loss, step = self._loss_step.tolist()
        return loss, int(step)

    def restore(self) -> None:
        """Go back to them."""
        for weight, kept in self._kept:
            weight.rounding.restore(kept)
            weight.refresh()


def _draws(train: Sequence[int], config: TuneConfig) -> Iterator[list[int]]:
    """Endless draws without replacement, reshuffled each epoch, the same for the same seed."""
    generator = torch.Generator().manual_seed(config.seed)
    size = min(config.samples or config.batch_size, len(train))
    waiting: list[int] = []
    while True:
        if len(waiting) < size:
            waiting = [train[i] for i in torch.randperm(len(train), generator=generator)]
        draw, waiting = waiting[:size], waiting[size:]
        yield draw


@contextmanager
def _sign_descent(
    weights: Sequence[TunedWeight], config: TuneConfig, add_up: AddUp | None, kernels: Kernels
) -> Iterator[Callable[..., None]]:
    """Give a function ``learn(forward, draw, fraction)`` that takes one step at ``fraction`` of the
    learning rates.

    With several processes gradients wait for the end of the backward pass: one that has no sample
    of a batch, or no token for an expert, would leave the others waiting at that weight.
    """
    rate = config.lr or 1.0 / config.iters
    factor_rate = rate if config.factor_lr is None else config.factor_lr
    fraction: float | None = None  # None while micro-batches have still to add their share

    def step(weight: TunedWeight) -> None:
        grad = weight.parameter.grad
        if fraction is not None and grad is not None:
            rates, into = (rate * fraction, factor_rate * fraction), weight.parameter.data
            weight.rounding.step(weight.rows(grad), *rates, weight.rows(into), kernels)
            weight.parameter.grad = None

    def hook_for(weight: TunedWeight) -> Callable[[Tensor], None]:
        return lambda parameter: step(weight)

    def learn(forward: Forward, draw: list[int], step_fraction: float) -> None:
        nonlocal fraction
        parts = [draw[i : i + config.batch_size] for i in range(0, len(draw), config.batch_size)]
        for part in parts:
            fraction = step_fraction if part is parts[-1] else None
            # Only the gradient's sign counts, so the sum of squares needs no division.
            errors = [squared_error(*triple, trim=config.trim) for triple in forward(part)]
            if errors:
                torch.stack(errors).sum().backward()
        for weight in weights:
            if add_up:
                if weight.parameter.grad is None:
                    weight.parameter.grad = torch.zeros_like(weight.parameter)
                add_up([weight.parameter.grad])
            # also those that the last part did not reach, as experts that its tokens did not choose
            step(weight)

    with ExitStack() as stack:
        for weight in weights:
            stack.enter_context(
                asking_for_gradients(weight.parameter, None if add_up else hook_for(weight))
            )
        yield learn


@contextmanager
def asking_for_gradients(
    parameter: torch.nn.Parameter, hook: Callable[[Tensor], None] | None = None
) -> Iterator[None]:
    """While open, the parameter gets gradients, and ``hook`` is called when one is complete; none
    is left behind."""
    with ExitStack() as after:
        after.callback(_without_gradient, parameter)
        parameter.requires_grad_(True)
        if hook:
            after.callback(parameter.register_post_accumulate_grad_hook(hook).remove)
        yield


def _without_gradient(parameter: torch.nn.Parameter) -> None:
    parameter.requires_grad_(False)
    parameter.grad = None
