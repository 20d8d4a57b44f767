"""Experts of a mixture, one by one. Transformers keeps all experts of a layer as one parameter;
quantizing needs the single matrices.

Most checkpoints name every expert's matrices (`experts.3.gate_proj.weight`), and Transformers
stacks them while loading. Some checkpoints store stacks; their quantized checkpoints name single
matrices too, as engines expect. While `separated`, each matrix is a linear layer whose weight is a
view into the stacked parameter, so writing into it changes the model.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from auto_mmround.errors import UserError
from auto_mmround.model.structure import find_experts

HALVES = ("gate_proj", "up_proj")  # of gate_up_proj, in this order
ROWS = 4  # of a numbered expert: enough for every part that conversions split or exchange


@dataclass(frozen=True)
class Expert:
    """One matrix (out, in) of one expert: ``rows`` of ``parameter[index]``, which is (in, out) if
    ``transposed``.

    key: the checkpoint key, as Transformers would save it. stacked: the original checkpoint stacks
      it and has no such key. alone: readers also take the experts of this stack one by one. named:
      the checkpoint calls the stack as the model does. biases: the parameter (experts, out) of the
      biases, if there is one.
    """

    key: str
    parameter: str
    index: int
    rows: slice
    transposed: bool
    stacked: bool
    alone: bool = True
    named: bool = True
    biases: str = ""

    @property
    def tail(self) -> str:
        """The end of its key, "3.gate_proj.weight"."""
        return ".".join(self.key.split(".")[-3:])

    @property
    def bias(self) -> "Expert | None":
        """Where its bias lies, a vector (out)."""
        if not self.biases:
            return None
        key = f"{self.key.removesuffix('.weight')}.bias"
        return replace(self, key=key, parameter=self.biases, transposed=False, biases="")

    def of(self, stack_EOI: Tensor) -> Tensor:
        """The matrix, or vector, as a view into the stacked parameter."""
        matrix = stack_EOI[self.index]
        return (matrix.t() if self.transposed else matrix)[self.rows]


class Stack(NamedTuple):
    """A parameter that holds one matrix of every expert, or two, one below the other. leaves: their
    names. Some models mix gate and up line by line (gpt-oss). AutoRound cuts these into an upper
    and a lower half, and so do we. exchanged: Transformers can exchange the kernel of its module.
    AutoRound takes such stacks apart, whatever their checkpoints call them."""

    parameter: str
    shape: tuple[int, int, int]
    leaves: tuple[str, ...]
    transposed: bool = False
    alone: bool = True
    exchanged: bool = False
    biases: str = ""

    def lines(self, at: int, size: int) -> slice:
        """The rows of leaf number ``at`` among an expert's ``size`` rows."""
        count = len(self.leaves)
        return slice(at * size // count, (at + 1) * size // count)


def separable(model: PreTrainedModel) -> dict[str, Expert]:
    """Module name as if experts were modules (`..experts.3.up_proj`) -> the place of its weight.

    Left out are experts that are stacked in an unknown way, and experts that compute something else
    than `Separate`.
    """
    fused, stacks = find_experts(model).fused, dict[str, list[Stack]]()
    for path in dict.fromkeys(name.rpartition(".")[0] for name in fused):
        stacks[path] = _stacks(model.get_submodule(path), path, fused)
    keys = _keys(model, [stack for each in stacks.values() for stack in each])
    beginnings = _beginnings(model, stacks)
    singles: dict[str, Expert] = {}
    checked: dict[tuple[type, int], bool] = {}
    for path, each in stacks.items():
        experts = {
            f"{path}.{expert.index}{leaf and '.'}{leaf}": expert
            for stack in each
            for leaf, expert in _matrices(stack, keys[stack.parameter], beginnings[path])
        }
        module = model.get_submodule(path)
        form = type(module), len(experts)
        if experts and form not in checked:
            checked[form] = _same(module, Separate(module, _layers(module, path, experts)))
        if experts and checked[form]:
            singles |= experts
    return singles


def _stacks(module: Any, path: str, fused: Mapping[str, tuple[int, int, int]]) -> list[Stack]:
    """The stacked parameters of a module, if `Separate` knows them: gate and up with down, up with
    down, or a single one. Else none."""
    leaves = [name for name, _ in module.named_parameters(recurse=False)]
    shapes = {leaf: fused[f"{path}.{leaf}"] for leaf in leaves if f"{path}.{leaf}" in fused}
    biases = {f"{leaf}_bias" for leaf in shapes}
    if leaves == ["weight"]:
        return [Stack(f"{path}.weight", shapes["weight"], ("",), alone=False)]
    gated = "gate_up_proj" in shapes
    wanted = {"gate_up_proj" if gated else "up_proj", "down_proj"}
    if set(shapes) != wanted or not set(leaves) <= wanted | biases:
        return []
    into, out = shapes["gate_up_proj" if gated else "up_proj"], shapes["down_proj"]
    parts = 2 if gated else 1
    turned = gated and into[2] == 2 * out[1] and into[1] == out[2]
    transposed = bool(getattr(module, "is_transposed", turned))
    rows, columns = (into[2], into[1]) if transposed else (into[1], into[2])
    back = (out[2], out[1]) if transposed else (out[1], out[2])
    if into[0] != out[0] or rows != parts * back[1] or columns != back[0]:
        return []
    exchanged = hasattr(module, "is_concatenated")
    plain = len(leaves) == 2 or (exchanged and biases <= set(leaves))
    alone = gated and plain and not hasattr(module, "post_expert_norm")
    first = next(leaf for leaf in shapes if leaf != "down_proj")
    made = {first: HALVES if gated else (first,), "down_proj": ("down_proj",)}
    return [
        Stack(
            f"{path}.{leaf}", shapes[leaf], names, transposed, alone, exchanged,
            f"{path}.{leaf}_bias" if f"{leaf}_bias" in leaves else "",
        )
        for leaf, names in made.items()
    ]  # fmt: skip


def _keys(
    model: PreTrainedModel, stacks: Sequence[Stack]
) -> dict[str, dict[str, tuple[int, Tensor]]]:
    """Parameter -> key that Transformers saves of it -> (number of the parameter's first element,
    the elements). All elements get numbers. Undoing the stacking then shows where each came from.
    """
    sizes = [stack.shape[0] * ROWS for stack in stacks]
    starts = torch.tensor([0, *sizes]).cumsum(0).tolist()
    numbered = {
        stack.parameter: torch.arange(start, start + size)
        .reshape(-1, ROWS, 1)
        .expand(-1, -1, 2)
        .contiguous()
        for stack, size, start in zip(stacks, sizes, starts)
    }
    owner = {
        start + i: (stack.parameter, start)
        for stack, size, start in zip(stacks, sizes, starts)
        for i in range(size)
    }
    saved: dict[str, dict[str, tuple[int, Tensor]]] = {name: {} for name in numbered}
    for key, part in revert_weight_conversion(model, numbered).items():
        parameter, start = owner[int(part.flatten()[0])]
        saved[parameter][key] = start, part - start
    return saved


def _beginnings(model: PreTrainedModel, paths: Iterable[str]) -> dict[str, str]:
    """Module of experts -> its name in a checkpoint that Transformers saves."""
    single = ".0.gate_proj.weight"
    undone = revert_weight_conversion(model, {f"{p}{single}": torch.empty(0) for p in paths})
    return dict(zip(paths, (key.removesuffix(single) for key in undone)))


def _matrices(
    stack: Stack, keys: Mapping[str, tuple[int, Tensor]], beginning: str
) -> Iterator[tuple[str, Expert]]:
    """(name of the matrix, its place) of all matrices in a stacked parameter, in their order. keys:
    from `_keys`. beginning: from `_beginnings`."""
    size = stack.shape[2 if stack.transposed else 1]
    parts = [part for _, part in keys.values()]
    if len(parts) <= len(stack.leaves) and all(part.ndim == 3 for part in parts):
        prefix, _, last = next(iter(keys)).rpartition(".")
        # Granite's are `input_linear` in checkpoints, and have their module's names apart
        named = last == stack.parameter.rpartition(".")[2]
        alone = stack.alone and (named or stack.exchanged)
        prefix = prefix if named or not alone else beginning
        for i in range(stack.shape[0]):
            for at, leaf in enumerate(stack.leaves):
                key = f"{prefix}.{i}.{leaf}.weight" if leaf else f"{prefix}.{i}.weight"
                lines = stack.lines(at, size)
                where = key, stack.parameter, i, lines, stack.transposed
                yield leaf, Expert(*where, True, alone, named, stack.biases)
        return
    matrices = []
    numbered = torch.arange(stack.shape[0] * ROWS).reshape(-1, ROWS, 1).expand(-1, -1, 2)
    for key, part in ((key, part) for key, (_, part) in keys.items()):
        first = int(part.flatten()[0])
        index, at = divmod(first, ROWS)
        if stack.transposed or part.ndim != 2:
            return
        if not torch.equal(part, numbered[index, at : at + len(part)]):
            return
        lines = slice(at * size // ROWS, (at + len(part)) * size // ROWS)
        leaf = key.split(".")[-2]
        expert = Expert(key, stack.parameter, index, lines, False, False)
        matrices.append((index, lines.start, leaf, expert))
    for _, _, leaf, expert in sorted(matrices, key=lambda each: each[:2]):
        yield leaf, expert


@contextmanager
def separated(
    model: PreTrainedModel,
    experts: Mapping[str, Expert] | None = None,
    blocks: Sequence[str] = ("",),
    known: bool = False,
) -> Iterator[None]:
    """While open, the model's separable experts are linear layers, whose weights are views.

    experts: the result of `separable`, if the caller has it. blocks: names of modules; experts
    outside of them stay. known: the caller knows that `Separate` computes what the model does; else
    it is tried. Raises UserError if it does not.
    """
    inside: dict[str, dict[str, Expert]] = {}
    for name, expert in (separable(model) if experts is None else experts).items():
        if any(not block or name.startswith(f"{block}.") for block in blocks):
            inside.setdefault(expert.parameter.rpartition(".")[0], {})[name] = expert
    originals: dict[str, nn.Module] = {}
    checked: set[type] = set()
    try:
        for path, members in inside.items():
            original = model.get_submodule(path)
            separate = Separate(original, _layers(original, path, members))
            if not known and type(original) not in checked and not _same(original, separate):
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


def with_hooks(
    model: PreTrainedModel, experts: Mapping[str, Expert], hooks: Mapping[str, Callable[..., Any]]
) -> None:
    """From now on hooks see what these experts' layers are given; their module computes one expert
    after the other. experts: the result of `separable`."""
    inside: dict[str, dict[str, Expert]] = {}
    for name, expert in experts.items():
        inside.setdefault(expert.parameter.rpartition(".")[0], {})[name] = expert
    for path, members in inside.items():
        if own := {name: hooks[name] for name in members if name in hooks}:
            module = model.get_submodule(path)
            module.forward = partial(_one_by_one, module, path, members, own)


def _one_by_one(
    module: nn.Module, path: str, experts: Mapping[str, Expert],
    hooks: Mapping[str, Callable[..., Any]], *given: Any, **named: Any,
) -> Any:  # fmt: skip
    # made anew each time: a streamed model has other tensors by then
    separate = Separate(module, _layers(module, path, experts))
    for name, hook in hooks.items():
        separate.get_submodule(name[len(path) + 1 :]).register_forward_pre_hook(hook)
    return separate(*given, **named)


def _layers(
    module: nn.Module, path: str, experts: Mapping[str, Expert]
) -> dict[str, dict[str, nn.Linear]]:
    """Number of an expert -> name of the matrix, empty for a single one -> layer."""
    layers: dict[str, dict[str, nn.Linear]] = {}
    for name, expert in experts.items():
        index, _, leaf = name[len(path) + 1 :].partition(".")
        bias = expert.bias
        layers.setdefault(index, {})[leaf] = _linear(
            _own(module, expert), None if bias is None else _own(module, bias)
        )
    return layers


def _own(module: nn.Module, expert: Expert) -> Tensor:
    return expert.of(module.get_parameter(expert.parameter.rpartition(".")[2]).data)


def _linear(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    with torch.device("meta"):
        layer = nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False)
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O, requires_grad=False)
    return layer


class Separate(nn.Module):
    """Stands in for a module of stacked experts. The same tokens pass the same matrices, one expert
    after the other."""

    def __init__(self, stacked: Any, experts: Mapping[str, Mapping[str, nn.Linear]]):
        super().__init__()
        self.act_fn: Any = getattr(stacked, "act_fn", None)
        self.count = len(experts)
        self.own_gate = getattr(stacked, "_apply_gate", None)
        # Llama 4 sorts tokens beforehand
        self.routed = len(inspect.signature(type(stacked).forward).parameters) != 2
        # first the layers that read the token, then the one that reads their output
        for index, layers in experts.items():
            self.add_module(index, layers[""] if "" in layers else nn.ModuleDict(layers))
        if hasattr(stacked, "post_expert_norm"):
            self.post_expert_norm = stacked.post_expert_norm

    def forward(self, hidden_states: Tensor, *routing: Any, **named: Any) -> Tensor:
        """With top_k_index and top_k_weights (T, k): hidden_states are (T, D); the result is the
        weighted sum of the chosen experts. Without them: hidden_states are (E T, D), the tokens of
        every expert, zero for an expert that was not chosen. With a single matrix an expert:
        hidden_states are (T, D), sorted by expert, with the number of tokens of each expert.
        """
        if isinstance(self.get_submodule("0"), nn.Linear):
            parts = hidden_states.split(*routing, **named)
            return torch.cat([self.get_submodule(str(i))(part) for i, part in enumerate(parts)])
        result = torch.zeros_like(hidden_states)
        if self.routed or routing or named:
            return self._routed(hidden_states, result, *routing, *named.values())
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
        # Sorted by expert, so that the host waits once, and each expert's tokens are a slice.
        sorted_N, order_N = top_k_index.flatten().sort(stable=True)
        numbers_E = torch.arange(self.count, device=sorted_N.device)
        ends = torch.searchsorted(sorted_N, numbers_E, right=True).tolist()
        sizes = [end - start for start, end in pairwise([0, *ends])]
        tokens_N = order_N // top_k_index.shape[-1]
        weight_N1 = top_k_weights.flatten()[order_N, None]
        for i, (own_n, weight_n1) in enumerate(
            zip(tokens_N.split(sizes), weight_N1.split(sizes), strict=True)
        ):
            if len(own_n):
                y = self._expert(i, hidden_states[own_n]) * weight_n1
                result.index_add_(0, own_n, y.to(result.dtype))
        return result

    def _expert(self, index: int, x: Tensor) -> Tensor:
        *into, down = self.get_submodule(str(index)).children()
        y = down(self._gated([layer(x) for layer in into]))
        norm = getattr(self, "post_expert_norm", None)
        return y if norm is None else norm(y)

    def _gated(self, parts: list[Tensor]) -> Tensor:
        if len(parts) == 1:
            return self.act_fn(parts[0])
        if self.own_gate is None:
            return self.act_fn(parts[0]) * parts[1]
        return self.own_gate(torch.cat(parts, -1))


def _same(original: Any, separate: Separate) -> bool:
    """Whether both give the same for two tokens an expert. True for a module without weights, which
    can't be tried."""
    weight, first = next(original.parameters()), separate.get_submodule("0")
    if weight.is_meta:
        return True
    into: Any = first if isinstance(first, nn.Linear) else next(iter(first.children()))
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2 * separate.count, into.in_features, generator=draw).to(weight)
    routing: tuple[Any, ...] = ()
    if into is first:
        routing = ([2] * separate.count,)
    elif separate.routed:
        index = torch.arange(2 * separate.count, device=weight.device)[:, None] % separate.count
        routing = (index, torch.ones_like(index, dtype=weight.dtype))
    with torch.no_grad():
        ours, theirs = separate(x, *routing), original(x, *routing)
    return bool((ours - theirs).norm() <= 0.02 * theirs.norm())
