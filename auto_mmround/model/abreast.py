"""Several samples through a model side by side, forward and backward: each block is asked for once
for all of them.

Every sample has the model's own forward pass. It runs in a thread that stands still where a block
is called, so that the block can run for all samples that wait for it; one thread runs at a time.
There the graph is cut: what a block is given is kept, and the block is computed again when the
backward pass comes to it, once for all gradients that a sample is run back with. What the model
does between blocks keeps its graph. Gradients are those of one sample after the other, to the bit.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from queue import SimpleQueue
from threading import get_ident
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from auto_mmround.model.chains import Precision, map_tensors
from auto_mmround.model.lockstep import AbandonedError, threads_of
from auto_mmround.model.standins import Standin, standing_in

Keep = Callable[[Tensor], Tensor]
Work = Callable[[], tuple[Tensor, nn.Module]]
Key = TypeVar("Key")


@dataclass(eq=False)
class _Visit:
    """One call of a block by one sample. call: (args, kwargs), kept. given: for each tensor in it
    its device, and where its gradient goes, or None. grads: of the block's outputs, by draw and
    place, as far as they are known. now: the draw that runs back, the same list for all visits."""

    block: str
    call: Any
    given: list[tuple[torch.device, GradientEdge | None]]
    now: list[int]
    grads: dict[int, dict[int, Tensor]] = field(default_factory=dict)


class _Cut(torch.autograd.Function):
    """An output of a block, without the block: its gradient goes to the visit."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, visit: _Visit, place: int, value: Tensor) -> Tensor:
        """A copy: some models change it in place before the next block."""
        ctx.visit, ctx.place = visit, place
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:  # type: ignore[override]
        """Nothing goes further."""
        grads = ctx.visit.grads.setdefault(ctx.visit.now[0], {})
        known = grads.get(ctx.place)
        grads[ctx.place] = grad if known is None else known + grad
        return None, None, None, None


class _Passing:
    """One sample on its way through the model, in a thread of its own. wants: the block that it
    waits for, None at the end; end: what came out there, and the head."""

    def __init__(self, work: Work, starts: frozenset[str], keep: Keep):
        self.wants: str | None = None
        self.visits: list[_Visit] = []
        self.end: tuple[Tensor, nn.Module]
        self._work, self._starts, self._keep = work, starts, keep
        self._future: Future[tuple[Tensor, nn.Module]] = Future()
        self._asked: SimpleQueue[Any] = SimpleQueue()
        self._answers: SimpleQueue[Any] = SimpleQueue()
        self._request: Any = None
        # what every block is given is kept once
        self._kept: dict[int, tuple[ref[Tensor], Tensor]] = {}
        # draw -> where its gradient waits between blocks
        self._pending: dict[int, dict[Any, tuple[GradientEdge, Tensor]]] = {}
        self._now = [0]

    def start(self, threads: ThreadPoolExecutor) -> None:
        """Go on to the first block."""
        self._future = threads.submit(self._work)
        self._future.add_done_callback(lambda future: self._asked.put(None))
        self._wait()

    def _wait(self) -> None:
        self._request = self._asked.get()
        if self._request is None:
            self.end = self._future.result()
        self.wants = self._request[0] if self._request else None

    def at(self, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In the thread: a block is called; what it returns, cut from what it did."""
        given: list[tuple[torch.device, GradientEdge | None]] = []

        def kept(tensor: Tensor) -> Tensor:
            given.append(
                (tensor.device, get_gradient_edge(tensor) if tensor.requires_grad else None)
            )
            return self._once(tensor)

        call = map_tensors((args, kwargs), kept)
        before = _mappings(kwargs)
        self._asked.put((block, args, kwargs))
        output = self._answers.get()
        if isinstance(output, BaseException):
            raise output
        if block not in self._starts and not any(edge for _, edge in given):
            return output
        visit = _Visit(block, call, given, self._now)
        places = count()
        anchor = torch.zeros((), requires_grad=True)
        self.visits.append(visit)

        def cut(tensor: Tensor) -> Tensor:
            place = next(places)
            return (
                _Cut.apply(anchor, visit, place, tensor) if tensor.is_floating_point() else tensor
            )  # type: ignore[no-untyped-call,no-any-return]

        output, filled = map_tensors((output, _filled(kwargs, before)), cut)
        for name, entries in filled.items():
            kwargs[name].update(entries)
        return output

    def _once(self, tensor: Tensor) -> Tensor:
        known = self._kept.get(id(tensor))
        if known is None or known[0]() is not tensor:
            known = self._kept[id(tensor)] = (ref(tensor), self._keep(tensor.detach()))
        return known[1]

    def advance(self, blocks: Mapping[str, nn.Module]) -> None:
        """Run the block that it waits for, and go on to the next one, or to the end."""
        block, args, kwargs = self._request
        with torch.no_grad():
            self._answers.put(blocks[block](*args, **kwargs))
        self._request = args = kwargs = None
        self._wait()

    def abandon(self) -> None:
        """End the thread, if it is still on its way."""
        if not self._future.done():
            self._answers.put(AbandonedError())

    def begin_backward(self, grads_TD: Iterable[Tensor]) -> None:
        """Gradients of what came out at the end; each runs back by itself."""
        edge = get_gradient_edge(self.end[0])
        for draw, grad_TD in enumerate(grads_TD):
            self._pending[draw] = {}
            self._add(draw, edge, grad_TD)
        del self.end
        self._kept.clear()

    def back(self, blocks: Mapping[str, nn.Module], on_draw: Callable[[int], None]) -> None:
        """Run the last visit's block again, and backwards with each gradient that reaches it.
        on_draw: is told which comes next."""
        visit = self.visits.pop()
        for draw, pending in self._pending.items():
            ready = [key for key, (edge, _) in pending.items() if _leads_to(edge, visit)]
            if ready:
                self._now[0] = draw
                on_draw(draw)
                edges, grads = zip(*(pending.pop(key) for key in ready))
                torch.autograd.backward(edges, grads, retain_graph=True)
        if not visit.grads:
            return
        leaves: list[Tensor] = []

        def given(tensor: Tensor) -> Tensor:
            device, edge = visit.given[len(leaves)]
            leaves.append(tensor.to(device).detach().requires_grad_(edge is not None))
            return leaves[-1]

        with torch.enable_grad():
            args, kwargs = map_tensors(visit.call, given)
            before = _mappings(kwargs)
            made: list[Tensor] = []
            map_tensors(
                (blocks[visit.block](*args, **kwargs), _filled(kwargs, before)), made.append
            )
            last = list(visit.grads)[-1]
            for draw, known in visit.grads.items():
                on_draw(draw)
                places = [place for place in known if made[place].requires_grad]
                torch.autograd.backward(
                    [made[p] for p in places], [known[p] for p in places],
                    retain_graph=draw != last,
                )  # fmt: skip
                for leaf, (_, edge) in zip(leaves, visit.given, strict=True):
                    if edge is not None and leaf.grad is not None:
                        self._add(draw, edge, leaf.grad)
                    leaf.grad = None

    def _add(self, draw: int, edge: GradientEdge, grad: Tensor) -> None:
        """Note a gradient. It goes on when the visit that it leads to is next, together with the
        gradients of all later visits."""
        key, pending = (edge.node, edge.output_nr), self._pending[draw]
        known = pending.get(key)
        pending[key] = edge, grad if known is None else known[1] + grad


def _mappings(kwargs: Mapping[str, Any]) -> dict[str, dict[Any, Any]]:
    return {
        name: dict(value) for name, value in kwargs.items() if isinstance(value, MutableMapping)
    }


def _filled(
    kwargs: Mapping[str, Any], before: Mapping[str, Mapping[Any, Any]]
) -> dict[str, dict[Any, Any]]:
    """What a block has put into the mappings that it was given."""
    return {
        name: {key: value for key, value in kwargs[name].items() if was.get(key) is not value}
        for name, was in before.items()
    }


def _leads_to(edge: GradientEdge, visit: _Visit) -> bool:
    """Whether the graph between blocks leads from there to the visit."""
    seen: set[Any] = set()
    ahead: list[Any] = [edge.node]
    while ahead:
        node = ahead.pop()
        if getattr(node, "visit", None) is visit:
            return True
        if node not in seen:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions if following is not None]
    return False


class _Halt(Standin):
    """Where a sample's pass stands still. Hooks by which the model takes outputs of its blocks see
    what is cut.

    here: thread -> the sample that it runs.
    """

    def __init__(self, block: nn.Module, name: str, here: Mapping[int, _Passing]):
        super().__init__(block)
        self.__dict__.update(name=name, here=here)
        self._forward_hooks = block._forward_hooks
        self._forward_hooks_with_kwargs = block._forward_hooks_with_kwargs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output."""
        return self.__dict__["here"][get_ident()].at(self.__dict__["name"], args, kwargs)


@contextmanager
def abreast(
    model: nn.Module,
    order: Sequence[str],
    starts: frozenset[str],
    works: Mapping[Key, Work],
    keep: Keep,
    precision: Precision,
) -> Iterator[tuple[dict[Key, _Passing], Callable[[Callable[[Key, int], None]], None]]]:
    """Run samples forward; yields them at their ends, by key, and what runs them backwards.

    order: all blocks, as a forward pass meets them. starts: those at whose inputs a graph begins.
    works: how to run the model to its end, by sample: what came out there, and the head. keep:
    where a block's inputs lie until the backward pass. The second thing yielded takes a function
    that is told the sample whose block runs backwards next, and which of its gradients.
    """
    rank = {name: place for place, name in enumerate(order)}
    blocks = {name: model.get_submodule(name) for name in order}
    here: dict[int, _Passing] = {}

    def begin(i: Key) -> tuple[Tensor, nn.Module]:
        here[get_ident()] = passings[i]
        with precision(), torch.enable_grad():
            return works[i]()

    passings = {i: _Passing(partial(begin, i), starts, keep) for i in works}

    def backward(on_sample: Callable[[Key, int], None]) -> None:
        while on_way := {
            i: rank[one.visits[-1].block] for i, one in passings.items() if one.visits
        }:
            last = max(on_way.values())
            for i in [i for i, at in on_way.items() if at == last]:
                with precision():
                    passings[i].back(blocks, partial(on_sample, i))

    halts = {name: partial(_Halt, name=name, here=here) for name in order}
    with standing_in(model, halts), threads_of(len(works)) as threads:
        try:
            for one in passings.values():
                one.start(threads)
            while waiting := {i: rank[one.wants] for i, one in passings.items() if one.wants}:
                first = min(waiting.values())
                for i in [i for i, at in waiting.items() if at == first]:
                    with precision():
                        passings[i].advance(blocks)
            yield passings, backward
        finally:
            for one in passings.values():
                one.abandon()
