"""Experts that a checkpoint names one by one, back in the stacks that a family's own files hold."""

import re
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from auto_mmround.model.experts import Expert, separable
from auto_mmround.model.keys import renamed_keys

SINGLE = re.compile(r"(.+)\.(\d+)\.(gate_proj|up_proj|down_proj)\.(weight|bias)")
STACKS = ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


def stacking(
    model: PreTrainedModel, keys: Collection[str]
) -> dict[str, tuple[str, dict[str, Expert]]]:
    """Key of a stack in the original checkpoint -> (its parameter, key of each expert's matrix, or
    bias -> where it lies there).

    Of the families whose checkpoints stack experts, and of stacks whose matrices are all among the
    ``keys``.
    """
    stacks: dict[str, dict[str, Expert]] = {}
    for expert in separable(model).values():
        if expert.stacked and expert.alone:
            for each in filter(None, (expert, expert.bias)):
                stacks.setdefault(each.parameter, {})[each.tail] = each
    if not stacks:
        return {}
    singles = {single[1] for key in keys if (single := SINGLE.fullmatch(key))}
    wanted = {f"{beginning}.{leaf}" for beginning in singles for leaf in STACKS}
    complete = {}
    for key, name, _ in renamed_keys(model, sorted(wanted)):
        members = {
            f"{key.rpartition('.')[0]}.{tail}": expert
            for tail, expert in stacks.get(name, {}).items()
        }
        if members and all(member in keys for member in members):
            complete[key] = name, members
    return complete


def restacked(
    model: PreTrainedModel, name: str, members: Mapping[str, Expert], of: Callable[[str], Tensor]
) -> Tensor:
    """A stack as the checkpoint of a stacking family has it under the model's own name, from the
    matrices ``of`` its members. name, members: of `stacking`."""
    shape, stack = model.get_parameter(name).shape, None
    for member, expert in members.items():
        matrix = of(member)
        stack = torch.empty(shape, dtype=matrix.dtype) if stack is None else stack
        expert.of(stack).copy_(matrix)
    assert stack is not None  # it has members
    if not next(iter(members.values())).named:
        return stack  # no conversion knows it by this name
    return next(iter(revert_weight_conversion(model, {name: stack}).values()))


def restack(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    stacks: Mapping[str, tuple[str, Mapping[str, Expert]]],
) -> dict[str, Tensor]:
    """A state dict whose experts have keys of their own, with those stacks of `stacking` in it
    whose matrices lie there."""
    for key, (name, members) in stacks.items():
        if next(iter(members)) in state:
            state[key] = restacked(model, name, members, state.pop)
    return state
