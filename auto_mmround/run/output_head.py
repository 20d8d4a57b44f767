"""The output head: its inputs are what the last norm gives, its loss is the KL of the words.

To second order the KL is half the logits' error under diag(p) - p p^T. That needs second moments
for each word. All words share one instead: a token's weight in it is the trace, 1 - sum p^2.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from auto_mmround.modalities import PAD
from auto_mmround.model.chains import moved
from auto_mmround.model.head import ToHead, parts, to_head
from auto_mmround.numerics.moments import Moments
from auto_mmround.numerics.start import closed_forms
from auto_mmround.numerics.tuner import TunedWeight, held_out_split
from auto_mmround.run.nearest import Nearest
from auto_mmround.run.plan import WeightPlan
from auto_mmround.run.session import Session


class HeadTuner:
    """Solves an output head in closed form on what the model as it is hands to it; kept where KL on
    the held-out samples falls. Use it with the head's weight as it was.

    Of several processes each runs its share of the samples. Nothing is done (``known`` is False)
    where something comes after the head, a soft cap or a scale.
    """

    def __init__(self, session: Session, planned: WeightPlan):
        self._session, self._planned = session, planned
        every = range(len(session.batches))
        self._train, self._held_out = map(set, held_out_split(len(session.batches)))
        self._share = session.processes.share(every)
        self._held: list[Tensor] = []
        self._device = session.model.get_submodule(planned.name).get_parameter("weight").device
        self._moments = Moments(planned.in_features, device=self._device)
        with torch.no_grad(), session.precision():
            read = to_head(session.model, moved(dict(session.batches[0]), session.device))
            head = session.model.get_submodule(planned.name)
            self.known = isinstance(head, nn.Linear) and self._reads(read, head)

    @classmethod
    def of(cls, session: Session, planned: WeightPlan) -> "HeadTuner | None":
        """None where the head's outputs are not what makes the words."""
        blocks = [block for stage in session.plan.stages for block in stage.blocks]
        with session.serving(blocks):
            tuner = cls(session, planned)
        return tuner if tuner.known else None

    def _reads(self, read: ToHead, head: nn.Linear) -> bool:
        """Run the samples; whether what is read is what the head is given."""
        session, weight = self._session, self._planned
        for i in self._share:
            x_TD, last = read(session.model, moved(dict(session.batches[i]), session.device))
            if last is not head:
                return False
            modality_T = session.modalities[i].text_T
            if len(modality_T) == len(x_TD):
                x_TD = x_TD[(modality_T != PAD).nonzero()[:, 0].to(x_TD.device)]
            if i in self._held_out:
                self._held.append(x_TD.cpu())
            if i in self._train:
                for (part_TD,) in parts(head, x_TD):
                    chance_TV = head(part_TD).float().softmax(-1)
                    as_served = session.served.seen_by(weight, part_TD)
                    self._moments.add(as_served, 1 - chance_TV.square().sum(-1))
        return True

    def tune(self, leaf: TunedWeight) -> dict[str, float]:
        """Put the weight at the better of nearest and the closed form. Of the report: nearest,
        start (the closed form) and end, KL in nats a position of the held-out samples."""
        session, name = self._session, self._planned.name
        error = self.divergence(leaf)
        nearest = Nearest.of({name: leaf}, error)
        moments = session.processes.add_moments({name: self._moments}, self._device)
        closed_forms({name: leaf.rounding}, moments, session.solving)
        leaf.refresh()
        solved = self.divergence(leaf)
        if not solved < error:
            nearest.put_back({name: leaf})
        return {"nearest": error, "start": solved, "end": min(error, solved)}

    def divergence(self, leaf: TunedWeight) -> float:
        """KL(the head as it was || the head), nats a position."""
        session = self._session
        head = session.model.get_submodule(self._planned.name)
        sums = torch.zeros(2, dtype=torch.float64)
        with torch.no_grad(), session.precision():
            original = leaf.rounding.original().to(leaf.parameter.dtype)
            bias = getattr(head, "bias", None)
            for wanted_TV, own_TV in self._words(head, original, bias):
                sums[0] += (wanted_TV.exp() * (wanted_TV - own_TV)).sum().cpu().double()
                sums[1] += len(own_TV)
        session.processes.add_up([sums])
        return (sums[0] / sums[1].clamp(min=1)).item()

    def _words(
        self, head: nn.Module, original: Tensor, bias: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        for held_TD in self._held:
            for (x_TD,) in parts(head, held_TD.to(self._device)):
                wanted = linear(x_TD, original, bias).float().log_softmax(-1)
                seen_TD = self._session.served.seen_by(self._planned, x_TD)
                own = linear(seen_TD, head.get_parameter("weight"), bias)
                yield wanted, own.float().log_softmax(-1)
