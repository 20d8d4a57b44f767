"""A user's own model, used for a while and given back as it was, but for what was written into its
weights."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from auto_mmround.errors import UserError
from auto_mmround.model.streaming import Holder, InMemory
from auto_mmround.model.structure import find_experts
from auto_mmround.model.visiting import visiting

ALIGNED = 16  # bytes that a row of an expert's matrix is a multiple of, for torch's grouped product


@contextmanager
def borrowed(
    model: PreTrainedModel, device: torch.device | None = None, whole: bool = True
) -> Iterator[Holder]:
    """While open, the model is in evaluation mode on ``device`` (None: where it is), its parameters
    have no gradients, and it gives its outputs by name; gradients can be asked for, whatever the
    caller has switched off. Gives who has its blocks: not ``whole``, they visit the device one by
    one.

    Raises UserError for a model that lies on several devices, and is to be moved.
    """
    training = {module: module.training for module in model.modules()}
    wanted = {
        name: (parameter.requires_grad, parameter.grad)
        for name, parameter in model.named_parameters()
    }
    places = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    # Gaudi's has a number where tensors lie, and none where it is named
    moves = device is not None and places != {torch.empty(0, device=device).device}
    if moves and len(places) > 1:
        raise UserError(
            f"device {device}: the model lies on {len(places)} devices already; leave device out"
        )
    there: AbstractContextManager[Holder] = nullcontext(InMemory())
    if moves and device is not None:
        there = visiting(model, device, whole)
    configs = [module.config for module in model.modules() if isinstance(module, PreTrainedModel)]
    answers = [
        (config, config.return_dict, config._experts_implementation)
        for config in {id(config): config for config in configs}.values()
    ]
    try:
        model.eval().requires_grad_(False)
        for parameter in model.parameters():
            parameter.grad = None  # an old gradient would add itself to the first step
        made_runnable(model)
        with torch.inference_mode(False), torch.enable_grad(), there as holder:
            yield holder
    finally:
        for config, answer, implementation in answers:
            config.return_dict = answer
            config._experts_implementation_internal = implementation  # of this one alone
        for module, flag in training.items():
            module.training = flag
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name][0])
            parameter.grad = wanted[name][1]


def made_runnable(model: Any) -> None:
    """Set what Transformers' own classes fail on in places.

    Outputs come by name, also where a configuration asks for tuples (`return_dict` false). Experts
    run one after the other where torch has no grouped product for the width of their matrices,
    which is Transformers' default.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config.return_dict = True
    shapes = find_experts(model).fused
    size = {name: model.get_parameter(name).itemsize for name in shapes}
    # Of a matrix (in, out) the inputs' rows count, too.
    if any(width * size[name] % ALIGNED for name, shape in shapes.items() for width in shape[1:]):
        model.set_experts_implementation("eager")
