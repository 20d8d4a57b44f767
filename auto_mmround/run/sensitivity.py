"""What each number of bits would do to the model's output, weight by weight: one pass over some samples a stage."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auto_mmround.calibration.inputs import MODALITIES, PAD, TEXT, ModelInput
from auto_mmround.model import devices
from auto_mmround.model.capture import capture
from auto_mmround.model.chains import Chain, Kinds, as_dtype, token_kinds
from auto_mmround.model.experts import separated
from auto_mmround.model.fisher import FIRST, layer_fisher, spread
from auto_mmround.numerics.gram import Moments
from auto_mmround.numerics.sensitivity import rounding_damage
from auto_mmround.numerics.start import StartConfig, collecting
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.plan import Plan, WeightPlan, grid_of

GRADIENTS, MOMENTS = 2048, 8192  # tokens that are run backwards, and whose second moments are taken

ALL = -1  # beside the sets of samples: their union


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

    def choose(self, modalities: Sequence[Kinds], tokens: int) -> list[int]:
        """Samples with about ``tokens`` together, as many from each set, spread evenly over it."""
        chosen: list[int] = []
        for s in range(len(self.names)):
            members = [i for i, own in enumerate(self.of) if own == s]
            chosen += [members[k] for k in spread([modalities[i] for i in members], tokens // len(self.names))]
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
    see `numerics.sensitivity`. Costs a forward and backward pass over 2,048 tokens, a forward pass over 8,192 and a
    closed form an option; memory for the second moments of one block, of all tokens and of each set of samples.
    Weights that no token reaches are left out.
    """
    device = model.device
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())

    def precision() -> AbstractContextManager:
        return devices.autocast(device, dtype, recipe.amp)

    kinds = [Kinds(sample.modality_T, sample.tower_F) for sample in inputs]
    sets = Sets.by_medium(kinds)
    few, many = (sets.choose(kinds, tokens) for tokens in (GRADIENTS, MOMENTS))
    batches = {i: as_dtype(inputs[i].kwargs, dtype) for i in {*few, *many}}
    planned = [weight for weight in plan.weights if weight.name in options and weight.block]
    found: dict[str, dict[int, Tensor]] = {}
    with separated(model):
        squares = layer_fisher(
            model, plan.stages, [weight.name for weight in planned], [batches[i] for i in few],
            [sets.of[i] for i in few], seed=recipe.seed, precision=precision,
        )  # fmt: skip
        chains = capture(model, plan.stages, [batches[i] for i in many], precision=precision, store=device)
        done, total = 0, sum(chain.stage.depth for chain in chains.values())
        for chain in chains.values():
            masks = _masks(chain, [kinds[i] for i in many], [sets.of[i] for i in many], len(sets.names))
            for index, block in enumerate(chain.stage.blocks):
                here = [weight for weight in planned if weight.block == block and weight.name in squares]
                with precision():
                    chain, moments = _moments(model, chain, index, [weight.name for weight in here], masks)
                for group in _alike(here, moments[ALL], options):
                    found |= _damage(model, group, moments, squares, options[group[0].name], recipe)
                done += 1
                on_block(done, total)
    return Damage(sets.names, found)


def _masks(chain: Chain, kinds: Sequence[Kinds], of: Sequence[int], sets: int) -> list[dict[int, Tensor]]:
    """For each entry of the chain: set -> 1 for its tokens, 0 for padding and those of other sets.

    The first tokens of a text belong to no set: their states may be a thousand times as large, and hardly matter.
    """
    found = []
    for i, hidden in enumerate(chain.hidden):
        sample = chain.sample[i]
        real_T = (token_kinds(chain.stage, kinds[sample], hidden.shape[:-1].numel()) != PAD).float()
        later_T = real_T.clone()
        if chain.stage.name == "text" and len(later_T) > 2 * FIRST:
            later_T[:FIRST] = 0
        found.append({ALL: real_T} | {s: later_T * (of[sample] == s) for s in range(sets)})
    return found


def _moments(
    model: PreTrainedModel, chain: Chain, index: int, names: Sequence[str], masks: Sequence[Mapping[int, Tensor]]
) -> tuple[Chain, dict[int, dict[str, Moments]]]:
    """The chain after a block, and set -> layer -> second moments of its inputs."""
    block = model.get_submodule(chain.stage.blocks[index])
    layers: dict[str, nn.Module] = {name: model.get_submodule(name) for name in names}
    entry = -1

    def weights(s: int, name: str) -> Tensor:
        return masks[entry][s]

    with ExitStack() as stack:
        collectors = {s: stack.enter_context(collecting(layers, partial(weights, s))) for s in masks[0]}

        def begin(*_: Any) -> None:
            nonlocal entry
            entry += 1
            for collector in collectors.values():
                collector.next_pass()

        stack.callback(block.register_forward_pre_hook(begin).remove)
        chain = chain.advanced([block], index, batch_size=1)
    return chain, {s: collector.moments() for s, collector in collectors.items()}


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
    moments: Mapping[int, Mapping[str, Moments]],
    squares: Mapping[str, Tensor],
    options: Sequence[int],
    recipe: Recipe,
) -> dict[str, dict[int, Tensor]]:
    layers: list[Any] = [model.get_submodule(weight.name) for weight in group]
    weights_OI = [(layer.weight.t() if isinstance(layer, Conv1D) else layer.weight).detach() for layer in layers]
    first = group[0].name
    hessians_SII = [moments[s][first].hessian() for s in sorted(moments) if s != ALL]
    squares_SO = [squares[weight.name] for weight in group]
    config = StartConfig(dampening=recipe.dampening, order=recipe.actorder)  # type: ignore[arg-type]
    found: dict[str, dict[int, Tensor]] = {weight.name: {} for weight in group}
    for bits in options:
        scheme = group[0].scheme_at(bits)
        damage_NS = rounding_damage(
            weights_OI, moments[ALL][first], hessians_SII, squares_SO, scheme.group_size, grid_of(scheme), config
        )
        for weight, damage_S in zip(group, damage_NS, strict=True):
            found[weight.name][bits] = damage_S
    return found
