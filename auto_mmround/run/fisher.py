"""The Fisher information within the memory that there is; of a streamed model with few readings of
its files."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from auto_mmround.model import devices, fisher
from auto_mmround.model.chains import Kinds
from auto_mmround.model.fisher import Fisher, FisherPasses, Precision, SideBySide
from auto_mmround.model.streaming import Holder, device_of
from auto_mmround.model.structure import Stage
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.out_of_memory import FEWER, SHARE, BatchSize, Graph
from auto_mmround.run.processes import ALONE, Processes

WHAT, HELPS = "Fisher information", f"--disable_fisher leaves it out, or {FEWER}"
MOST = 64  # samples side by side: each has a thread


def measure_fisher(
    model: PreTrainedModel,
    recipe: Recipe,
    stages: Sequence[Stage],
    batches: Sequence[Mapping[str, Any]],
    kinds: Sequence[Kinds],
    layers: Iterable[str],
    *,
    holder: Holder,
    precision: Precision,
    disk: Callable[[Tensor], Tensor] | None = None,
    processes: Processes = ALONE,
) -> Fisher:
    """`fisher.measure_fisher` by the recipe.

    Of a model in memory a sample at a time; where its graph does not fit, blocks are computed
    again. Of a streamed one as many side by side as memory holds what their blocks are given, or
    ``disk`` does. Raises UserError where memory does not suffice for one sample.
    """
    device = device_of(model)
    how = FisherPasses(
        recipe.seed, precision, share=processes.share,
        add_up=lambda sums: processes.add_named(sums, device),
    )  # fmt: skip
    measure = partial(fisher.measure_fisher, model, stages, batches, kinds, list(layers))
    longest = max((len(own.text_T) for own in kinds), default=0)
    if not holder.blocks:
        graph = Graph(model, longest)

        def in_memory(size: int) -> Fisher:
            with graph():
                return measure(how)

        return BatchSize().fitting(WHAT, in_memory, graph.relieve, HELPS)
    memory: Callable[[Tensor], Tensor] = _as_it_is if device.type == "cpu" else Tensor.cpu
    places = [disk] if disk and recipe.offload_states else [memory, *([disk] if disk else [])]
    count = MOST if places[0] is disk else _side_by_side(model, holder.blocks, longest)

    def streamed(size: int) -> Fisher:
        return measure(replace(how, side=SideBySide(size, holder.blocks, places[0])))

    def to_disk() -> bool:
        return len(places) > 1 and bool(places.pop(0))

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
