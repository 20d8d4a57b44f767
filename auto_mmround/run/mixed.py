"""Mixed bits by evidence: from a size to bits for every weight, those that do least damage to the
model's output."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.model.experts import separable
from auto_mmround.recipe.allocation import allocate
from auto_mmround.recipe.patterns import Patterns
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.recipe.schemes import Option, option_keys
from auto_mmround.run.plan import Plan, WeightPlan, fused_set, make_plan, stored_bits
from auto_mmround.run.sensitivity import Damage, Trial, trying
from auto_mmround.run.session import Session, Told

log = logging.getLogger("auto_mmround")

Bits = Mapping[str, Option]  # weight -> what it gets


@dataclass(frozen=True)
class Unit:
    """Weights that must have the same bits, because engines load them as one. options: what they
    may have, from the smallest to the largest."""

    weights: tuple[WeightPlan, ...]
    options: tuple[Option, ...]

    def size(self, bits: Option) -> float:
        """Stored bits, scales and zero points included."""
        return sum(stored_bits(weight, weight.scheme_at(bits)) for weight in self.weights)

    def damage(self, damage: Damage, bits: Option) -> Tensor:
        """Nats a position, by set of samples (S,)."""
        return torch.stack([damage.of[weight.name][bits] for weight in self.weights]).sum(0)


def units(model: PreTrainedModel, recipe: Recipe, plan: Plan) -> list[Unit]:
    """The choices: all planned weights of the blocks, but for those whose bits `layer_config`
    names.

    Raises UserError for bits that a format holds for none of them.
    """
    fixed = Patterns(
        pattern
        for pattern, options in (recipe.layer_config or {}).items()
        if {"bits", "scheme"} & options.keys()
    )
    experts = {
        name: expert.parameter.rpartition(".")[0] for name, expert in separable(model).items()
    }
    sets: dict[Any, list[WeightPlan]] = {}
    for weight in plan.weights:
        if weight.scheme and weight.block:
            sets.setdefault(experts.get(weight.name) or fused_set(weight.name), []).append(weight)
    free = [each for each in sets.values() if not any(fixed.of(weight.name) for weight in each)]
    schemes = {
        weight.scheme_at(bits) for each in free for weight in each for bits in recipe.mixable
    }
    targets = [formats.resolve(name, schemes) for name in recipe.formats]
    made, problems = [], dict.fromkeys(recipe.mixable, "")
    for each in free:
        held = []
        for bits in recipe.mixable:
            checks = [
                (fmt, fmt.check(w.scheme_at(bits), w.out_features, w.in_features))
                for fmt in targets
                for w in each
            ]
            problem = next((f"format {fmt.name} {why}" for fmt, why in checks if why), None)
            problems[bits] = problem or problems[bits]
            held += [] if problem else [bits]
        made.append(Unit(tuple(each), tuple(held)))
    for bits, problem in problems.items():
        if free and not any(bits in unit.options for unit in made):
            raise UserError(f"bit_options: {problem}; change bit_options, or the format")
    return made


def choose_bits(
    session: Session, on_block: Told = lambda done, total: None
) -> tuple[Recipe, Plan, dict[str, Any] | None]:
    """The recipe with bits for every weight in its `layer_config`, its plan, and what was measured.

    Where `layer_config` names the bits of every weight already, as in the recipe of a finished run,
    nothing is measured (None). Raises UserError where `target_bits` can't be reached.
    """
    recipe, plan = session.recipe, session.plan
    free = units(session.model, recipe, plan)
    target = recipe.target_bits
    assert target is not None
    if not free:
        if plan.bits_per_weight() > target + 0.005:
            raise UserError(
                f"target_bits = {target:g}: layer_config names the bits of every weight,"
                f" {plan.bits_per_weight():.3f} on average; remove its entries to choose again"
            )
        return recipe, plan, None
    options = {weight.name: unit.options for unit in free for weight in unit.weights}
    with trying(session, options, on_block) as trial:
        damage = trial.damage()
        free = [unit for unit in free if all(weight.name in damage.of for weight in unit.weights)]
        bits, seen = _tried(trial, _choices(free, damage, plan, target), free, plan, target)
    recipe = replace(
        recipe,
        layer_config=(recipe.layer_config or {}) | {n: option_keys(b) for n, b in bits.items()},
    )
    plan = make_plan(session.model, recipe)
    return recipe, plan, _record(recipe, plan, free, damage, bits) | seen


def _choices(free: Sequence[Unit], damage: Damage, plan: Plan, target: float) -> dict[str, Bits]:
    """By all options, and by the two alone between whose sizes the target lies. Raises UserError
    where no choice is small enough."""
    choices: dict[str, Bits] = {"all": _allocated(free, damage, plan, target)}
    around = _around(free, plan, target)
    if around and {*choices["all"].values()} - {*around}:
        narrow = [
            replace(unit, options=tuple(b for b in unit.options if b in around) or unit.options)
            for unit in free
        ]
        choices["around"] = _allocated(narrow, damage, plan, target)
    return choices


def _shared(free: Sequence[Unit]) -> list[Option]:
    """The options that all have."""
    return [b for b in free[0].options if all(b in unit.options for unit in free)] if free else []


def _around(free: Sequence[Unit], plan: Plan, target: float) -> tuple[Option, Option] | None:
    """The two neighbouring options for all between whose sizes the target lies, if there are
    any."""
    fixed, count = _fixed(free, plan)
    shared = _shared(free)
    sizes = {bits: (fixed + sum(unit.size(bits) for unit in free)) / count for bits in shared}
    return next(
        (pair for pair in pairwise(shared) if sizes[pair[0]] <= target < sizes[pair[1]]), None
    )


def _tried(
    trial: Trial, choices: Mapping[str, Bits], free: Sequence[Unit], plan: Plan, target: float
) -> tuple[Bits, dict[str, Any]]:
    """The choice that the samples show to be best, and what they show: KL in nats a position by
    set.

    "line" is what the two uniform choices around the target give at its size, along a straight line
    between them.
    """
    around = _around(free, plan, target)
    if around is None:
        return choices["all"], {}
    kls = {name: trial.kl(bits) for name, bits in choices.items()}
    uniform = {
        b: trial.kl({weight.name: b for unit in free for weight in unit.weights}) for b in around
    }
    fixed, count = _fixed(free, plan)
    low, high = (sum(unit.size(bits) for unit in free) for bits in around)
    share = (target * count - fixed - low) / (high - low)
    line_S = uniform[around[0]] * (1 - share) + uniform[around[1]] * share
    best = min(kls, key=lambda name: (kls[name] / line_S).max().item())
    if (kls[best] > line_S).any():
        log.warning(
            "target_bits: no choice of bits is better than a line between %s and %s for all",
            *around,
        )
    measured = {"mixed": kls[best], "line": line_S} | {
        str(bits): kl_S for bits, kl_S in uniform.items()
    }
    return choices[best], {
        "options": best,
        "measured": {name: kl_S.tolist() for name, kl_S in measured.items()},
    }


def _fixed(free: Sequence[Unit], plan: Plan) -> tuple[float, int]:
    """Stored bits of the weights that there is nothing to choose for; the number of all quantized
    weights' elements."""
    weights = [(weight, weight.scheme) for weight in plan.weights if weight.scheme]
    chosen = {weight.name for unit in free for weight in unit.weights}
    fixed = sum(
        stored_bits(weight, scheme) for weight, scheme in weights if weight.name not in chosen
    )
    return fixed, sum(weight.out_features * weight.in_features for weight, _ in weights)


def _allocated(
    free: Sequence[Unit], damage: Damage, plan: Plan, target: float
) -> dict[str, Option]:
    """Weight -> what it gets. Raises UserError where no choice is small enough."""
    fixed, count = _fixed(free, plan)
    sizes = [[unit.size(bits) for bits in unit.options] for unit in free]
    shares_S = _shares(free, damage)
    damages = [
        [(unit.damage(damage, bits) * shares_S).max().item() for bits in unit.options]
        for unit in free
    ]
    picks = allocate(sizes, damages, target * count - fixed)
    if picks is None:
        least = (fixed + sum(map(min, sizes))) / count
        raise UserError(
            f"target_bits = {target:g}: the least possible is {least:.3f}, scales and zero points"
            " included"
        )
    return {
        w.name: unit.options[k] for unit, k in zip(free, picks, strict=True) for w in unit.weights
    }


def _shares(free: Sequence[Unit], damage: Damage) -> Tensor:
    """The weight of a nat of each set of samples: 1 / the whole damage to that set at every unit's
    middle option.

    So text does not outvote images, whose answers are few tokens; a unit counts by the set that it
    hurts most.
    """
    whole_S = torch.stack(
        [unit.damage(damage, unit.options[(len(unit.options) - 1) // 2]) for unit in free]
    ).sum(0)
    return 1 / whole_S.clamp(min=1e-30)


def _record(
    recipe: Recipe, plan: Plan, free: Sequence[Unit], damage: Damage, bits: Bits
) -> dict[str, Any]:
    """Plain values for `run.json`: what was expected of every choice, in nats a position by set of
    samples."""
    chosen = {unit.weights[0].name: bits[unit.weights[0].name] for unit in free}

    def whole(choice: Callable[[Unit], Option]) -> list[float]:
        return torch.stack([unit.damage(damage, choice(unit)) for unit in free]).sum(0).tolist()

    return {
        "target_bits": recipe.target_bits,
        "bits_per_weight": round(plan.bits_per_weight(), 3),
        "sets": list(damage.sets),
        "expected": whole(lambda unit: chosen[unit.weights[0].name]),
        "uniform": {str(b): whole(lambda unit, b=b: b) for b in _shared(free)},  # type: ignore[misc]
        "layers": {
            name: {"bits": bits[name], "damage": {str(b): d_S.tolist() for b, d_S in each.items()}}
            for name, each in damage.of.items()
            if name in bits
        },
    }
