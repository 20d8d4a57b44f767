"""Experts of a mixture, which Transformers keeps as one parameter a layer, seen one by one while they are quantized.

Checkpoints name every expert's matrices (`experts.3.gate_proj.weight`); Transformers stacks them while loading. How, is
found out by undoing it on numbered elements. While `separated`, each matrix is a linear layer whose weight is a view
into the stacked parameter: what is written into it is written into the model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from auto_mmround.model.structure import find_experts


@dataclass(frozen=True)
class Expert:
    """One matrix of one expert: ``rows`` of ``parameter[index]``, whose checkpoint key is ``key``."""

    key: str
    parameter: str
    index: int
    rows: slice
    columns: int


def separable(model: PreTrainedModel) -> dict[str, Expert]:
    """Module name as if experts were modules (`..experts.3.up_proj`) -> where its weight lies.

    Layers whose checkpoint stacks the experts too, transposed, interleaved or biased ones are left out.
    """
    found: dict[str, Expert] = {}
    fused = find_experts(model).fused
    for path in dict.fromkeys(name.rpartition(".")[0] for name in fused):
        module: Any = model.get_submodule(path)
        plain = getattr(module, "is_concatenated", False) and getattr(module, "has_gate", False)
        if not plain or module.is_transposed or module.has_bias or module.has_post_expert_norm:
            continue
        count = int(module.num_experts)  # type: ignore[arg-type]
        parts = {leaf: _taken_apart(model, f"{path}.{leaf}", fused) for leaf in ("gate_up_proj", "down_proj")}
        if [len(part) for part in parts.values()] == [2 * count, count]:
            for part in parts.values():
                found |= {f"{path}.{expert.index}.{_leaf(expert)}": expert for expert in part}
    return found


def _leaf(expert: Expert) -> str:
    return expert.key.removesuffix(".weight").rpartition(".")[2]


def _taken_apart(model: PreTrainedModel, name: str, fused: Mapping[str, tuple[int, int, int]]) -> list[Expert]:
    """The checkpoint's matrices in a stacked parameter, in their order in it; empty where it can't be told."""
    if name not in fused:
        return []
    count, rows, columns = fused[name]
    numbered = torch.arange(count * 4).reshape(count, 4, 1).expand(-1, -1, 2).contiguous()
    found = []
    for key, part in revert_weight_conversion(model, {name: numbered}).items():
        first = int(part.flatten()[0])
        straight = torch.equal(part, numbered[first // 4, first % 4 : first % 4 + len(part)])
        if part.ndim != 2 or not straight or not key.endswith(".weight"):
            return []
        start, height = first % 4 * rows // 4, len(part) * rows // 4
        found.append(Expert(key, name, first // 4, slice(start, start + height), columns))
    return sorted(found, key=lambda expert: (expert.index, expert.rows.start))


@contextmanager
def separated(model: PreTrainedModel) -> Iterator[None]:
    """While open, the model's separable experts are linear layers of their own, with views as weights."""
    originals: dict[str, nn.Module] = {}
    layers: dict[str, dict[int, dict[str, nn.Linear]]] = {}
    for name, expert in separable(model).items():
        path = expert.parameter.rpartition(".")[0]
        weight = model.get_parameter(expert.parameter).data[expert.index, expert.rows]
        layers.setdefault(path, {}).setdefault(expert.index, {})[name.rpartition(".")[2]] = _linear(weight)
    try:
        for path, experts in layers.items():
            originals[path] = model.get_submodule(path)
            model.set_submodule(path, Separate(originals[path], experts))
        yield
    finally:
        for path, module in originals.items():
            model.set_submodule(path, module)


def _linear(weight_OI: Tensor) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    return layer


class Separate(nn.Module):
    """Stands for a stacked experts module: the same tokens through the same matrices, one expert after the other."""

    def __init__(self, stacked: Any, experts: Mapping[int, Mapping[str, nn.Linear]]):
        super().__init__()
        self.apply_gate = stacked._apply_gate
        for index, layers in experts.items():  # two that read the token, then the one that reads them
            self.add_module(str(index), nn.ModuleDict(layers))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states (T, D), top_k_index and top_k_weights (T, k): the weighted sum of the chosen experts."""
        result = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            *into, out = self.get_submodule(str(index)).children()
            tokens, places = torch.where(top_k_index == index)
            x = hidden_states[tokens]
            y = out(self.apply_gate(torch.cat([layer(x) for layer in into], -1))) * top_k_weights[tokens, places, None]
            result = result.index_add(0, tokens, y.to(result.dtype))
        return result
