"""What each number of bits would do to the model's output, weight by weight: one pass over some samples a stage."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auto_mmround.calibration.inputs import MODALITIES, PAD, TEXT, ModelInput
from auto_mmround.model import devices
from auto_mmround.model.capture import capture
from auto_mmround.model.chains import Chain, Kinds, as_dtype, token_kinds
from auto_mmround.model.experts import separated
from auto_mmround.model.fisher import block_gradients, pairs_of, spread
from auto_mmround.numerics.gram import Moments
from auto_mmround.numerics.sensitivity import Seen, rounding_damage
from auto_mmround.numerics.start import StartConfig, collecting
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.plan import Plan, WeightPlan, grid_of

GRADIENTS, MOMENTS = 2048, 8192  # tokens that are run backwards, and whose second moments are taken
MOST = 24  # samples of a set that are run backwards: a tower may have many tokens for few of text


@dataclass(frozen=True)
class Sets:
    """Samples by the medium that they have beside text, and text alone. of: the set of each sample, as an index."""

    names: tuple[str, ...]
    of: tuple[int, ...]

    @classmethod
    def by_medium(cls, modalities: Sequence[Kinds]) -> "Sets":
        """A sample with several media goes to the last of MODALITIES."""
        media = [max((k for k in kinds.text_T.unique().tolist() if k != PAD), default=TEXT) for kinds in modalities]
        present = sorted(set(media))
        return cls(tuple(MODALITIES[k] for k in present), tuple(present.index(k) for k in media))

    def choose(self, modalities: Sequence[Kinds], tokens: int, most: int = 10**9) -> list[int]:
        """Samples with about ``tokens`` of text together, as many from each set, at most ``most``, spread evenly."""
        chosen: list[int] = []
        for s in range(len(self.names)):
            members = [i for i, own in enumerate(self.of) if own == s]
            picked = spread([modalities[i] for i in members], tokens // len(self.names))
            few = min(most, len(picked))
            chosen += [members[picked[k * len(picked) // few]] for k in range(few)]
        return sorted(chosen)


@dataclass(frozen=True)
class Damage:
    """sets: names of the S sets of samples. of: weight -> bits -> nats a position (S,) that rounding it alone adds."""

    sets: tuple[str, ...]
    of: Mapping[str, Mapping[int, Tensor]]


def measure(
    model: PreTrainedModel,
    recipe: Recipe,
    plan: Plan,
    inputs: Sequence[ModelInput],
    options: Mapping[str, Sequence[int]],
    on_block: Callable[[int, int], None] = lambda done, total: None,
) -> Damage:
    """What rounding each weight alone to each of its options adds to KL(model || quantized model).

    options: weight -> bits to try. Each is rounded in closed form, as the run will begin, and judged to second order,
    see `numerics.sensitivity`. Costs two passes forward and backward over 2,048 tokens, one forward over 8,192 and a
    closed form an option; memory for the hidden states of these tokens at every block, and for one block's second
    moments, inputs and gradients. Weights that no token reaches are left out.
    """
    device = model.device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def precision() -> AbstractContextManager:
        return devices.autocast(device, dtype, recipe.amp)

    kinds = [Kinds(sample.modality_T, sample.tower_F) for sample in inputs]
    sets = Sets.by_medium(kinds)
    few = sets.choose(kinds, GRADIENTS, MOST)
    many = sorted({*few, *sets.choose(kinds, MOMENTS)})
    batches = {i: as_dtype(inputs[i].kwargs, dtype) for i in many}
    planned = [weight for weight in plan.weights if weight.name in options and weight.block]
    found: dict[str, dict[int, Tensor]] = {}
    with separated(model):
        by_place, counts = block_gradients(
            model, plan.stages, [batches[i] for i in few], seed=recipe.seed, precision=precision
        )
        gradients = {(block, many.index(few[k]), place): grad for (block, k, place), grad in by_place.items()}
        positions = [sum(n for i, n in zip(few, counts) if sets.of[i] == s) for s in range(len(sets.names))]
        chains = capture(model, plan.stages, list(batches.values()), precision=precision, store=device)
        done, total = 0, sum(chain.stage.depth for chain in chains.values())
        for chain in chains.values():
            for index, block in enumerate(chain.stage.blocks):
                here = {weight.name: weight for weight in planned if weight.block == block}
                with precision():
                    seen = _seen(model, chain, index, list(here), gradients, [sets.of[i] for i in many])
                    chain, moments = _moments(model, chain, index, list(here), [kinds[i] for i in many])
                for group in _alike(list(here.values()), moments, options):
                    found |= _damage(model, group, moments, seen, positions, options[group[0].name], recipe)
                done += 1
                on_block(done, total)
    return Damage(sets.names, found)


def _seen(
    model: PreTrainedModel,
    chain: Chain,
    index: int,
    names: Sequence[str],
    gradients: Mapping[tuple[str, int, int], Tensor],
    parts: Sequence[int],
) -> dict[str, list[Seen]]:
    """Layer -> what it saw: the samples whose gradient at the block's output is known, run through the block again."""
    path = chain.stage.blocks[index]
    block, layers = model.get_submodule(path), {name: model.get_submodule(name) for name in names}
    places: Counter[int] = Counter()
    found: dict[str, list[Seen]] = {name: [] for name in names}
    for entry, sample in enumerate(chain.sample):
        gradient = gradients.get((path, sample, places[sample]))
        places[sample] += 1
        if gradient is not None:
            with torch.enable_grad(), pairs_of(block, layers) as pairs:
                output = chain.run_group([block], index, [entry])
                output.backward(gradient.reshape(output.shape).to(output))
            for name, calls in pairs.items():
                found[name] += [Seen(x_TI, g_TO, parts[sample]) for x_TI, g_TO in calls]
    return found


def _moments(
    model: PreTrainedModel, chain: Chain, index: int, names: Sequence[str], kinds: Sequence[Kinds]
) -> tuple[Chain, dict[str, Moments]]:
    """The chain after a block, and layer -> second moments of its inputs, padding left out."""
    block = model.get_submodule(chain.stage.blocks[index])
    entries = iter(range(len(chain)))
    current: list[Tensor] = []
    with collecting({name: model.get_submodule(name) for name in names}, lambda name: current[0]) as collector:

        def begin(*_: Any) -> None:
            entry = next(entries)
            tokens = chain.hidden[entry].shape[:-1].numel()
            current[:] = [(token_kinds(chain.stage, kinds[chain.sample[entry]], tokens) != PAD).float()]
            collector.next_pass()

        handle = block.register_forward_pre_hook(begin)
        try:
            return chain.advanced([block], index, batch_size=1), collector.moments()
        finally:
            handle.remove()


def _alike(
    planned: Sequence[WeightPlan], moments: Mapping[str, Moments], options: Mapping[str, Sequence[int]]
) -> list[list[WeightPlan]]:
    """Weights that share inputs and choices: solved together."""
    found: dict[Any, list[WeightPlan]] = {}
    for weight in planned:
        if weight.name in moments:
            key = (id(moments[weight.name]), weight.scheme, tuple(options[weight.name]))
            found.setdefault(key, []).append(weight)
    return list(found.values())


def _damage(
    model: PreTrainedModel,
    group: Sequence[WeightPlan],
    moments: Mapping[str, Moments],
    seen: Mapping[str, Sequence[Seen]],
    positions: Sequence[int],
    options: Sequence[int],
    recipe: Recipe,
) -> dict[str, dict[int, Tensor]]:
    layers: list[Any] = [model.get_submodule(weight.name) for weight in group]
    weights_OI = [(layer.weight.t() if isinstance(layer, Conv1D) else layer.weight).detach() for layer in layers]
    config = StartConfig(dampening=recipe.dampening, order=recipe.actorder)  # type: ignore[arg-type]
    found: dict[str, dict[int, Tensor]] = {weight.name: {} for weight in group}
    for bits in options:
        scheme = group[0].scheme_at(bits)
        damage_NS = rounding_damage(
            weights_OI, moments[group[0].name], [seen[weight.name] for weight in group], positions,
            scheme.group_size, grid_of(scheme), config,
        )  # fmt: skip
        for weight, damage_S in zip(group, damage_NS, strict=True):
            found[weight.name][bits] = damage_S
    return found
