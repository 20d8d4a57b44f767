"""What one forward pass gives each block of a stage, recorded in hooks."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from auto_mmround.model import passes
from auto_mmround.model.chains import (
    Call,
    Glue,
    Precision,
    first_tensor,
    hidden_of,
    map_tensors,
    with_hidden,
)
from auto_mmround.model.passes import Inputs, ReachedError
from auto_mmround.model.structure import Stage

DISTURBANCE = 0.1  # of the hidden state's own size


@dataclass
class Pass:
    """One run through a stage's blocks. last: the output of the last block."""

    first: Tensor
    calls: list[Call] = field(default_factory=list)
    order: list[int] = field(default_factory=list)
    last: Tensor = field(default_factory=lambda: torch.empty(0))
    before_last: Tensor = field(default_factory=lambda: torch.empty(0))

    def shared(self) -> dict[str, Any]:
        """Mappings that the blocks fill on the way, as the first block found them."""
        first, last = self.calls[0].kwargs, self.calls[-1].kwargs
        return {
            name: value
            for name, value in first.items()
            if isinstance(value, Mapping) and set(value) != set(last.get(name, value))
        }


class Recorder:
    """Hooks on the blocks of one stage for one forward pass. disturb: adds noise to the first
    hidden state."""

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        store: torch.device | str,
        *,
        disturb: bool = False,
        stop: bool = False,
    ):
        self.store, self.disturb, self.depth, self.stop = store, disturb, stage.depth, stop
        self.passes: list[Pass] = []
        # a tensor given to every block is kept once
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}
        self.output: Tensor | None = None  # of the block before
        # Caches that a pass begins with empty: blocks fill them for passes that never come.
        self.sinks: set[int] = set()
        # block -> its hidden state and what it returned, shapes alone
        self.outputs: dict[int, tuple[Tensor, Any]] = {}
        self.handles = []
        for index, name in enumerate(stage.blocks):
            block = model.get_submodule(name)
            self.handles.append(
                block.register_forward_pre_hook(self._before(index), with_kwargs=True)
            )
            self.handles.append(block.register_forward_hook(self._after(index), with_kwargs=True))

    def _before(self, index: int) -> Callable[..., Any]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, slot = hidden_of(args, kwargs)
            if not self.passes or index <= self.passes[-1].order[-1]:
                if self.disturb:
                    hidden = disturbed_hidden(hidden)
                self.passes.append(Pass(hidden.detach().to(self.store, copy=True)))
                self.output = None
                self.sinks = {id(v) for v in (*args, *kwargs.values()) if passes.empty_cache(v)}
            current = self.passes[-1]
            current.order.append(index)
            glue = None if self.output is None else Glue.between(self.output, hidden.detach())
            if glue is not None:
                rows = None if glue.rows is None else glue.rows.to(self.store)
                glue = Glue(rows, glue.values.to(self.store, copy=True), glue.tokens)
            others, named = _without(args, kwargs, slot)
            others = tuple(None if id(value) in self.sinks else value for value in others)
            named = {k: None if id(v) in self.sinks else v for k, v in named.items()}
            current.calls.append(Call(self._keep(others), self._keep(named), slot, glue))
            if index == self.depth - 1:
                current.before_last = (
                    current.first if self.output is None else self.output.to(self.store)
                )
                if self.stop:
                    raise ReachedError
            return with_hidden(args, kwargs, slot, hidden) if self.disturb and index == 0 else None

        return hook

    def _after(self, index: int) -> Callable[..., None]:
        def hook(
            block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> None:
            # A copy: some models change it in place before the next block.
            self.output = self.passes[-1].last = first_tensor(output).detach().clone()
            self.outputs[index] = map_tensors(
                (hidden_of(args, kwargs)[0], output), lambda tensor: tensor.to("meta")
            )

        return hook

    def _keep(self, value: Any) -> Any:
        def keep(tensor: Tensor) -> Tensor:
            if id(tensor) not in self.seen:
                self.seen[id(tensor)] = (tensor, tensor.detach().to(self.store))
            return self.seen[id(tensor)][1]

        return map_tensors(value, keep)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


def run_recording(
    model: nn.Module, kwargs: Inputs, recorders: Sequence[Recorder], precision: Precision
) -> None:
    with ExitStack() as stack, torch.no_grad(), precision():
        for recorder in recorders:
            stack.callback(recorder.remove)
        try:
            passes.run_without_logits(model, kwargs)
        except ReachedError:
            return


def disturbed_hidden(hidden: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(hidden.shape, generator=generator).to(hidden)
    return hidden + DISTURBANCE * hidden.detach().float().std().to(hidden.dtype) * noise


def _without(
    args: tuple[Any, ...], kwargs: dict[str, Any], slot: int | str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(slot, int):
        return args[:slot] + args[slot + 1 :], kwargs
    return args, {key: value for key, value in kwargs.items() if key != slot}
