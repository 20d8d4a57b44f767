"""How far a model has moved from what it was, in nats, and the gradient of that in its weights."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auto_mmround.model.chains import Precision, moved
from auto_mmround.model.head import ToHead, parts, to_head
from auto_mmround.model.streaming import device_of


@dataclass(frozen=True)
class Before:
    """What a model said of some samples before it was changed.

    hidden_TD: what its output head read, by sample, at the positions that count; the logits, where
      more than a head makes them. counted: bool (T,) by sample; None: all positions.
    """

    inputs: Sequence[Mapping[str, Any]]
    hidden_TD: Sequence[Tensor]
    read: ToHead
    precision: Precision
    counted: Sequence[Tensor | None]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        inputs: Sequence[Mapping[str, Any]],
        precision: Precision = nullcontext,
        counted: Sequence[Tensor | None] | None = None,
        place: Callable[[Tensor], Tensor] = Tensor.clone,
    ) -> "Before":
        """inputs: what the model takes, a mapping a sample; kept where they are. counted: see the
        class; where the model's output has another length, all positions are. place: where hidden
        states are kept."""
        hidden_TD, kept = [], []
        with torch.no_grad(), precision():
            device = device_of(model)
            read = to_head(model, moved(dict(inputs[0]), device))
            for sample, own_T in zip(inputs, counted or [None] * len(inputs), strict=True):
                all_TD = read(model, moved(dict(sample), device))[0]
                fits = own_T is not None and len(own_T) == len(all_TD) and not own_T.all()
                kept.append(own_T if fits else None)
                hidden_TD.append(place(_at(all_TD, kept[-1])))
        return cls(inputs, hidden_TD, read, precision, kept)

    def only(self, members: Sequence[int]) -> "Before":
        """Of some of the samples."""
        return replace(
            self,
            inputs=[self.inputs[i] for i in members],
            hidden_TD=[self.hidden_TD[i] for i in members],
            counted=[self.counted[i] for i in members],
        )

    @property
    def positions(self) -> int:
        """Those that count, of all samples."""
        return sum(map(len, self.hidden_TD))

    def divergences(
        self,
        model: PreTrainedModel,
        *,
        gradients: bool = False,
        mean: bool = False,
        graph: Callable[[], AbstractContextManager] = nullcontext,
    ) -> list[float]:
        """KL(the model as it was || the model) of every sample, summed over its positions, nats.

        The output head must be the same still. gradients: run it backwards too, into all that asks
        for gradients; mean: there every sample counts alike, however long it is.
        graph: open while a sample runs.
        """
        kls, device = [], device_of(model)
        for sample, before_TD, own_T in zip(self.inputs, self.hidden_TD, self.counted, strict=True):
            with graph(), self.precision(), torch.set_grad_enabled(gradients):
                all_TD, head = self.read(model, moved(dict(sample), device))
                hidden_TD = _at(all_TD, own_T)
                before_TD = before_TD.to(hidden_TD.device)
                kl, slope_TD = _divergence(hidden_TD.detach(), before_TD, head, gradients)
                if gradients and hidden_TD.requires_grad:
                    hidden_TD.backward(slope_TD / len(slope_TD) if mean else slope_TD)
            kls.append(kl)
        return torch.stack(kls).tolist() if kls else []


def _at(hidden_TD: Tensor, counted_T: Tensor | None) -> Tensor:
    if counted_T is None:
        return hidden_TD
    return hidden_TD[counted_T.nonzero()[:, 0].to(hidden_TD.device)]


def _divergence(
    hidden_TD: Tensor, before_TD: Tensor, head: nn.Module, gradients: bool
) -> tuple[Tensor, Tensor]:
    """The sum over positions, and its gradient in the hidden states: through the head, q - p at its
    logits.

    Logits are made a few positions at a time.
    """
    # not every accelerator has doubles
    dtype = torch.float64 if hidden_TD.is_cpu else torch.float32
    total = torch.zeros((), dtype=dtype, device=hidden_TD.device)
    slope_TD = torch.zeros_like(hidden_TD)
    for part_TD, was_TD, into_TD in parts(head, hidden_TD, before_TD, slope_TD):
        leaf_TD = part_TD.clone().requires_grad_(gradients)
        logits_TV = head(leaf_TD)
        own_TV = logits_TV.detach().float().log_softmax(-1)
        wanted_TV = head(was_TD).detach().float().log_softmax(-1)
        chance_TV = wanted_TV.exp()
        total += (chance_TV * (wanted_TV - own_TV)).sum()
        if gradients:
            step_TV = (own_TV.exp_() - chance_TV).to(logits_TV.dtype)
            into_TD.copy_(torch.autograd.grad(logits_TV, leaf_TD, step_TV)[0])
    return total, slope_TD
