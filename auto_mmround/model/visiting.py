"""A model that visits an accelerator: as a whole, or its blocks one by one and all else of it
meanwhile."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from auto_mmround.model import devices
from auto_mmround.model.streaming import InTurn, has_room
from auto_mmround.model.structure import every_block


def fits_whole(model: nn.Module, device: torch.device) -> bool:
    """As `has_room`, for all of the model."""
    return has_room(
        sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())), device
    )


@contextmanager
def visiting(model: PreTrainedModel, device: torch.device, whole: bool) -> Iterator["Visiting"]:
    """While open, the model computes on ``device``; if not ``whole``, its blocks come one by one.
    Afterwards it holds the tensors that it held, at home, with what was changed in them."""
    blocks = [] if whole else every_block(model)
    device = torch.empty(0, device=device).device  # with its number
    guest = Visiting(model, device, blocks)
    try:
        guest.arrive()
        yield guest
    finally:
        guest.leave()


class _Place(NamedTuple):
    """Where a tensor stands in a module: its table there, and its name in it. home: the tensor that
    belongs there. guest: what stands for it on the device."""

    table: dict[str, Any]
    name: str
    home: Tensor
    guest: Tensor


class Visiting(InTurn):
    """Puts copies on the device in the place of a block's tensors when its turn comes. Changes of a
    `resident` block are written home."""

    def __init__(self, model: PreTrainedModel, device: torch.device, blocks: Sequence[str]):
        # Whoever asks where the model lies looks at its first parameter.
        first = next(name for name, _ in model.named_parameters())
        super().__init__(model, [block for block in blocks if not first.startswith(f"{block}.")])
        self._device = device
        self._away: dict[str, list[_Place]] = {}
        inside = {id(module) for block in self._blocks.values() for module in block.modules()}
        outside = [module for module in model.modules() if id(module) not in inside]
        held = Counter(i for block in self._blocks.values() for i in _ids(block.modules()))
        # of several blocks, or not of a block alone
        self._staying = {i for i, count in held.items() if count > 1} | _ids(outside)

    def replace(self, block: str, write: Callable[[], None]) -> None:
        """Nothing to do: what was changed is changed."""

    def arrive(self) -> None:
        """All but the blocks is on the device."""
        self._send("", self._model.modules(), lambda tensor: id(tensor) in self._staying)

    def leave(self) -> None:
        """All is back."""
        for hook in self._hooks.values():
            hook.remove()
        self._passing = None
        for block in list(self._away):
            self._release(block, changed=True)
        devices.release_cache()

    def _read(self, block: str) -> None:
        self._send(block, self._blocks[block].modules(), lambda tensor: True)

    def _send(
        self, key: str, modules: Iterable[nn.Module], wanted: Callable[[Tensor], bool]
    ) -> None:
        guests: dict[int, Tensor] = {}  # tied ones stay tied
        places = self._away.setdefault(key, [])
        for table, name, home in _tensors(modules):
            if home.device != self._device and wanted(home):
                if id(home) not in guests:
                    moved = home.detach().to(self._device)
                    guests[id(home)] = (
                        nn.Parameter(moved, home.requires_grad)
                        if isinstance(home, nn.Parameter)
                        else moved
                    )
                table[name] = guests[id(home)]
                places.append(_Place(table, name, home, guests[id(home)]))

    @torch.no_grad()
    def _release(self, block: str, changed: bool = False) -> None:
        for table, name, home, guest in self._away.pop(block, []):
            if changed and table.get(name) is guest:
                home.copy_(guest)
            table[name] = home


def _tensors(modules: Iterable[nn.Module]) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    for module in modules:
        for table in (module._parameters, module._buffers):
            yield from (
                (table, name, tensor) for name, tensor in list(table.items()) if tensor is not None
            )


def _ids(modules: Iterable[nn.Module]) -> set[int]:
    return {id(tensor) for _, _, tensor in _tensors(modules)}
