"""Perplexity, KL to the reference by modality, agreement and answer accuracy.

All figures come from one teacher-forced forward pass per sample. An answer is right if each of its
tokens, the closing one included, is the most likely one. Greedy decoding gives exactly the same
verdict, since it agrees with teacher forcing up to the first wrong token.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from auto_mmround.calibration.inputs import ModelInput, token_ids
from auto_mmround.errors import UserError
from auto_mmround.modalities import MODALITIES, PAD
from auto_mmround.model import chains, devices
from auto_mmround.model.chains import as_dtype
from auto_mmround.model.head import parts
from auto_mmround.model.lockstep import in_turn
from auto_mmround.model.passes import run_model
from auto_mmround.model.streaming import device_of
from auto_mmround.run.met import naming


@dataclass
class Metrics:
    """Sums over samples; the properties are the figures. kl: nats per token, by modality."""

    tokens: int = 0
    log_loss: float = 0.0
    hits: int = 0
    answers: int = 0
    right: int = 0
    positions: dict[str, int] = field(default_factory=dict)
    kl_sum: dict[str, float] = field(default_factory=dict)
    agreed: dict[str, int] = field(default_factory=dict)

    @property
    def perplexity(self) -> float | None:
        """exp of the mean log loss over plain text; over answers if there is no plain text."""
        if self.tokens:
            return float(torch.tensor(self.log_loss / self.tokens, dtype=torch.float64).exp())
        return None

    @property
    def accuracy(self) -> float | None:
        """Share of answers that greedy decoding gives exactly."""
        return self.right / self.answers if self.answers else None

    @property
    def kl(self) -> dict[str, float]:
        """Mean KL(reference || model) by modality."""
        return {name: total / self.positions[name] for name, total in self.kl_sum.items()}

    @property
    def agreement(self) -> dict[str, float]:
        """Share of positions at which both find the same token most likely, by modality."""
        return {name: count / self.positions[name] for name, count in self.agreed.items()}

    def as_dict(self) -> dict[str, Any]:
        """Plain figures for JSON."""
        figures = {
            "perplexity": self.perplexity,
            "accuracy": self.accuracy,
            "answers": self.answers,
        }
        return figures | {"kl": self.kl, "agreement": self.agreement, "positions": self.positions}


def moved(model: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs on the model's device, floating ones in its dtype."""
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return chains.moved(as_dtype(dict(kwargs), dtype), device_of(model))


def logits_of(model: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """Float32 logits (T, vocabulary) of one sample."""
    return _own_logits(model, kwargs).float()


def _own_logits(model: Any, kwargs: Mapping[str, Any]) -> Tensor:
    """The same in the model's dtype."""
    with torch.inference_mode(), devices.products(device_of(model), model.dtype):
        return run_model(model, moved(model, kwargs)).logits.flatten(0, -2)


def logits_in_turn(
    model: Any,
    inputs: Sequence[Mapping[str, Any]],
    blocks: Sequence[str] = (),
    of: Callable[[Any, Mapping[str, Any]], Tensor] = logits_of,
) -> Generator[Tensor, None, None]:
    """`logits_of` each sample, one in memory at a time. blocks: of a streamed model, see
    `in_turn`."""
    works = [partial(of, model, kwargs) for kwargs in inputs]
    return in_turn(model, blocks, works, inputs, at_head=True)


def measure(
    models: Sequence[Any],
    inputs: Iterable[ModelInput],
    *,
    reference: Any = None,
    on_sample: Callable[[int], None] = lambda i: None,
    blocks: Mapping[Any, Sequence[str]] | None = None,
) -> list[Metrics]:
    """Figures of several models over the same samples, with KL if a ``reference`` model is given.

    Each model runs once per sample. blocks: of streamed models, those that are read when their turn
    comes.
    """
    inputs = list(inputs)
    plain_text = any(bool(sample.answer_T.all()) for sample in inputs)
    measured = [Metrics() for _ in models]
    given = [sample.kwargs for sample in inputs]
    running = dict.fromkeys([*([] if reference is None else [reference]), *models])
    with ExitStack() as stack:
        passes = {
            model: stack.enter_context(
                closing(logits_in_turn(model, given, (blocks or {}).get(model, ()), _own_logits))
            )
            for model in running
        }
        for i, sample in enumerate(inputs):
            with naming(inputs):  # side by side, any of them may not be taken
                made = {model: next(each) for model, each in passes.items()}
            teacher_TV = None if reference is None else made[reference]
            for model, logits_TV in made.items():
                _check_comparable(logits_TV, teacher_TV)
                mine = [m for each, m in zip(models, measured, strict=True) if each is model]
                if mine:
                    scored = _scored(logits_TV, teacher_TV, sample)
                    for metrics in mine:
                        _add_sample(metrics, scored, sample, plain_text)
            on_sample(i)
    return measured


def _check_comparable(logits_TV: Tensor, teacher_TV: Tensor | None) -> None:
    if teacher_TV is not None and logits_TV.shape != teacher_TV.shape:
        mine, its = (" x ".join(map(str, t.shape)) for t in (logits_TV, teacher_TV))
        raise UserError(
            f"the reference is another model: it gives {its} logits (tokens x words) for a sample,"
            f" this one {mine}"
        )


class _Scored(NamedTuple):
    """Of T positions, in host memory: the most likely token, the log loss of the next one (T - 1;
    none where a model that hears writes no word for a word), KL to the reference, and whether its
    most likely token is the same."""

    best_T: Tensor
    loss_T: Tensor | None
    kl_T: Tensor | None
    same_T: Tensor | None


def _scored(logits_TV: Tensor, teacher_TV: Tensor | None, sample: ModelInput) -> _Scored:
    """In float32, as many positions at a time as there is room for: all together take six times
    the room of the logits."""
    ids_T = token_ids(sample.kwargs)[0].to(logits_TV.device)
    told = ids_T.ndim == 1 and len(ids_T) == len(logits_TV)
    given = (logits_TV,) if teacher_TV is None else (logits_TV, teacher_TV)
    best, losses, kls, same, at = [], [], [], [], 0
    for own_TV, *was in parts(nn.Identity(), *given):
        scores_TV = own_TV.float().log_softmax(-1)
        best.append(scores_TV.argmax(-1))
        if told:
            next_T = ids_T[at + 1 : at + 1 + len(own_TV)]
            losses.append(-scores_TV[: len(next_T)].gather(1, next_T[:, None])[:, 0])
        for its_TV in was:
            was_TV = its_TV.to(scores_TV).log_softmax(-1)
            kls.append((was_TV.exp() * (was_TV - scores_TV)).sum(-1))
            same.append(best[-1] == was_TV.argmax(-1))
        at += len(own_TV)
    of_all = [torch.cat(part).cpu() if part else None for part in (losses, kls, same)]
    return _Scored(torch.cat(best).cpu(), *of_all)


def _add_sample(metrics: Metrics, scored: _Scored, sample: ModelInput, text: bool) -> None:
    best_T, loss_T, kl_T, same_T = scored
    ids_T, answer_T = token_ids(sample.kwargs)[0].cpu(), sample.answer_T.cpu()
    is_text = bool(answer_T.all())
    wanted, hits = answer_T[1:], best_T[:0] if loss_T is None else best_T[:-1] == ids_T[1:]
    if loss_T is not None and is_text == text:
        metrics.log_loss += loss_T[wanted].double().sum().item()
        metrics.tokens += int(wanted.sum())
        metrics.hits += int(hits[wanted].sum())
    if loss_T is not None and not is_text:
        for start, end in _runs(wanted.tolist()):
            metrics.answers += 1
            metrics.right += bool(hits[start:end].all())
    if kl_T is not None and same_T is not None:
        modality_T = sample.modality_T.cpu()
        modality_T = (
            modality_T if len(modality_T) == len(kl_T) else modality_T[:1].expand(len(kl_T))
        )
        for code in modality_T.unique().tolist():
            if code == PAD:
                continue
            here, name = modality_T == code, MODALITIES[code]
            metrics.positions[name] = metrics.positions.get(name, 0) + int(here.sum())
            metrics.kl_sum[name] = metrics.kl_sum.get(name, 0.0) + kl_T[here].double().sum().item()
            metrics.agreed[name] = metrics.agreed.get(name, 0) + int(same_T[here].sum())


def _runs(flags: Sequence[bool]) -> Iterator[tuple[int, int]]:
    """(start, end) of every run of True."""
    start = None
    for i, flag in enumerate([*flags, False]):
        if flag and start is None:
            start = i
        elif not flag and start is not None:
            yield start, i
            start = None
