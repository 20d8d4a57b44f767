"""KL polish: after the last block, scales and norms are tuned together on the output of the whole
model.

The integers stay. Adam learns one factor a group and one a norm's channel (start 1) on
KL(teacher || student). The inputs of the teacher's output head are noted before anything is
quantized. Scales are rounded at every step to values that the file can hold. The result is kept
only if KL on held-out samples falls.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auto_mmround.modalities import PAD
from auto_mmround.model.divergence import Before
from auto_mmround.numerics import grids
from auto_mmround.numerics.grids import Codes, Points
from auto_mmround.numerics.tuner import asking_for_gradients, held_out_split
from auto_mmround.run.leaves import parameter_of
from auto_mmround.run.session import Session

log = logging.getLogger("auto_mmround")

STEPS, RATE = 16, 5e-4  # of Adam; the rate falls linearly to 0


def listen(session: Session) -> Before:
    """Note what the untouched model says to every sample; padding is left out."""
    counted = [own.text_T != PAD for own in session.modalities]
    return Before.of(
        session.model, session.batches, session.precision, counted=counted, place=Tensor.cpu
    )


@dataclass(frozen=True)
class Polished:
    """Codes with tuned scales, and the mean KL of the held-out samples, nats a position, before and
    after."""

    codes: Mapping[str, Codes]
    before: float
    after: float


@dataclass(frozen=True)
class PolishSteps:
    """Adam's steps, each on ``batch`` samples; the rate falls to 0."""

    count: int = STEPS
    rate: float = RATE
    batch: int = 8
    seed: int = 42


def polish(
    model: PreTrainedModel,
    codes: Mapping[str, Codes],
    grid_of: Mapping[str, Points],
    teacher: Before,
    steps: PolishSteps = PolishSteps(),
    *,
    on_step: Callable[[int], None] = lambda step: None,
    graph: Callable[[], AbstractContextManager] = nullcontext,
) -> Polished:
    """Tune scales and norms in place; what they were comes back where held-out KL does not fall,
    and after an error.

    codes: of the weights that the model holds dequantized; integers only. grid_of: what each scale
    may be. graph: open while a sample runs forward and backward.
    """
    train, held = held_out_split(len(teacher.inputs))
    leaves = {name: _Leaf.of(model, name, codes[name], grid_of[name]) for name in grid_of}
    norms = [_Norm.of(parameter) for parameter in norm_weights(model)]
    learners: list[_Leaf | _Norm] = [*leaves.values(), *norms]
    factors = [learner.factor for learner in learners]
    before = _held_out(model, teacher.only(held))
    best, kept = before, [factor.clone() for factor in factors]
    adam = torch.optim.Adam(factors, lr=steps.rate)
    generator = torch.Generator().manual_seed(steps.seed)
    with _learning(learners):
        for step in range(1, steps.count + 1):
            adam.param_groups[0]["lr"] = steps.rate * (1 - (step - 1) / steps.count)
            order = torch.randperm(len(train), generator=generator)[: steps.batch].tolist()
            batch = teacher.only([train[i] for i in order])
            batch.divergences(model, gradients=True, mean=True, graph=graph)
            adam.step()
            adam.zero_grad()
            for learner in learners:
                learner.refresh()
            on_step(step)
            if step % max(1, steps.count // 4) == 0 or step == steps.count:
                now = _held_out(model, teacher.only(held))
                if now < best:
                    best, kept = now, [factor.clone() for factor in factors]
        for factor, value in zip(factors, kept, strict=True):
            factor.copy_(value)
        for learner in learners:
            learner.refresh()
        if best == before:
            log.warning("polish: held-out KL stays at %.4g; so do scales and norms", before)
        return Polished({name: leaf.codes() for name, leaf in leaves.items()}, before, best)


@dataclass(frozen=True)
class _Leaf:
    """A quantized weight W~ = s * f * u with integers u = q - z that stay."""

    parameter: nn.Parameter
    transposed: bool
    start: Codes
    grid: Points
    centred_OGg: Tensor
    factor: Tensor

    @classmethod
    def of(cls, model: nn.Module, name: str, codes: Codes, grid: Points) -> "_Leaf":
        parameter, transposed = parameter_of(model, name)
        q_OGg = grids.to_groups(codes.q_OI.to(parameter.device).short(), codes.group_size)
        centred_OGg = q_OGg - codes.zero_OG.to(parameter.device).short()[..., None]
        ones_OG = torch.ones(centred_OGg.shape[:2], device=parameter.device)
        return cls(parameter, transposed, codes, grid, centred_OGg, ones_OG)

    def scale(self) -> Tensor:
        """(out, G) float32; the start's own where the factor is 1."""
        scale_OG = self.start.scale_OG.float().to(self.factor.device)
        return torch.where(self.factor == 1, scale_OG, self.grid.storable(scale_OG * self.factor))

    def codes(self) -> Codes:
        """The same integers under the tuned scales."""
        return self.start._replace(scale_OG=self.scale().to(self.start.scale_OG.dtype).cpu())

    def learn(self, grad: Tensor) -> None:
        """dL/df = s * sum over the group of u * dL/dW~, added to the factor's gradient."""
        grad_OI = grad.t() if self.transposed else grad.flatten(1)
        grad_OGg = grids.to_groups(grad_OI, self.centred_OGg.shape[-1])
        along_OG = (grad_OGg * self.centred_OGg).sum(-1, dtype=torch.float32)
        _add_gradient(self.factor, along_OG * self.start.scale_OG.float().to(grad.device))

    def refresh(self) -> None:
        """Write W~ into the parameter, in place."""
        rows = self.parameter.data.t() if self.transposed else self.parameter.data
        w_OI = grids.from_groups(
            self.centred_OGg * self.scale()[..., None], self.start.q_OI.shape[1]
        )
        rows.copy_(w_OI.view_as(rows))

    def reset(self) -> None:
        """W~ as it was at the start."""
        self.factor.fill_(1)
        self.refresh()


@dataclass(frozen=True)
class _Norm:
    """A norm's weight, times one factor a channel. A weight of zero stays (Gemma's norms multiply
    by 1 + weight)."""

    parameter: nn.Parameter
    start: Tensor
    factor: Tensor

    @classmethod
    def of(cls, parameter: nn.Parameter) -> "_Norm":
        start = parameter.data.clone()
        return cls(parameter, start, torch.ones_like(start, dtype=torch.float32))

    def learn(self, grad: Tensor) -> None:
        """dL/df = w * dL/dw."""
        _add_gradient(self.factor, grad.float() * self.start.float())

    def refresh(self) -> None:
        """Write the weight into the parameter, in place."""
        self.parameter.data.copy_(self.start.float() * self.factor)

    def reset(self) -> None:
        """The weight as it was."""
        self.parameter.data.copy_(self.start)


def _add_gradient(factor: Tensor, grad: Tensor) -> None:
    factor.grad = grad if factor.grad is None else factor.grad + grad


def norm_weights(model: nn.Module) -> list[nn.Parameter]:
    """Weights of one dimension, which norms have, each once."""
    own = (
        p
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if name == "weight"
    )
    return list({id(p): p for p in own if p.ndim == 1}.values())


@contextmanager
def _learning(learners: Sequence[_Leaf | _Norm]) -> Iterator[None]:
    """Gradients of the parameters go to the factors the moment they are complete, and are gone.
    Where the work fails, the parameters hold again what factors of 1 give."""

    def hook_for(learner: _Leaf | _Norm) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            learner.learn(parameter.grad)
            parameter.grad = None

        return hook

    with ExitStack() as after, ExitStack() as undo:
        for learner in learners:
            undo.callback(learner.reset)
            after.enter_context(asking_for_gradients(learner.parameter, hook_for(learner)))
        yield
        undo.pop_all()


def _held_out(model: PreTrainedModel, before: Before) -> float:
    """Mean KL a position over the samples."""
    return sum(before.divergences(model)) / max(before.positions, 1)
