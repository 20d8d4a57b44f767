"""Forward passes of the whole model: to its end, to its head, or to a stage."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from inspect import Parameter, signature
from itertools import dropwhile
from threading import get_ident
from traceback import walk_tb
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.cache_utils import Cache, EncoderDecoderCache

from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.chains import Precision, hidden_of, moved
from auto_mmround.model.speaking import output_head, speaking
from auto_mmround.model.streaming import device_of
from auto_mmround.model.structure import Stage
from auto_mmround.untrusted import one_line

Inputs = Mapping[str, Any]
# What the code of models raises for inputs that it does not take.
REFUSES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError,
    RuntimeError, TypeError, ValueError,
)  # fmt: skip
# Where Transformers puts code that comes with a model, and how it fails once what it uses is gone.
OWN_CODE = "transformers_modules."
OUTDATED = (AttributeError, TypeError, ImportError, NameError, LookupError)
OURS = __name__.partition(".")[0] + "."


class NotTaken(UserError):
    """The model's own code fails on what it is given. kwargs: that."""

    def __init__(self, message: str, kwargs: Inputs):
        super().__init__(message)
        self.kwargs = kwargs


class ReachedError(Exception):
    """All that was wanted of a forward pass has been seen."""


@contextmanager
def stopping_at(module: nn.Module) -> Iterator[list[Tensor]]:
    """Forward passes of the model around ``module``, by this thread, end before it; yields a list
    that gets what it would be given."""
    reached: list[Tensor] = []
    owner = get_ident()

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() != owner:
            return
        reached.append(hidden_of(args, kwargs)[0])
        raise ReachedError

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with suppress(ReachedError):
            yield reached
    finally:
        handle.remove()


def run_model(model: Any, kwargs: Inputs) -> Any:
    """The model's answer; without a cache, where it makes one. It draws the same random numbers in
    each pass, so that teacher and student see the same noise."""
    model = speaking(model)
    takes = signature(model.forward).parameters
    others = any(one.kind is Parameter.VAR_KEYWORD for one in takes.values())
    generates = others and getattr(model, "can_generate", lambda: True)()
    cached = "use_cache" in takes or generates
    with _same_noise(device_of(model)), taking(model, kwargs):
        return model(**kwargs, **({"use_cache": False} if cached else {}))


@contextmanager
def taking(model: nn.Module, kwargs: Inputs) -> Iterator[None]:
    """To be open while the model runs on ``kwargs``. Raises NotTaken where the model's own code
    fails; what our hooks raise goes on."""
    try:
        yield
    except REFUSES as error:
        if devices.out_of_memory(error) or _in_our_code(error):
            raise
        reason = one_line(f"{type(error).__name__}: {error}")[:300]
        if type(model).__module__.startswith(OWN_CODE) and isinstance(error, OUTDATED):
            line = (
                f"the code that comes with the model fails ({reason}); it may be written for"
                f" another version of Transformers than {transformers.__version__}"
            )
        else:
            given = ", ".join(f"{name} {_size(value)}" for name, value in kwargs.items())
            line = (
                f"{type(model).__name__} fails on it ({reason}); it was given {given}: make"
                " samples with the model's own processor"
            )
        raise NotTaken(line, kwargs) from error


def _size(value: Any) -> str:
    """1x12 for a tensor, else its class."""
    if isinstance(value, Tensor):
        return "x".join(map(str, value.shape)) or "number"
    return type(value).__name__


def _in_our_code(error: BaseException) -> bool:
    """Whether the error was raised by code of ours that the model has called: a hook, a stand-in
    for a block."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]
    called = dropwhile(lambda name: name.startswith(OURS), names)
    inner = [name for name in called if not name.startswith("torch.")]
    return bool(inner) and inner[-1].startswith(OURS)


@contextmanager
def _same_noise(device: torch.device) -> Iterator[None]:
    """Random numbers begin anew, on every device of that type, since they are seeded together. The
    caller's own go on afterwards as if nothing had been drawn."""
    backend, row = device.type, devices.traits(device)
    asked = backend != "cpu" and hasattr(getattr(torch, backend, None), "get_rng_state")
    count = (1 if row.alone else row.count()) if asked else 0
    with torch.random.fork_rng(range(count), device_type=backend if asked else "cuda"):
        torch.manual_seed(0)
        yield


def run_without_logits(model: nn.Module, kwargs: Inputs) -> None:
    """A forward pass up to the head: no block comes after it, and its logits are the largest tensor
    of all."""
    model = speaking(model)  # type: ignore[arg-type]  # any module with such a forward pass
    head = output_head(model)
    with nullcontext() if head is None else stopping_at(head):
        run_model(model, moved(dict(kwargs), device_of(model)))


def reached(
    model: nn.Module, stages: Sequence[Stage], kwargs: Inputs, precision: Precision = nullcontext
) -> set[str]:
    """Paths of the stages that an input runs through. The pass ends at the last stage, once all
    others were reached. Raises NotTaken."""
    names: set[str] = set()

    def seen(path: str) -> None:
        names.add(path)
        if len(names) == len(stages):
            raise ReachedError

    with ExitStack() as stack, suppress(ReachedError), torch.no_grad(), precision():
        for stage in stages:
            block = model.get_submodule(stage.blocks[0])
            hook = block.register_forward_pre_hook(lambda *_, path=stage.path: seen(path))
            stack.callback(hook.remove)
        run_without_logits(model, kwargs)
    return names


def empty_cache(value: Any) -> bool:
    """Whether this is a cache of keys and values, and nothing in it yet."""
    if isinstance(value, EncoderDecoderCache):
        return empty_cache(value.self_attention_cache)
    return isinstance(value, Cache) and not any(
        getattr(layer, "is_initialized", True) for layer in value.layers
    )
