"""Passes through a model whose blocks are read when their turn comes, side by side: each block is
read once for all of them.

Every pass runs in a thread of its own, one thread at a time. It stands still before each block, and
the one that has come the least far goes on. A pass computes and draws the same as it would alone.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from queue import SimpleQueue
from threading import get_ident
from typing import Any, Generic, TypeVar

import torch
from torch import nn

from auto_mmround.model import devices
from auto_mmround.model.speaking import output_head, path_of

MOST = 256  # passes side by side: each has a thread
SHARE = 0.5  # of the free host memory that their hidden states may take
COPIES = 4  # of a hidden state that a pass holds while it stands still: residuals, positions

T = TypeVar("T")


class AbandonedError(Exception):
    """The others have failed; this pass is not wanted any more."""


def threads_of(count: int) -> ThreadPoolExecutor:
    """Threads that compute on as many cores as this one. In a new thread products run on all cores
    until torch has told its libraries how many they may use. Then last bits differ."""
    return ThreadPoolExecutor(count, initializer=torch.get_num_threads)


class _Pass(Generic[T]):
    """stands: the rank of the module that it waits for, None at its end."""

    def __init__(self, work: Callable[[], T], here: dict[int, Any], threads: ThreadPoolExecutor):
        self.stands: int | None = None
        self._drawn = torch.get_rng_state()
        self._go, self._stopped = SimpleQueue[bool](), SimpleQueue[int | None]()

        def run() -> T:
            here[get_ident()] = self
            try:
                self._may_go()
                return work()
            finally:
                del here[get_ident()]

        self._future: Future[T] = threads.submit(run)
        self._future.add_done_callback(lambda future: self._stopped.put(None))

    def _may_go(self) -> None:
        if not self._go.get():
            raise AbandonedError

    def halt(self, rank: int) -> None:
        """In the thread: wait until this module's turn has come."""
        self._stopped.put(rank)
        self._may_go()

    def advance(self) -> None:
        """Go on to the next module, or to the end. Raises what the pass raises."""
        torch.set_rng_state(self._drawn)
        self._go.put(True)
        self.stands = self._stopped.get()
        self._drawn = torch.get_rng_state()
        if self.stands is None:
            self._future.result()

    def end(self) -> T:
        """What came out; it is not kept."""
        while self.stands is not None:
            self.advance()
        result, self._future = self._future.result(), Future()
        return result

    def abandon(self) -> None:
        """End the thread, if it is still on its way."""
        self._go.put(False)


@contextmanager
def side_by_side(
    model: nn.Module, blocks: Sequence[str], works: Sequence[Callable[[], T]], last: str | None
) -> Iterator[Callable[[int], T]]:
    """Run works, each of which passes through the model once or several times; yields what gives
    the result of one, by number, once.

    last: a module before which all of them wait until their result is asked for.
    """
    rank = {name: place for place, name in enumerate([*blocks, *([last] if last else [])])}
    here: dict[int, _Pass[T]] = {}
    drawn = torch.get_rng_state()
    with ExitStack() as stack, threads_of(len(works)) as threads:
        for name, place in rank.items():

            def hook(module: nn.Module, args: Any, place: int = place) -> None:
                if get_ident() in here:
                    here[get_ident()].halt(place)

            # before what reads the block
            handle = model.get_submodule(name).register_forward_pre_hook(hook, prepend=True)
            stack.callback(handle.remove)
        passes = [_Pass(work, here, threads) for work in works]
        try:
            for one in passes:
                one.advance()
            while waiting := [p for p in passes if p.stands is not None and p.stands < len(blocks)]:
                first = min(one.stands for one in waiting if one.stands is not None)
                for one in waiting:
                    if one.stands == first:
                        one.advance()
            yield lambda i: passes[i].end()
        finally:
            for one in passes:
                one.abandon()
            torch.set_rng_state(drawn)


def in_turn(
    model: nn.Module,
    blocks: Sequence[str],
    works: Sequence[Callable[[], T]],
    inputs: Sequence[Mapping[str, Any]],
    at_head: bool = False,
) -> Generator[T, None, None]:
    """The result of each of the works, which all pass through ``model``.

    blocks: those that are read when their turn comes; there works run side by side, as many as have
    room, see `side_by_side`. Without any, each runs when it is asked for. inputs: of the works.
    at_head: all wait before the head until their result is asked for.
    """
    if not blocks:
        yield from (work() for work in works)
        return
    size = _fitting(model, inputs)
    last = path_of(model, output_head(model)) or None if at_head else None
    for at in range(0, len(works), size):
        some = works[at : at + size]
        with side_by_side(model, blocks, some, last) as end:
            yield from (end(i) for i in range(len(some)))


def _fitting(model: Any, inputs: Sequence[Mapping[str, Any]]) -> int:
    """Passes side by side whose hidden states fit into `SHARE` of the free host memory."""
    width = model.config.get_text_config().hidden_size
    longest = max((_tokens(kwargs) for kwargs in inputs), default=1)
    each = longest * (COPIES * width * model.dtype.itemsize + longest)  # with a mask
    return max(1, min(MOST, int(SHARE * devices.free_memory(devices.HOST)) // each))


def _tokens(kwargs: Mapping[str, Any]) -> int:
    """The longest sequence of an input: of its ids, or of its pictures' patches."""
    tensors = (value for value in kwargs.values() if isinstance(value, torch.Tensor))
    return max((max(tensor.shape[:2]) for tensor in tensors if tensor.ndim > 1), default=1)
