"""Out of memory is no reason to lose a run: fewer samples at a time, then what takes room out of
the way, then one line that names the phase and the flags that help."""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.chains import Chain
from auto_mmround.model.standins import recomputed
from auto_mmround.model.streaming import device_of
from auto_mmround.model.structure import every_block
from auto_mmround.recipe.recipe import Recipe

log = logging.getLogger("auto_mmround")

T = TypeVar("T")
SHARE = 0.5  # of the free memory that may go into what a phase keeps to be quicker
SHORTER = "lower --seqlen, or use a larger machine"
FEWER = "lower --nsamples or --seqlen, or use a larger machine"


class BatchSize:
    """How many samples run together: the recipe's number, or a divisor of it once that many did not
    fit.

    Sums over a batch are taken in more parts then, and mean the same.
    """

    def __init__(self, size: int = 1):
        self.size = size

    def fitting(
        self,
        what: str,
        attempt: Callable[[int], T],
        relieve: Callable[[], bool] = lambda: False,
        helps: str = f"finished blocks are kept, {SHORTER}",
    ) -> T:
        """The result of ``attempt(size)``, tried again with less until memory suffices.

        relieve: makes room where a single sample is too much; False if it can't. Raises UserError
          when nothing helps.
        """
        while True:
            try:
                return attempt(self.size)
            except (MemoryError, RuntimeError) as error:
                reason = _reason(error)
            # Here, not in the clause above, where the traceback still holds what the attempt had
            # allocated. Objects that hold each other keep their tensors until they are collected.
            gc.collect()
            devices.release_cache()
            if self.size > 1:
                self.size = max(size for size in range(1, self.size) if self.size % size == 0)
                log.warning(
                    "%s: out of memory, going on with %d samples at a time", what, self.size
                )
            elif relieve():
                log.warning(
                    "%s: out of memory with a single sample, what takes room is moved away", what
                )
            else:
                raise UserError(
                    f"{what}: not enough memory for a single sample ({reason}); {helps}"
                )


@contextmanager
def phase(what: str, helps: str = SHORTER) -> Iterator[None]:
    """A part of a run that has no smaller pieces. Raises UserError where memory does not suffice
    for it."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        raise UserError(f"{what}: not enough memory ({_reason(error)}); {helps}") from None


def _reason(error: BaseException) -> str:
    """What an allocator said; other errors go on."""
    if not devices.out_of_memory(error):
        raise error
    return str(error).strip().split("\n")[0][:200] or "no more on the host"


class Places:
    """Where hidden states of the samples lie, the first place first: the device, host memory,
    files."""

    def __init__(self, places: Sequence[Mapping[str, Any]]):
        self._places = list(places)

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device, disk: Callable[[Tensor], Tensor]) -> "Places":
        """As the recipe's `low_gpu_mem_usage` and `offload_states` ask for; further ones serve
        where memory ends."""
        host, files = {"store": devices.HOST, "place": None}, {"store": devices.HOST, "place": disk}
        on_device = {"store": device, "place": None}
        if recipe.offload_states:
            return cls(
                [files] if recipe.low_gpu_mem_usage else [on_device | {"place": disk}, files]
            )
        on_host: list[Mapping[str, Any]] = [host, files]
        return cls(
            on_host if recipe.low_gpu_mem_usage or device == devices.HOST else [on_device, *on_host]
        )

    @property
    def first(self) -> Mapping[str, Any]:
        """Arguments of `capture`."""
        return self._places[0]

    def fitting(self, what: str, attempt: Callable[..., T], helps: str = FEWER) -> T:
        """The result of ``attempt(store=.., place=..)`` with the first places that memory suffices
        for; they are the first ones from now on. Raises UserError when nothing helps."""

        def relieve() -> bool:
            return len(self._places) > 1 and bool(self._places.pop(0))

        return BatchSize().fitting(what, lambda size: attempt(**self.first), relieve, helps)


def moved_away(chains: Sequence[Chain], disk: Callable[[Tensor], Tensor]) -> bool:
    """Move hidden states off the device, then from memory to disk; False if all lie there."""
    moved = False
    for chain in chains:
        place = disk if all(hidden.device.type == "cpu" for hidden in chain.hidden) else Tensor.cpu
        if chain.place != disk:
            chain.offload(place)
            moved = True
    return moved


class Graph:
    """What a backward pass through a model in memory keeps of the forward pass: all that its blocks
    compute, or, where that is more than `SHARE` of the free memory or was too much, what they are
    given. The gradients are the same."""

    def __init__(self, model: PreTrainedModel | None = None, tokens: int = 0):
        """tokens: of the longest sample. Without a model: everything is kept."""
        self._model, self.again = model, False
        self._blocks = every_block(model) if model else []
        if model:
            size = sum(computed(model.get_submodule(block)) for block in self._blocks) * tokens
            self.again = size > SHARE * devices.free_memory(device_of(model))

    def relieve(self) -> bool:
        """Keep less from now on; False if that was so before."""
        was, self.again = self.again, True
        return not was and self._model is not None

    def __call__(self) -> AbstractContextManager[None]:
        """To be open while the model runs forward and backward."""
        return (
            recomputed(self._model, self._blocks) if self._model and self.again else nullcontext()
        )


def computed(block: nn.Module) -> int:
    """Bytes that a block's graph keeps a token, about: what its products read and give. Measured on
    Llama's layers it is 4 % more."""
    matrices = [p for p in block.parameters() if p.ndim > 1]
    return sum(sum(p.shape[-2:]) * p.element_size() for p in matrices)
