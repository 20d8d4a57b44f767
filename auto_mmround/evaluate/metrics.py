"""Perplexity, KL to the reference by modality, agreement and answer accuracy.

All figures come from one teacher-forced forward pass per sample. An answer is right if each of its
tokens, the closing one included, is the most likely one. Greedy decoding gives exactly the same
verdict, since it agrees with teacher forcing up to the first wrong token.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from auto_mmround.calibration.inputs import MODALITIES, PAD, ModelInput, token_ids
from auto_mmround.model import chains, devices
from auto_mmround.model.chains import as_dtype
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
        return (
            float(torch.tensor(self.log_loss / self.tokens, dtype=torch.float64).exp())
            if self.tokens
            else None
        )

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
    with torch.inference_mode(), devices.products(device_of(model), model.dtype):
        return run_model(model, moved(model, kwargs)).logits[0].flatten(0, -2).float()


def logits_in_turn(
    model: Any, inputs: Sequence[Mapping[str, Any]], blocks: Sequence[str] = ()
) -> Generator[Tensor, None, None]:
    """`logits_of` each sample, one in memory at a time. blocks: of a streamed model, see
    `in_turn`."""
    works = [partial(logits_of, model, kwargs) for kwargs in inputs]
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
                closing(logits_in_turn(model, given, (blocks or {}).get(model, ())))
            )
            for model in running
        }
        for i, sample in enumerate(inputs):
            with naming(inputs):  # side by side, any of them may not be taken
                made = {model: next(each) for model, each in passes.items()}
            teacher = None if reference is None else made.pop(reference).log_softmax(-1)
            for model in running:
                scores = made.pop(model).log_softmax(-1) if model in made else teacher
                assert scores is not None  # the reference has its own
                for each, metrics in zip(models, measured, strict=True):
                    if each is model:
                        _add_sample(metrics, scores, teacher, sample, plain_text)
            on_sample(i)
    return measured


def _add_sample(
    metrics: Metrics, scores_TV: Tensor, teacher_TV: Tensor | None, sample: ModelInput, text: bool
) -> None:
    ids_T = token_ids(sample.kwargs)[0].to(scores_TV.device)
    answer_T = sample.answer_T.to(scores_TV.device)
    is_text = bool(answer_T.all())
    best_T = scores_TV.argmax(-1)
    told = ids_T.shape == best_T.shape  # not of models that hear and write no word for a word
    wanted, hits = answer_T[1:], best_T[:-1] == ids_T[1:] if told else best_T[:0]
    if told and is_text == text:
        losses = -scores_TV[:-1].gather(1, ids_T[1:, None])[:, 0]
        metrics.log_loss += losses[wanted].double().sum().item()
        metrics.tokens += int(wanted.sum())
        metrics.hits += int(hits[wanted].sum())
    if not is_text:
        for start, end in _runs(wanted.tolist()):
            metrics.answers += 1
            metrics.right += bool(hits[start:end].all())
    if teacher_TV is not None:
        kl_T = (teacher_TV.exp() * (teacher_TV - scores_TV)).sum(-1)
        same_T = best_T == teacher_TV.argmax(-1)
        kind_T = sample.modality_T.to(kl_T.device)
        kind_T = kind_T if len(kind_T) == len(kl_T) else kind_T[:1].expand(len(kl_T))
        for code in kind_T.unique().tolist():
            if code == PAD:
                continue
            here, name = kind_T == code, MODALITIES[code]
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
