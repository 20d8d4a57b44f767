"""What stays in 16 bits, in bytes by part of the model, and the flag that would shrink each."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from auto_mmround.model.experts import separable
from auto_mmround.model.loading import Loaded
from auto_mmround.model.speaking import output_head
from auto_mmround.model.stored import stored_tensors
from auto_mmround.model.structure import find_experts, find_stages, input_weight
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.plan import Plan, stored_bits

# Part -> what would shrink it. A part that is not here has no such flag.
FLAGS = {
    "output head": "--quant_lm_head",
    "towers": "--quant_nontext_module",
    "layers that the class does not load": "--quant_mtp",
    "text blocks": "--to_quant_block_names",
    "layers kept by name": "fewer of --fp_layers, --ignore, --layer_config",
    "layers that do not fit": "another --group_size, --bits or --format",
}
BY_NAME = ("kept by ", "not among the targets")


@dataclass(frozen=True)
class Staying:
    """nbytes: of a part's tensors, as they will be written. flag: what would shrink it, None where
    nothing does."""

    part: str
    nbytes: int
    flag: str | None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def staying(loaded: Loaded, plan: Plan, recipe: Recipe) -> list[Staying]:
    """The parts, the largest first. The tensors of all of them and the quantized weights are the
    model."""
    model, size = loaded.model, _itemsize(loaded)
    sizes: dict[str, int] = {}
    for part, count in (*_loaded(model, plan), *_carried(plan)):
        sizes[part] = sizes.get(part, 0) + count * size
    off = {"layers that the class does not load": recipe.quant_mtp}
    rows = [Staying(p, n, None if off.get(p) else FLAGS.get(p)) for p, n in sizes.items() if n]
    return sorted(rows, key=lambda row: -row.nbytes)


def cost_of_untying(loaded: Loaded, plan: Plan) -> list[str]:
    """A line on what a head adds to the files that was the input embedding."""
    head = next((w for w in plan.weights if w.block is None and w.scheme), None)
    if not loaded.untied or head is None or head.scheme is None:
        return []
    count = head.out_features * head.in_features
    own, before = stored_bits(head, head.scheme) / 8, count * _itemsize(loaded)
    return [
        f"{head.name} gets a weight of its own: {own / 1e6:,.1f} MB more in the files (the input"
        f" embedding stays, {before / 1e6:,.1f} MB)"
    ]


def _itemsize(loaded: Loaded) -> int:
    """Bytes of a value in the files: a processor may hold float16 as float32."""
    stored = None if loaded.source is None else stored_tensors(loaded.source).dtype()
    dtype: torch.dtype = stored or loaded.model.dtype
    return dtype.itemsize


def _carried(plan: Plan) -> Iterator[tuple[str, int]]:
    for weight in plan.carried:
        if weight.scheme is None:
            yield "layers that the class does not load", weight.out_features * weight.in_features


def _loaded(model: PreTrainedModel, plan: Plan) -> Iterator[tuple[str, int]]:
    """(part, number of values) of every parameter, less what is quantized of it."""
    taken: dict[str, int] = {}
    experts = separable(model)
    for weight in plan.weights:
        if weight.scheme:
            name = weight.name
            key = experts[name].parameter if name in experts else f"{name}.weight"
            taken[key] = taken.get(key, 0) + weight.out_features * weight.in_features
    parts = _Parts(model, plan)
    for name, parameter in model.named_parameters():  # tied ones once
        yield parts.of(name, parameter), parameter.numel() - taken.get(name, 0)


class _Parts:
    """Which part of the model a parameter belongs to."""

    def __init__(self, model: PreTrainedModel, plan: Plan):
        head: Any = output_head(model)
        words = input_weight(model)
        embeddings = (m.weight for m in model.modules() if isinstance(m, nn.Embedding))
        self._special: dict[int, str] = {id(weight): "embeddings" for weight in embeddings}
        if isinstance(getattr(head, "weight", None), nn.Parameter) and head.weight is not words:
            self._special.setdefault(id(head.weight), "output head")
        if words is not None:
            self._special[id(words)] = "embeddings"
        chosen = {stage.path for stage in plan.stages}
        stages = [stage for stage in find_stages(model) if stage.path not in chosen]
        self._stages: Mapping[str, str] = {
            f"{stage.path}.": "text blocks" if stage.name == "text" else "towers"
            for stage in stages
        }
        experts = find_experts(model)
        self._no_flag = {*experts.fused, *(f"{name}.weight" for name in experts.routers)}
        self._kept: Mapping[str, str] = plan.kept
        self._formats = tuple(f"{fmt.name} " for fmt in plan.formats)

    def of(self, name: str, parameter: nn.Parameter) -> str:
        """The part's name."""
        if id(parameter) in self._special:
            return self._special[id(parameter)]
        stage = next((s for path, s in self._stages.items() if name.startswith(path)), None)
        if stage is not None:
            return stage
        if name in self._no_flag:
            return "routers and experts"
        reason = self._kept.get(name.removesuffix(".weight"), "")
        if reason.startswith(BY_NAME):
            return "layers kept by name"
        fits = not reason.startswith(self._formats)
        return "projectors, norms and the rest" if fits else "layers that do not fit"
