"""What stands in a block's place for a pass of the whole model.

`idle` blocks do nothing, to see how the model calls them at the cost of a pass without them. What
it hands to the blocks of the last stage (positions, masks, features to add between them) mostly
depends on its inputs alone. Where a replay with calls recorded this way is the model, see
`capture`, the blocks need not run.

`recomputed` blocks let a backward pass run with what one block computes in memory at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from auto_mmround.model import devices
from auto_mmround.model.chains import hidden_of, map_tensors

# A model may raise these when a block is not the class that it knows. Then its blocks have to run.
UNFIT = (AttributeError, TypeError, ValueError, KeyError, IndexError, RuntimeError)


class Standin(nn.Module):
    """Has a block's place, and its attributes where the model asks for them."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.__dict__["block"] = block  # not as a child: its weights stay out of sight

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """The block's, so that its weights can be read from files meanwhile."""
        return self.__dict__["block"].state_dict(*args, **kwargs)


class Idle(Standin):
    """Answers zeros, so that what the model adds before the next block is seen as it is.

    rest: what the block returns after the hidden state; None where it returns that alone.
    """

    def __init__(self, block: nn.Module, rest: tuple[Any, ...] | None):
        super().__init__(block)
        self.__dict__["rest"] = rest

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zeros like the hidden state, in the block's form."""
        hidden, rest = torch.zeros_like(hidden_of(args, kwargs)[0]), self.__dict__["rest"]
        return hidden if rest is None else (hidden, *rest)


class Recomputed(Standin):
    """Runs the block, and once more in the backward pass, which then needs neither its weights nor
    what it computed."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output."""
        run = self.__dict__["block"]
        hidden, _ = hidden_of(args, kwargs)

        def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
            return nullcontext(), devices.products(hidden.device, hidden.dtype)

        return checkpoint(
            run, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs
        )


def rest_of(output: Any, hidden: Tensor) -> tuple[Any, ...] | None:
    """What a block returned after the hidden state, None if that alone. Raises ValueError if no
    `Idle` can do so."""
    first, rest = (output, None) if isinstance(output, Tensor) else (output[0], tuple(output[1:]))
    if (
        not isinstance(output, (Tensor, tuple))
        or first.shape != hidden.shape
        or _holds_tensors(rest)
    ):
        raise ValueError("the block returns more than a hidden state of the same shape")
    return rest


@contextmanager
def standing_in(
    model: nn.Module, make: Mapping[str, Callable[[nn.Module], Standin]]
) -> Iterator[None]:
    """While open, blocks are replaced by what is made of them."""
    blocks = {name: model.get_submodule(name) for name in make}
    try:
        for name, block in blocks.items():
            model.set_submodule(name, make[name](block))
        yield
    finally:
        for name, block in blocks.items():
            model.set_submodule(name, block)


def idle(
    model: nn.Module, rests: Mapping[str, tuple[Any, ...] | None]
) -> AbstractContextManager[None]:
    """While open, these blocks do nothing; rests: see `Idle`."""
    return standing_in(model, {name: partial(Idle, rest=rest) for name, rest in rests.items()})


def recomputed(model: nn.Module, blocks: Iterable[str]) -> AbstractContextManager[None]:
    """While open, backward passes hold one of these blocks at a time."""
    return standing_in(model, dict.fromkeys(blocks, Recomputed))


def _holds_tensors(value: Sequence[Any] | None) -> bool:
    tensors: list[Tensor] = []
    map_tensors(value, tensors.append)
    return bool(tensors)
