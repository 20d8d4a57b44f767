"""The damage of fewer bits, or of a scheme, to the model's output: of each weight with each option,
and of a whole choice. Inputs are rounded as engines will round them."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auto_mmround.modalities import MODALITIES, PAD, TEXT
from auto_mmround.model.chains import Chain, Modalities
from auto_mmround.model.divergence import Before
from auto_mmround.model.experts import separated
from auto_mmround.model.fisher import spread
from auto_mmround.model.spool import Spool
from auto_mmround.numerics.moments import Moments
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.start import closed_form
from auto_mmround.numerics.tuner import asking_for_gradients
from auto_mmround.recipe.schemes import Option
from auto_mmround.run.leaves import shared_peaks
from auto_mmround.run.out_of_memory import SHORTER, BatchSize, Graph
from auto_mmround.run.plan import WeightPlan, grid_of
from auto_mmround.run.served import ServedInputs
from auto_mmround.run.session import Session, Told, Window
from auto_mmround.run.static_inputs import input_scales

WHAT, HELPS = "choosing bits", f"name the bits in layer_config, or {SHORTER}"
# tokens on which damage is measured, and those that weights are rounded by
GRADIENTS, MOMENTS = 2048, 8192
# Most samples of a set on which damage is measured: a tower may have many tokens for few of text.
MOST = 24
SHARE = 1 / 3  # of a set's samples at most; weights are rounded on the others
FINE = 6  # from so many bits on, rounding to nearest stands for the closed form: damage is near 0
FULL = 16  # bits: the weight as it was
STEP = 0.5**0.5  # where on the way from W to W + E the gradient is taken


@dataclass(frozen=True)
class Sets:
    """Samples by their medium beside text; text alone is a set too. of: for each sample the index
    of its set."""

    names: tuple[str, ...]
    of: tuple[int, ...]

    @classmethod
    def by_medium(cls, modalities: Sequence[Modalities]) -> "Sets":
        """A sample with several media goes to the last of MODALITIES."""
        media = [
            max((k for k in own.text_T.unique().tolist() if k != PAD), default=TEXT)
            for own in modalities
        ]
        present = sorted(set(media))
        return cls(tuple(MODALITIES[k] for k in present), tuple(present.index(k) for k in media))

    def choose(
        self,
        modalities: Sequence[Modalities],
        tokens: int,
        most: int = 10**9,
        share: float = 1.0,
        without: Sequence[int] = (),
    ) -> list[int]:
        """Samples that hold about ``tokens`` of text together. Each set gives the same number of
        tokens, evenly spread.

        most, share: the most samples of a set, and the largest share of it. without: samples to
        leave out, unless a set has no others.
        """
        chosen: list[int] = []
        for s in range(len(self.names)):
            members = [i for i, own in enumerate(self.of) if own == s]
            members = [i for i in members if i not in without] or members
            picked = spread([modalities[i] for i in members], tokens // len(self.names))
            few = min(most, len(picked), max(1, int(share * len(members))))
            chosen += [members[picked[k * len(picked) // few]] for k in range(few)]
        return sorted(chosen)


@dataclass(frozen=True)
class Damage:
    """sets: names of the S sets of samples. of: weight -> option -> nats a position (S,) that the
    weight and its layer's inputs add with this option."""

    sets: tuple[str, ...]
    of: Mapping[str, Mapping[Option, Tensor]]


@dataclass(frozen=True)
class Versions:
    """Every weight with each option, in one file a block. where: weight -> its file."""

    folder: Path
    where: dict[str, Path] = field(default_factory=dict)

    def add(self, weights: Mapping[str, Mapping[Option, Tensor]]) -> None:
        """Write a block's weights: weight -> option -> values in the layout of its parameter."""
        path = self.folder / f"{len(self.where)}.safetensors"
        save_file(
            {
                f"{name}:{b}": w.contiguous().cpu()
                for name, each in weights.items()
                for b, w in each.items()
            },
            path,
        )
        self.where.update(dict.fromkeys(weights, path))

    def of(self, name: str, bits: Option) -> Tensor:
        """Values of one weight."""
        with safe_open(self.where[name], "pt") as file:
            return file.get_tensor(f"{name}:{bits}")


@dataclass(frozen=True)
class Trial:
    """A model whose weights can take any of their options, and samples to measure the damage on.

    planned: weight -> its plan. served: option -> what rounds inputs of layers. part: the set of
      each sample. Use it inside `trying` only.
    """

    model: PreTrainedModel
    planned: Mapping[str, WeightPlan]
    served: Mapping[Option, ServedInputs]
    options: Mapping[str, Sequence[Option]]
    versions: Versions
    before: Before
    sets: tuple[str, ...]
    part: Sequence[int]
    graph: Graph = field(default_factory=Graph)

    @property
    def positions_S(self) -> Tensor:
        """Positions of the model's output on the samples of each set."""
        return self._by_set([float(len(hidden_TD)) for hidden_TD in self.before.hidden_TD])

    def kl(self, bits: Mapping[str, Option]) -> Tensor:
        """Mean KL(original model || model with these bits), (S,), nats a position. Weights without
        bits here keep their original values."""
        self._put({name: bits.get(name, FULL) for name in self.versions.where})
        served, planned = ServedInputs(), []
        for name in bits.keys() & self.versions.where.keys():
            planned.append(self._at(name, bits[name]))
            if name in (measured := self.served[bits[name]].measured):
                served.measured[name] = measured[name]
        with served.rounding(self.model, planned):
            return self._by_set(self.before.divergences(self.model)) / self.positions_S

    def damage(self) -> Damage:
        """Each weight's share of the KL when all weights have as many bits. A weight without that
        option takes the next one above.

        Let E be the errors of all weights. Along the line W + t E the KL grows by the integral of
        <gradient, E> over t. The integral is a sum over weights, and each term is the share of one
        weight (its Aumann-Shapley value). The KL begins flat and is nearly a t^2 + b t^4. For such
        a curve one gradient, at t = 1 / sqrt(2), gives the integral: <gradient, t E>. Where inputs
        are rounded, they move along their own line in the same way.
        """
        damages: dict[str, dict[Option, Tensor]] = {name: {} for name in self.versions.where}
        for bits in self.served:
            shares = BatchSize().fitting(
                WHAT, partial(self._shares, bits), self.graph.relieve, HELPS
            )
            for name, lost_S in shares.items():
                if bits in self.options[name]:
                    damages[name][bits] = lost_S
        return Damage(self.sets, damages)

    def _shares(self, bits: Option, size: int = 1) -> dict[str, Tensor]:
        """Weight -> its share (S,) of the KL when all have these bits. size: samples at a time,
        always one."""
        at, shares = [0], {name: torch.zeros(len(self.sets)) for name in self.versions.where}
        above = [*self.served][[*self.served].index(bits) :]
        with ExitStack() as stack:
            for name, sums_S in shares.items():
                own = next((option for option in above if option in self.options[name]), FULL)
                stack.enter_context(self._adding(sums_S, at, name, own))
                if own != FULL:
                    stack.enter_context(self._rounding(sums_S, at, name, own))
            for at[0] in range(len(self.sets)):
                members = [i for i, own in enumerate(self.part) if own == at[0]]
                self.before.only(members).divergences(self.model, gradients=True, graph=self.graph)
        return {name: sums_S / self.positions_S for name, sums_S in shares.items()}

    @contextmanager
    def _adding(self, sums_S: Tensor, at: Sequence[int], name: str, bits: Option) -> Iterator[None]:
        """While open, a weight is at W + t E, and each backward pass adds <gradient, t E> to
        ``sums_S[at]``.

        E stays in files until the gradient is there: all of it in memory would be twice the model.
        """
        weight = self.model.get_submodule(name).get_parameter("weight")
        weight.data.copy_(self.versions.of(name, FULL))
        weight.data.add_(self._step(name, bits, weight.device))

        def add(parameter: Tensor) -> None:
            assert parameter.grad is not None
            step = self._step(name, bits, parameter.device)
            sums_S[at[0]] += (parameter.grad.float() * step).sum().item()
            parameter.grad = None

        with asking_for_gradients(weight, add):
            yield

    @contextmanager
    def _rounding(
        self, sums_S: Tensor, at: Sequence[int], name: str, option: Option
    ) -> Iterator[None]:
        """While open, the inputs x of a layer are at x + t e, with e what rounding adds, and each
        backward pass adds <gradient, t e> to ``sums_S[at]``."""
        weight, served = self._at(name, option), self.served[option]
        if weight.scheme is None or weight.scheme.act_bits >= FULL:
            yield
            return

        def hook(layer: nn.Module, args: tuple[Any, ...]) -> Any:
            x = args[0]
            if not x.numel():  # an expert without a token
                return None
            step = (served.seen_by(weight, x.detach()) - x.detach()) * STEP
            seen = x + step
            if torch.is_grad_enabled():
                if not seen.requires_grad:
                    seen.requires_grad_()
                seen.register_hook(partial(add, step))
            return seen, *args[1:]

        def add(step: Tensor, grad: Tensor) -> None:
            sums_S[at[0]] += (grad.float() * step.float()).sum().item()

        handle = self.model.get_submodule(name).register_forward_pre_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    def _at(self, name: str, option: Option) -> WeightPlan:
        """A weight's plan with another option."""
        weight = self.planned[name]
        return replace(weight, scheme=weight.scheme_at(option))

    def _step(self, name: str, bits: Option, device: torch.device) -> Tensor:
        """t E of one weight."""
        full = self.versions.of(name, FULL).to(device)
        return (self.versions.of(name, bits).to(device) - full) * STEP

    def _put(self, bits: Mapping[str, Option]) -> None:
        """Give every weight its option."""
        for name, own in bits.items():
            weight = self.model.get_submodule(name).get_parameter("weight")
            weight.data.copy_(self.versions.of(name, own))

    def _by_set(self, values: Sequence[float]) -> Tensor:
        return torch.zeros(len(self.sets)).index_add(
            0, torch.tensor(self.part), torch.tensor(values)
        )

    def restore(self) -> None:
        """Give all weights their original values."""
        self._put(dict.fromkeys(self.versions.where, FULL))


@contextmanager
def trying(
    session: Session,
    options: Mapping[str, Sequence[Option]],
    on_block: Told = lambda done, total: None,
) -> Iterator[Trial]:
    """A `Trial` of the model. At the end the weights have their original values.

    options: weight -> what to try, from the smallest to the largest. Each option is rounded in
    closed form, as at the start of a run. Rounding and measuring use different samples. Weights
    that no token reaches are left out. Cost: a forward pass over 8,192 tokens of text, a Fisher
    pass if the recipe has one, and a closed form for each option; then a forward and backward pass
    over 2,048 tokens for each option. Disk: two bytes for each weight and option.
    """
    model, sets = session.model, Sets.by_medium(session.modalities)
    few = sets.choose(session.modalities, GRADIENTS, MOST, SHARE)
    many = sets.choose(session.modalities, MOMENTS, without=few)
    with tempfile.TemporaryDirectory() as folder, separated(model, session.experts):
        versions = Versions(Path(folder))
        rounded = session.of(many)
        served = _served(rounded, options)
        _round(replace(rounded, disk=Spool(versions.folder)), options, versions, on_block)
        measured = session.of(few)
        before = Before.of(model, measured.batches, session.precision)
        graph = Graph(model, max(len(own.text_T) for own in measured.modalities))
        planned = {weight.name: weight for weight in session.plan.weights if weight.name in options}
        trial = Trial(
            model, planned, served, options, versions, before, sets.names,
            [sets.of[i] for i in few], graph,
        )  # fmt: skip
        try:
            yield trial
        finally:
            trial.restore()


def _served(
    session: Session, options: Mapping[str, Sequence[Option]]
) -> dict[Option, ServedInputs]:
    """Option, from the smallest to the largest, -> what rounds the inputs of layers that may have
    it."""
    sizes = {
        option: weight.scheme_at(option).stored()
        for weight in session.plan.weights
        for option in options.get(weight.name, ())
    }
    rounding = {option: ServedInputs() for option in sorted(sizes, key=lambda each: sizes[each])}
    for option, served in rounding.items():
        planned = [
            replace(weight, scheme=weight.scheme_at(option))
            for weight in session.plan.weights
            if option in options.get(weight.name, ())
        ]
        served.measured |= input_scales(session, planned)
    return rounding


def _round(
    session: Session, options: Mapping[str, Sequence[Option]], versions: Versions, on_block: Told
) -> None:
    """Fill ``versions``, block by block, on the inputs that the original model gives each block."""
    planned = [weight for weight in session.plan.weights if weight.name in options and weight.block]
    weights = session.weights([weight.name for weight in planned])
    chains = session.record(session.plan.stages, what=WHAT)
    done, total = count(1), sum(chain.stage.depth for chain in chains.values())

    def visit(chain: Chain, window: Window) -> Chain:
        here = [weight for weight in planned if weight.block in window.names]
        with session.collecting(chain, window, [weight.name for weight in here], weights) as (
            collected,
            begin,
        ):
            after = chain.advanced(window.blocks, window.first, 1, before=begin)
        moments, rounded = collected.moments(), dict[str, dict[Option, Tensor]]()
        for group in _alike(here, moments, options):
            rounded |= _rounded(session, group, moments[group[0].name], options[group[0].name])
        if rounded:
            versions.add(rounded)
        on_block(next(done), total)
        return after

    for chain in chains.values():
        session.push(chain, visit)


def _alike(
    planned: Sequence[WeightPlan],
    moments: Mapping[str, Moments],
    options: Mapping[str, Sequence[Option]],
) -> list[list[WeightPlan]]:
    """Groups of weights with the same inputs and options: they are solved together."""
    groups: dict[Any, list[WeightPlan]] = {}
    for weight in planned:
        if weight.name in moments:
            key = (id(moments[weight.name]), weight.scheme, tuple(options[weight.name]))
            groups.setdefault(key, []).append(weight)
    return list(groups.values())


def _rounded(
    session: Session, group: Sequence[WeightPlan], moments: Moments, options: Sequence[Option]
) -> dict[str, dict[Option, Tensor]]:
    """Weight -> option -> values, in the layout and dtype of its parameter."""
    layers: list[Any] = [session.model.get_submodule(weight.name) for weight in group]
    values: dict[str, dict[Option, Tensor]] = {
        weight.name: {FULL: layer.weight.detach().clone()}
        for weight, layer in zip(group, layers, strict=True)
    }
    turned = [isinstance(layer, Conv1D) for layer in layers]
    weights_OI = [
        layer.weight.detach().t() if turn else layer.weight.detach()
        for layer, turn in zip(layers, turned)
    ]
    for bits in options:
        scheme = group[0].scheme_at(bits)
        peaks = shared_peaks(session.model, [replace(weight, scheme=scheme) for weight in group])
        roundings = [
            Rounding(w_OI, scheme.group_size, grid_of(scheme, peaks.get(weight.name)))
            for weight, w_OI in zip(group, weights_OI, strict=True)
        ]
        if scheme.bits < FINE:
            closed_form(roundings, moments, replace(session.solving, retarget=False))
        for weight, layer, rounding, turn in zip(group, layers, roundings, turned, strict=True):
            w_OI = rounding.weight()
            values[weight.name][bits] = (w_OI.t() if turn else w_OI).to(layer.weight.dtype)
    return values
