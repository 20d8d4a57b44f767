"""A user's own model, used for a while and given back as it was, but for what was written into its
weights."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auto_mmround.errors import UserError
from auto_mmround.model.chains import TOLERANCE, as_dtype, difference, first_tensor, moved
from auto_mmround.model.devices import HOST, TABLE
from auto_mmround.model.passes import run_model
from auto_mmround.model.streaming import Holder, InMemory, device_of
from auto_mmround.model.structure import find_experts
from auto_mmround.model.visiting import visiting

log = logging.getLogger("auto_mmround")

ALIGNED = 16  # bytes that a row of an expert's matrix is a multiple of, for torch's grouped product


@contextmanager
def borrowed(
    model: PreTrainedModel, device: torch.device | None = None, whole: bool = True
) -> Iterator[Holder]:
    """While open, the model is in evaluation mode on ``device`` (None: where it is), its parameters
    have no gradients, it gives its outputs by name, and nothing of it is compiled; gradients can be
    asked for, whatever the caller has switched off. Gives who has its blocks: not ``whole``, they
    visit the device one by one.

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
        with torch.inference_mode(False), torch.enable_grad(), _plainly(model), there as holder:
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


@contextmanager
def usual_settings() -> Iterator[None]:
    """While open, torch makes float32 tensors in host memory and casts nothing by itself, whatever
    the caller has set (`set_default_dtype`, `set_default_device`, `autocast`)."""
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        if torch.get_default_device() != HOST:
            stack.enter_context(HOST)
        for kind in TABLE:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def _plainly(model: nn.Module) -> Iterator[None]:
    """While open, modules run as they are written: what the caller has compiled, whole or by
    `module.compile()`, would not notice our hooks."""
    with ExitStack() as stack:
        for module in model.modules():
            table = vars(module)
            if table.get("_compiled_call_impl") is not None:
                name = "_compiled_call_impl"
                stack.callback(table.__setitem__, name, table.pop(name))
            forward = table.get("forward")
            if getattr(forward, "_torchdynamo_orig_callable", None) is not None:
                stack.callback(table.__setitem__, "forward", table.pop("forward"))
        yield


class Hook(NamedTuple):
    """A forward hook of the caller's, or a `forward` in the place of the class's. path: of its
    module. table: where it is, under ``key``."""

    path: str
    table: Any
    key: int | str

    def __str__(self) -> str:
        what = "a forward of its own" if self.key == "forward" else "forward hooks"
        return f"{what} (the first on {self.path or 'itself'})"


def hooks_of(model: nn.Module) -> list[Hook]:
    """Those that a model has, before any of ours. accelerate's forward, which moves tensors from
    device to device, is not among them."""
    found = []
    for path, module in model.named_modules():
        for table in (module._forward_pre_hooks, module._forward_hooks):
            found += [Hook(path, table, number) for number in table]
        if "forward" in vars(module) and not _wrapped(module):
            found.append(Hook(path, vars(module), "forward"))
    return found


def _wrapped(module: nn.Module) -> bool:
    """Whether a forward on the module itself is accelerate's, or torch.compile's."""
    forward = vars(module)["forward"]
    return hasattr(module, "_hf_hook") or hasattr(forward, "_torchdynamo_orig_callable")


def check_hooks(
    model: PreTrainedModel, hooks: Sequence[Hook], samples: Sequence[Mapping[str, Any]]
) -> None:
    """Raises UserError if hooks change what the model gives for one of the samples: a checkpoint
    would not hold that. Without samples nobody can tell, and a warning says so."""
    if hooks and not samples:
        log.warning(
            "the model has %s; without calibration samples it was not tried whether they change"
            " what it gives, which no checkpoint holds",
            hooks[0],
        )
    for kwargs in samples if hooks else ():
        hooked = _answer(model, kwargs)
        with ExitStack() as stack:
            for hook in hooks:
                if hook.key == "forward":
                    stack.callback(hook.table.__setitem__, hook.key, hook.table.pop(hook.key))
                    continue
                # a module's hooks run in this order
                stack.callback(hook.table.update, dict(hook.table))
                stack.callback(hook.table.clear)
                del hook.table[hook.key]
            plain = _answer(model, kwargs)
        if not difference(hooked, plain) <= TOLERANCE[plain.dtype]:
            raise UserError(
                f"the model has {hooks[0]}; they change what it gives, but no checkpoint holds"
                " them: remove them"
            )


@torch.no_grad()
def _answer(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> Tensor:
    made = run_model(model, moved(as_dtype(kwargs, model.dtype), device_of(model)))
    return made.logits if "logits" in made else first_tensor(made.to_tuple())


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
