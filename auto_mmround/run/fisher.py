"""The Fisher information within the memory that there is; of a streamed model with few readings of
its files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auto_mmround.model import devices, fisher
from auto_mmround.model.abreast import Keep
from auto_mmround.model.chains import Modalities
from auto_mmround.model.fisher import Fisher, FisherPasses, SideBySide
from auto_mmround.model.streaming import Holder
from auto_mmround.model.structure import Stage, every_block
from auto_mmround.run.out_of_memory import FEWER, SHARE, BatchSize, Graph

WHAT, HELPS = "Fisher information", f"--disable_fisher leaves it out, or {FEWER}"
MOST = 64  # samples side by side: each has a thread


def places_of(device: torch.device, disk: Keep | None, offload: bool) -> list[Keep]:
    """Host memory, then the disk; the disk alone where states are to be offloaded."""
    memory: Keep = _as_it_is if device.type == "cpu" else Tensor.cpu
    return [place for place in (memory if not (disk and offload) else None, disk) if place]


def measure_fisher(
    model: PreTrainedModel,
    stages: Sequence[Stage],
    batches: Sequence[Mapping[str, Any]],
    modalities: Sequence[Modalities],
    layers: Iterable[str],
    how: FisherPasses,
    holder: Holder,
    places: Sequence[Keep],
) -> Fisher:
    """`fisher.measure_fisher` within the memory that there is.

    A model in memory takes one sample at a time. Where its graph does not fit, blocks are computed
    again. A streamed model takes as many samples side by side as have room in the first of
    ``places`` for the inputs of their blocks; then in the next. Raises UserError where memory does
    not suffice for one sample.
    """
    measure = partial(fisher.measure_fisher, model, stages, batches, modalities, list(layers))
    longest = max((len(own.text_T) for own in modalities), default=0)
    if not holder.blocks:
        graph = Graph(model, longest)

        def in_memory(size: int) -> Fisher:
            with graph():
                return measure(how)

        return BatchSize().fitting(WHAT, in_memory, graph.relieve, HELPS)
    left = list(places)
    in_host = left[0] in (_as_it_is, Tensor.cpu)
    # All blocks, also one that its holder leaves where it is: graphs are cut at each.
    order = every_block(model)
    count = _side_by_side(model, order, longest * how.here) if in_host else MOST

    def streamed(size: int) -> Fisher:
        return measure(replace(how, side=SideBySide(size, order, left[0])))

    def to_disk() -> bool:
        return len(left) > 1 and bool(left.pop(0))

    return BatchSize(count).fitting(WHAT, streamed, to_disk, HELPS)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def _side_by_side(model: PreTrainedModel, blocks: Sequence[str], tokens: int) -> int:
    """Samples whose hidden states before all blocks fit into `SHARE` of the free memory: a power of
    2."""
    width = model.config.get_text_config().hidden_size
    each = max(1, len(blocks) * tokens * width * model.dtype.itemsize)
    fit = int(SHARE * devices.free_memory(devices.HOST)) // each
    return 1 << (max(1, min(MOST, fit)).bit_length() - 1)
