"""How far a model has moved from what it was, in nats, and the gradient of that in its weights."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auto_mmround.model.chains import moved
from auto_mmround.model.fisher import Precision
from auto_mmround.model.head import ToHead, parts, to_head
from auto_mmround.model.streaming import device_of


@dataclass(frozen=True)
class Before:
    """What a model said of some samples before it was changed.

    hidden_TD: what its output head read, by sample; the logits, where more than a head makes them.
    """

    inputs: Sequence[Mapping[str, Any]]
    hidden_TD: Sequence[Tensor]
    read: ToHead
    precision: Precision

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        inputs: Sequence[Mapping[str, Any]],
        precision: Precision = nullcontext,
    ) -> "Before":
        """inputs: what the model takes, a mapping a sample; kept where they are."""
        with torch.no_grad(), precision():
            device = device_of(model)
            read = to_head(model, moved(dict(inputs[0]), device))
            hidden_TD = [read(model, moved(dict(sample), device))[0].clone() for sample in inputs]
        return cls(inputs, hidden_TD, read, precision)

    def only(self, members: Sequence[int]) -> "Before":
        """Of some of the samples."""
        return replace(
            self,
            inputs=[self.inputs[i] for i in members],
            hidden_TD=[self.hidden_TD[i] for i in members],
        )

    def divergences(
        self,
        model: PreTrainedModel,
        *,
        gradients: bool = False,
        graph: Callable[[], AbstractContextManager] = nullcontext,
    ) -> list[float]:
        """KL(the model as it was || the model) of every sample, summed over its positions, nats.

        The output head must be the same still. gradients: run it backwards too, into all that asks
        for gradients.
        graph: open while a sample runs.
        """
        found, device = [], device_of(model)
        for sample, before_TD in zip(self.inputs, self.hidden_TD, strict=True):
            with graph(), self.precision(), torch.set_grad_enabled(gradients):
                hidden_TD, head = self.read(model, moved(dict(sample), device))
                kl, slope_TD = _divergence(hidden_TD.detach(), before_TD, head, gradients)
                if gradients and hidden_TD.requires_grad:
                    hidden_TD.backward(slope_TD)
            found.append(kl)
        return found


def _divergence(
    hidden_TD: Tensor, before_TD: Tensor, head: nn.Module, gradients: bool
) -> tuple[float, Tensor]:
    """The sum over positions, and its gradient in the hidden states: through the head, q - p at its
    logits.

    Logits are made a few positions at a time.
    """
    total, slope_TD = 0.0, torch.zeros_like(hidden_TD)
    for part_TD, was_TD, into_TD in zip(
        *(parts(each, head) for each in (hidden_TD, before_TD, slope_TD)), strict=True
    ):
        leaf_TD = part_TD.clone().requires_grad_(gradients)
        logits_TV = head(leaf_TD)
        own_TV = logits_TV.detach().float().log_softmax(-1)
        wanted_TV = head(was_TD).detach().float().log_softmax(-1)
        chance_TV = wanted_TV.exp()
        total += (chance_TV * (wanted_TV - own_TV)).sum().item()
        if gradients:
            step_TV = (own_TV.exp_() - chance_TV).to(logits_TV.dtype)
            into_TD.copy_(torch.autograd.grad(logits_TV, leaf_TD, step_TV)[0])
    return total, slope_TD
