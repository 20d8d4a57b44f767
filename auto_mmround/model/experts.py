"""Experts of a mixture, which Transformers keeps as one parameter a layer, seen one by one while
they are quantized.

Most checkpoints name every expert's matrices (`experts.3.gate_proj.weight`), and Transformers
stacks them while loading. Some stack them too; quantized checkpoints of those name them all the
same, which is what engines expect. While `separated`, each matrix is a linear layer whose weight is
a view into the stacked parameter: what is written into it is written into the model.
"""

import inspect
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from auto_mmround.errors import UserError
from auto_mmround.model.loading import renamed_keys
from auto_mmround.model.structure import find_experts

HALVES = ("gate_proj", "up_proj")  # of gate_up_proj, in this order
SINGLE = re.compile(r"(.+)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


@dataclass(frozen=True)
class Expert:
    """One matrix (out, in) of one expert: ``rows`` of ``parameter[index]``, which is (in, out)
    where ``transposed``.

    tail: the end of its checkpoint key, "3.gate_proj.weight". stacked: the original checkpoint
      has no such key.
    """

    tail: str
    parameter: str
    index: int
    rows: slice
    transposed: bool
    stacked: bool

    def of(self, stack_EOI: Tensor) -> Tensor:
        """The matrix as a view into the stacked parameter."""
        matrix = stack_EOI[self.index]
        return (matrix.t() if self.transposed else matrix)[self.rows]


def separable(model: PreTrainedModel) -> dict[str, Expert]:
    """Module name as if experts were modules (`..experts.3.up_proj`) -> where its weight lies.

    Interleaved and biased experts are left out, as are those that are stacked in a way that is not
    understood.
    """
    found: dict[str, Expert] = {}
    fused = find_experts(model).fused
    for path in dict.fromkeys(name.rpartition(".")[0] for name in fused):
        module: Any = model.get_submodule(path)
        odd = [getattr(module, flag, False) for flag in ("has_bias", "has_post_expert_norm")]
        if (
            any(odd)
            or not getattr(module, "is_concatenated", True)
            or not getattr(module, "has_gate", True)
        ):
            continue
        into, out = (fused.get(f"{path}.{leaf}") for leaf in ("gate_up_proj", "down_proj"))
        if into is None or out is None or len(list(module.parameters(recurse=False))) != 2:
            continue
        transposed = into[2] == 2 * out[1] and into[1] == out[2]
        if not transposed and into[1] != 2 * out[2]:
            continue
        for leaf in ("gate_up_proj", "down_proj"):
            for expert in _matrices(model, f"{path}.{leaf}", fused[f"{path}.{leaf}"], transposed):
                found[f"{path}.{expert.tail.removesuffix('.weight')}"] = expert
    return found


def _matrices(
    model: PreTrainedModel, name: str, shape: tuple[int, int, int], transposed: bool
) -> list[Expert]:
    """The matrices in a stacked parameter, in their order. How Transformers stacks them is found
    out by undoing it on numbered elements."""
    count, rows = shape[0], shape[2 if transposed else 1]
    numbered = torch.arange(count * 4).reshape(count, 4, 1).expand(-1, -1, 2).contiguous()
    undone = revert_weight_conversion(model, {name: numbered})
    if len(undone) == 1:
        leaves = HALVES if name.endswith("gate_up_proj") else ("down_proj",)
        size = rows // len(leaves)
        return [
            Expert(
                f"{i}.{leaf}.weight", name, i, slice(at * size, (at + 1) * size), transposed, True
            )
            for i in range(count)
            for at, leaf in enumerate(leaves)
        ]
    found = []
    for key, part in undone.items():
        first = int(part.flatten()[0])
        at = first % 4
        if (
            transposed
            or part.ndim != 2
            or not torch.equal(part, numbered[first // 4, at : at + len(part)])
        ):
            return []
        lines = slice(at * rows // 4, (at + len(part)) * rows // 4)
        found.append(Expert(".".join(key.split(".")[-3:]), name, first // 4, lines, False, False))
    return sorted(found, key=lambda expert: (expert.index, expert.rows.start))


def stacking(
    model: PreTrainedModel, keys: Collection[str]
) -> dict[str, tuple[str, dict[str, Expert]]]:
    """Key of a stack in the original checkpoint -> (its parameter, key of each expert's matrix ->
    where it lies there).

    Of the families whose checkpoints stack experts, and of stacks whose matrices are all among the
    ``keys``.
    """
    stacks: dict[str, dict[str, Expert]] = {}
    for expert in separable(model).values():
        if expert.stacked:
            stacks.setdefault(expert.parameter, {})[expert.tail] = expert
    if not stacks:
        return {}
    singles = [found for key in keys if (found := SINGLE.fullmatch(key))]
    wanted = {f"{found[1]}.{leaf}" for found in singles for leaf in ("gate_up_proj", "down_proj")}
    complete = {}
    for key, name, _ in renamed_keys(model, sorted(wanted)):
        members = {
            f"{key.rpartition('.')[0]}.{tail}": expert
            for tail, expert in stacks.get(name, {}).items()
        }
        if members and all(member in keys for member in members):
            complete[key] = name, members
    return complete


def restacked(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose experts have keys of their own, as the original checkpoint of a stacking
    family has them."""
    return restack(model, state, stacking(model, state))


def restack(
    model: PreTrainedModel,
    state: dict[str, Tensor],
    stacks: Mapping[str, tuple[str, Mapping[str, Expert]]],
) -> dict[str, Tensor]:
    """The same for those stacks of `stacking` whose matrices lie in the state dict."""
    for key, (name, members) in stacks.items():
        if next(iter(members)) in state:
            stack = torch.empty(
                model.get_parameter(name).shape, dtype=state[next(iter(members))].dtype
            )
            for member, expert in members.items():
                expert.of(stack).copy_(state.pop(member))
            state[key] = next(iter(revert_weight_conversion(model, {name: stack}).values()))
    return state


@contextmanager
def separated(
    model: PreTrainedModel,
    experts: Mapping[str, Expert] | None = None,
    blocks: Sequence[str] = ("",),
) -> Iterator[None]:
    """While open, the model's separable experts are linear layers of their own, with views as
    weights.

    experts: those of `separable`, if it is known. blocks: names of modules, to separate nothing
    outside of them. Raises UserError where the model's own experts compute something else.
    """
    layers: dict[str, dict[int, dict[str, nn.Linear]]] = {}
    for name, expert in (separable(model) if experts is None else experts).items():
        if not any(not block or name.startswith(f"{block}.") for block in blocks):
            continue
        path, leaf = expert.parameter.rpartition(".")[0], name.rpartition(".")[2]
        weight = expert.of(model.get_parameter(expert.parameter).data)
        layers.setdefault(path, {}).setdefault(expert.index, {})[leaf] = _linear(weight)
    originals: dict[str, nn.Module] = {}
    checked: set[type] = set()
    try:
        for path, matrices in layers.items():
            original = model.get_submodule(path)
            separate = Separate(original, matrices)
            if type(original) not in checked and not _same(original, separate):
                raise UserError(
                    f"{path}: its experts are not the usual gate, up and down; see"
                    " docs/new-model.md"
                )
            checked.add(type(original))
            originals[path] = original
            model.set_submodule(path, separate)
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
    """Stands for a stacked experts module: the same tokens through the same matrices, one expert
    after the other."""

    def __init__(self, stacked: Any, experts: Mapping[int, Mapping[str, nn.Linear]]):
        super().__init__()
        self.act_fn, self.count = stacked.act_fn, len(experts)
        self.own_gate = getattr(stacked, "_apply_gate", None)
        # Llama 4 sorts tokens beforehand
        self.routed = len(inspect.signature(type(stacked).forward).parameters) != 2
        # two that read the token, then the one that reads them
        for index, layers in experts.items():
            self.add_module(str(index), nn.ModuleDict(layers))

    def forward(self, hidden_states: Tensor, *routing: Any, **named: Any) -> Tensor:
        """hidden_states (T, D), top_k_index and top_k_weights (T, k): the weighted sum of the
        chosen experts; without them (E T, D), the tokens of every expert, zero where it was not
        chosen."""
        result = torch.zeros_like(hidden_states)
        if self.routed or routing or named:
            return self._routed(hidden_states, result, *routing, **named)
        size = len(hidden_states) // self.count
        for index in range(self.count):
            part = hidden_states[index * size : (index + 1) * size]
            chosen = part.abs().amax(-1).nonzero()[:, 0]
            result = result.index_add(
                0, index * size + chosen, self._expert(index, part[chosen]).to(result.dtype)
            )
        return result

    def _routed(
        self, hidden_states: Tensor, result: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        for index in top_k_index.unique().tolist():
            tokens, places = torch.where(top_k_index == index)
            y = self._expert(index, hidden_states[tokens]) * top_k_weights[tokens, places, None]
            result = result.index_add(0, tokens, y.to(result.dtype))
        return result

    def _expert(self, index: int, x: Tensor) -> Tensor:
        gate, up, down = self.get_submodule(str(index)).children()
        if self.own_gate is not None:
            return down(self.own_gate(torch.cat([gate(x), up(x)], -1)))
        return down(self.act_fn(gate(x)) * up(x))


def _same(original: nn.Module, separate: Separate) -> bool:
    """Whether both give the same for two tokens an expert."""
    weight = next(original.parameters())
    if weight.is_meta:
        return True
    first: Any = next(iter(separate.get_submodule("0").children()))
    x = torch.randn(
        2 * separate.count, first.in_features, generator=torch.Generator().manual_seed(0)
    ).to(weight)
    routing: tuple[Tensor, ...] = ()
    if separate.routed:
        index = torch.arange(2 * separate.count, device=weight.device)[:, None] % separate.count
        routing = (index, torch.ones_like(index, dtype=weight.dtype))
    with torch.no_grad():
        ours, theirs = separate(x, *routing), original(x, *routing)
    return bool((ours - theirs).norm() <= 0.02 * theirs.norm())
