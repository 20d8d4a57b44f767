"""Linear weights that a checkpoint has and the model's class does not load: layers that predict
further tokens (MTP), extra heads, teachers.

They come along bit for bit. Engines build them, so every format lists them among the layers that
are not quantized. `quant_mtp` rounds a layer to 8 bits if the blocks have a quantized one of that
name (`self_attn.q_proj`, an expert's `gate_proj`): engines build these by the configuration. The
layer that joins two hidden states (`eh_proj`) is a plain one to them. Stacked experts (Qwen3.5's)
are named one by one, as engines ask for them, and stay.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.export.format import WholeFormat
from auto_mmround.lazy import Lazy
from auto_mmround.model.experts import HALVES
from auto_mmround.model.keys import renamed_keys
from auto_mmround.model.quantized import FLOATS
from auto_mmround.model.stored import Reader, Stored, stored_tensors
from auto_mmround.numerics.grids import Codes, to_groups
from auto_mmround.numerics.rounding import Rounding
from auto_mmround.numerics.scale_search import search_scale
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run.given import pruned
from auto_mmround.run.plan import Plan, WeightPlan, fused_set, grid_of, held

BITS = 8  # with 4 fewer of the tokens that such layers propose are right
EMBEDDINGS = ("embed_tokens", "wte", "word_embeddings", "embedding")
END = ".weight"
# Of a parameter that holds a matrix of every expert: the names of its parts.
STACKED = {"gate_up_proj": HALVES, "down_proj": ("down_proj",)}


def unread_keys(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """The keys that become no parameter of the model, nor a part of one -> what Transformers would
    call it."""
    own = set(model.state_dict())
    return {
        key: key if converted else name
        for key, name, converted in renamed_keys(model, keys)
        if name not in own
    }


def carried_modules(
    model: PreTrainedModel, stored: Stored, gone: Collection[str]
) -> dict[str, str]:
    """Module as Transformers would call it -> as the checkpoint does. These are linear layers that
    the class does not load, and single experts of stacks that it does not load. gone: keys that a
    user's own model has left behind."""
    modules: dict[str, str] = {}
    unread = unread_keys(model, stored.files).items()
    with Reader(stored) as reader:
        for key, name in ((key, name) for key, name in unread if key not in gone):
            leaves = STACKED.get(key.rpartition(".")[2], ())
            if _may_be_linear(key, stored):
                modules[name.removesuffix(END)] = key.removesuffix(END)
            elif leaves and len(shape := reader.plain(key).get_shape()) == 3:
                places = [n.rpartition(".")[0] for n in (name, key)]
                for i, leaf in product(range(shape[0]), leaves):
                    module, stored_as = (f"{place}.{i}.{leaf}" for place in places)
                    modules[module] = stored_as
    return modules


def _shape(reader: Reader, key: str) -> Sequence[int]:
    """Of the weight of a module by its checkpoint's name, which may lie in a stack."""
    if f"{key}{END}" in reader.stored.files:
        shape: Sequence[int] = reader.plain(f"{key}{END}").get_shape()
        return shape
    place, _, leaf = key.rpartition(".")
    stack = next(name for name, leaves in STACKED.items() if leaf in leaves)
    _, out, columns = reader.plain(f"{place.rpartition('.')[0]}.{stack}").get_shape()
    return out // len(STACKED[stack]), columns


def _may_be_linear(key: str, stored: Stored) -> bool:
    module = key.removesuffix(END)
    known = key in stored.scales or stored.dtypes.get(key) in FLOATS
    return key.endswith(END) and module.rpartition(".")[2] not in EMBEDDINGS and known


def with_carried(plan: Plan, model: PreTrainedModel, source: Path, recipe: Recipe) -> Plan:
    """The plan with what becomes of the weights that the class does not load. Raises UserError
    where `quant_mtp` meets no such weight, or a format that can't hold it."""
    stored = stored_tensors(source)
    modules = carried_modules(model, stored, pruned(model, stored, source))
    scheme = _scheme(recipe) if recipe.quant_mtp else None
    called = {part for name in plan.quantized for part in _called(name)}
    beside = {fused_set(name) for name in plan.quantized}
    weights = []
    with Reader(stored) as reader:
        for module, key in modules.items():
            shape = _shape(reader, key)
            if len(shape) == 2:
                alone = f"{key}{END}" in stored.files and fused_set(module) not in beside
                wanted = scheme if alone and called.intersection(_called(module)) else None
                reason = None if wanted else f"{type(model).__name__} does not load it"
                weights.append(WeightPlan(module, shape[0], shape[1], None, wanted, reason))
    if scheme is not None:
        rounded = [_held(weight, recipe) for weight in weights]
        weights = _together(rounded, rounded)
        if not any(weight.scheme for weight in weights):
            raise UserError(
                "quant_mtp: the model has no layers that its class does not load, of a kind with"
                " those that are quantized; leave it off"
            )
    # Keys and values of layers that share others' (Gemma 3n): engines read them with the queries.
    plan = replace(plan, weights=tuple(_together(plan.weights, weights)))
    used = {*plan.quantized.values(), *(w.scheme for w in weights if w.scheme)}
    targets = tuple(formats.resolve(name, used) for name in recipe.formats)
    return replace(plan, carried=tuple(weights), formats=targets)


def _scheme(recipe: Recipe) -> Scheme:
    base = formats.fitted(recipe.formats, replace(recipe.scheme, bits=BITS))
    if base.data_type != "int" or base.act_bits < 16 or base.scale_range:
        raise UserError(
            f"quant_mtp: 8-bit integers beside {recipe.format} of this scheme are not possible;"
            " leave it off"
        )
    for name in recipe.formats:
        fmt = formats.get(name)
        if isinstance(fmt, WholeFormat) or (BITS not in fmt.bits and fmt.packs):
            raise UserError(
                f"quant_mtp: {name} holds no {BITS}-bit layers beside others; leave it off, or"
                " write auto_round, auto_gptq, compressed_tensors or mlx"
            )
    return base


def _held(weight: WeightPlan, recipe: Recipe) -> WeightPlan:
    if weight.scheme is None:
        return weight
    return held(weight, [formats.resolve(name, {weight.scheme}) for name in recipe.formats])


def _together(weights: Sequence[WeightPlan], others: Sequence[WeightPlan]) -> list[WeightPlan]:
    """Weights that engines load as one matrix with one of the others stay if that does."""
    apart = {fused_set(weight.name) for weight in others if weight.scheme is None}
    reason = "engines load it with one that stays"
    return [
        replace(weight, scheme=None, reason=reason)
        if weight.scheme and fused_set(weight.name) in apart
        else weight
        for weight in weights
    ]


def _called(name: str) -> Iterator[str]:
    """What a layer is called below its block, such as `self_attn.q_proj`; experts are all alike."""
    parts = ["#" if part.isdigit() else part for part in name.split(".")]
    if "#" in parts:
        yield ".".join(parts[parts.index("#") + 1 :])


def carried_codes(
    weights: Sequence[WeightPlan], keys: Mapping[str, str], stored: Stored
) -> Mapping[str, Codes]:
    """Module -> codes of the weights that `quant_mtp` rounds, made when they are asked for. keys:
    module -> as the checkpoint calls it."""

    def made(planned: tuple[str, Scheme]) -> Codes:
        module, scheme = planned
        with Reader(stored) as reader:
            return nearest(reader.tensor(f"{keys[module]}{END}"), scheme)

    return Lazy({w.name: (w.name, w.scheme) for w in weights if w.scheme}, made)


def nearest(w_OI: Tensor, scheme: Scheme) -> Codes:
    """Rounded to nearest, with scales that are searched for the least squared error."""
    grid = grid_of(scheme)
    rounding = Rounding(w_OI, scheme.group_size, grid)
    w_OGg = to_groups(w_OI, scheme.group_size)
    scale_OG, zero_OG = search_scale(w_OGg, torch.ones_like(w_OGg[0], dtype=torch.float32), grid)
    rounding.start_at(scale_OG, zero_OG, torch.zeros_like(w_OGg, dtype=torch.float32))
    return rounding.codes()
