"""Every linear weight of the model: how it will be stored, or why it stays as it is."""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auto_mmround.errors import UserError
from auto_mmround.export import formats
from auto_mmround.export.format import Format, WholeFormat
from auto_mmround.model.experts import Expert, separable, separated
from auto_mmround.model.keys import converted_parameters
from auto_mmround.model.speaking import speaking
from auto_mmround.model.structure import (
    LINEAR,
    Stage,
    find_experts,
    find_stages,
    input_weight,
    linears,
    select_stages,
    used_twice,
)
from auto_mmround.numerics.float_grids import float_grid
from auto_mmround.numerics.grids import SCALE_DTYPES, Grid, Points
from auto_mmround.recipe.patterns import Patterns
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.recipe.schemes import Option, Scheme, of_option, overridden
from auto_mmround.run.wishes import (
    HEAD,
    OUTSIDE,
    TIED,
    check_held,
    check_mappings,
    check_overrides,
    check_patterns,
)

# Weights that engines load as one matrix; their members must share a scheme.
FUSED = ({"q_proj", "k_proj", "v_proj"}, {"gate_proj", "up_proj"})
OTHER_FORM = "the checkpoint stores it in another form"
SHARED = "used in several places"
NO_LAYER = "no linear layer"  # the reason of matrices that no configuration has to name


def fused_set(name: str) -> tuple[str, Any]:
    """Equal for weights that engines load as one matrix."""
    parent, _, leaf = name.rpartition(".")
    return parent, next((i for i, members in enumerate(FUSED) if leaf in members), leaf)


@dataclass(frozen=True)
class WeightPlan:
    """One linear weight. Exactly one of ``scheme`` and ``reason`` is set; ``block`` is None outside
    the blocks."""

    name: str
    out_features: int
    in_features: int
    block: str | None
    scheme: Scheme | None
    reason: str | None

    def scheme_at(self, option: Option) -> Scheme:
        """Its scheme with other bits, or another. Raises ValueError for a weight that stays."""
        if self.scheme is None:
            raise ValueError(f"{self.name} is not quantized")
        return of_option(self.scheme, option)


def stored_bits(weight: WeightPlan, scheme: Scheme) -> float:
    """Size of a weight under a scheme, in bits."""
    shape = weight.out_features, weight.in_features
    return shape[0] * shape[1] * scheme.stored(*shape)


@dataclass(frozen=True)
class Plan:
    """stages: those to quantize, in forward order. formats: what will be written. carried: weights
    of layers that the model's class does not load."""

    stages: tuple[Stage, ...]
    weights: tuple[WeightPlan, ...]
    formats: tuple[Format, ...]
    carried: tuple[WeightPlan, ...] = ()

    @property
    def all(self) -> tuple[WeightPlan, ...]:
        """All weights, carried ones too."""
        return self.weights + self.carried

    @property
    def schemes(self) -> set[Scheme]:
        """All schemes that a checkpoint has."""
        return {weight.scheme for weight in self.all if weight.scheme}

    @cached_property
    def quantized(self) -> dict[str, Scheme]:
        """Module name -> scheme of the weights that will be quantized."""
        return {w.name: w.scheme for w in self.weights if w.scheme}

    @cached_property
    def kept(self) -> dict[str, str]:
        """Module name -> reason of the linear weights that stay."""
        return {w.name: w.reason for w in self.weights if w.reason}

    def of_block(self, block: str) -> list[WeightPlan]:
        """The weights of a block that will be quantized."""
        return self._by_block.get(block, [])

    @cached_property
    def _by_block(self) -> dict[str, list[WeightPlan]]:
        blocks: dict[str, list[WeightPlan]] = {}
        for weight in self.weights:
            if weight.block is not None and weight.scheme:
                blocks.setdefault(weight.block, []).append(weight)
        return blocks

    def bits_per_weight(self) -> float:
        """Average over the quantized weights, scales (16 bits) and zero points included."""
        chosen = [(weight, weight.scheme) for weight in self.weights if weight.scheme]
        count = sum(weight.out_features * weight.in_features for weight, _ in chosen)
        return sum(stored_bits(weight, scheme) for weight, scheme in chosen) / max(count, 1)


def make_plan(model: PreTrainedModel, recipe: Recipe) -> Plan:
    """Decide for every linear layer. Raises UserError for patterns that match nothing, for
    overrides that contradict each other or the formats, and when no weight is left to quantize."""
    chosen = _stages(model, recipe)
    experts = find_experts(model)
    single = separable(model)
    stacked = {expert.parameter for expert in single.values()}
    with separated(model):
        layers = {name: layer for name, layer in linears(model) if name not in experts.routers}
        classes = {name: _classes(model, name) for name in layers}
    classes |= dict.fromkeys(
        [*(name for name in experts.fused if name not in stacked), *experts.routers], ()
    )
    blocks = [block for stage in chosen for block in stage.blocks]
    check_patterns(recipe, classes)
    check_mappings(model, recipe, blocks)
    wanted = [formats.get(name) for name in recipe.formats]
    if not wanted:
        raise UserError("format is empty: name at least one export format")
    if recipe.polish and formats.fitted(recipe.formats, recipe.scheme).scale_range:
        raise UserError(
            f"polish tunes scales, which {recipe.format} holds as integers of few bits; leave"
            " it out"
        )
    for fmt in wanted:
        if isinstance(fmt, WholeFormat):
            fmt.ready()
    # First without formats, to know the schemes by which `auto_round` chooses its packing.
    named, owners = _Named.of(recipe), set(blocks)
    weights = [
        _decide(model, name, layer, owners, classes[name], named) for name, layer in layers.items()
    ]
    check_overrides(recipe, {w.name: w.reason for w in weights}, classes)
    schemes = {w.scheme for w in weights if w.scheme}
    targets = [formats.resolve(fmt.name, schemes) for fmt in wanted]
    weights = _without_staying(model, weights, layers, single)
    asked, weights = {w.name for w in weights if w.scheme}, [held(w, targets) for w in weights]
    for name, (count, rows, columns) in experts.fused.items():
        if name not in stacked:
            weights.append(
                WeightPlan(
                    name, count * rows, columns, None, None, "fused experts: not quantized yet"
                )
            )
    weights += [
        WeightPlan(name, *shape, None, None, "router") for name, shape in experts.routers.items()
    ]
    weights += _others(model, {*(w.name for w in weights), *stacked})
    check_held(recipe, {w.name: w.reason for w in weights if w.name in asked}, classes, targets)
    return assembled(chosen, weights, targets)


def _without_staying(
    model: PreTrainedModel,
    weights: Sequence[WeightPlan],
    layers: Mapping[str, Any],
    experts: Mapping[str, Expert],
) -> list[WeightPlan]:
    """The weights. Those that checkpoints hold in another form stay, and those that are used twice.
    Where engines load several as one matrix, all of them stay or none."""
    converted = converted_parameters(model, [f"{w.name}.weight" for w in weights if w.scheme])
    stays = {name.removesuffix(".weight"): OTHER_FORM for name in converted}
    twice = used_twice(model, find_stages(model))
    parameters = {name: layer.weight for name, layer in layers.items()} | {
        name: model.get_parameter(expert.parameter) for name, expert in experts.items()
    }
    stays |= {name: SHARED for name, weight in parameters.items() if id(weight) in twice}
    whole = {fused_set(name): reason for name, reason in stays.items()}
    reasons = {w.name: whole.get(fused_set(w.name)) for w in weights if w.scheme}
    return [
        replace(w, scheme=None, reason=reason) if (reason := reasons.get(w.name)) else w
        for w in weights
    ]


def _others(model: PreTrainedModel, known: set[str]) -> Iterator[WeightPlan]:
    """The matrices of the model that are in no linear layer, embedding, convolution or stack."""
    for path, module in model.named_modules():
        if isinstance(module, (*LINEAR, nn.Embedding, nn.modules.conv._ConvNd)):
            continue
        for key, weight in module.named_parameters(path, recurse=False):
            if weight.ndim > 1 and not {key, key.removesuffix(".weight")} & known:
                rows, columns = weight.shape[:-1].numel(), weight.shape[-1]
                yield WeightPlan(key, rows, columns, None, None, NO_LAYER)


def assembled(
    stages: Sequence[Stage], weights: Sequence[WeightPlan], targets: Sequence[Format]
) -> Plan:
    """The plan, without stages that have nothing to do. Raises UserError if there is
    nothing to quantize, and where weights that engines fuse have several schemes."""
    if not any(w.scheme for w in weights):
        reasons = Counter(w.reason for w in weights if w.block and w.reason)
        reason = reasons.most_common(1)[0][0] if reasons else "no linear layer in the chosen blocks"
        raise UserError(f"nothing to quantize: {reason}")
    _check_fused(weights)
    used = {weight.block for weight in weights if weight.scheme}
    return Plan(tuple(s for s in stages if used & {*s.blocks}), tuple(weights), tuple(targets))


def _stages(model: PreTrainedModel, recipe: Recipe) -> list[Stage]:
    """The stages to quantize: by `sequential_targets`, the classes of their blocks, if there are
    any."""
    stages = find_stages(model)
    if not recipe.block_classes:
        return select_stages(stages, recipe.quant_nontext_module, recipe.to_quant_block_names)
    by_class = {type(model.get_submodule(stage.blocks[0])).__name__: stage for stage in stages}
    for name in recipe.block_classes:
        if name not in by_class:
            raise UserError(
                f"sequential_targets: no list of {name}; this model has blocks of"
                f" {', '.join(by_class)}"
            )
    return [stage for name, stage in by_class.items() if name in recipe.block_classes]


def _classes(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """Class names of a module and of those that it lies in."""
    parts = name.split(".")
    return tuple(
        type(model.get_submodule(".".join(parts[: i + 1]))).__name__ for i in range(len(parts))
    )


class _Named(NamedTuple):
    """A recipe, and its patterns ready to be asked."""

    recipe: Recipe
    kept: Patterns
    targets: Patterns
    layers: Patterns

    @classmethod
    def of(cls, recipe: Recipe) -> "_Named":
        return cls(
            recipe,
            *map(Patterns, (recipe.kept_patterns, recipe.targets or [], recipe.layer_config or {})),
        )


def _decide(
    model: PreTrainedModel,
    name: str,
    layer: Any,
    blocks: Collection[str],
    classes: Sequence[str],
    named: _Named,
) -> WeightPlan:
    shape = tuple(layer.weight.shape)
    out_features, in_features = reversed(shape) if isinstance(layer, Conv1D) else shape
    recipe, parts = named.recipe, name.split(".")
    block = next((b for i in range(1, len(parts)) if (b := ".".join(parts[:i])) in blocks), None)
    scheme: Scheme | None = recipe.scheme
    reason = next(
        (f"kept by the pattern {pattern!r}" for pattern in named.kept.of(name, classes)), None
    )
    if reason is None and recipe.targets and not named.targets.of(name, classes):
        reason = "not among the targets"
    if reason is None and block is None:
        reason = _outside(model, layer, recipe)
    for pattern in named.layers.of(name, classes):
        if reason is None:
            scheme = overridden(
                scheme or recipe.scheme, (recipe.layer_config or {})[pattern], pattern
            )
            reason = f"kept by layer_config {pattern!r}" if scheme is None else None
    if scheme is not None:
        scheme = formats.fitted(recipe.formats, scheme)
    return WeightPlan(name, out_features, in_features, block, None if reason else scheme, reason)


def _outside(model: PreTrainedModel, layer: Any, recipe: Recipe) -> str | None:
    model = speaking(model)
    if layer is not model.get_output_embeddings():
        return OUTSIDE
    if input_weight(model) is layer.weight:
        if recipe.quant_lm_head:
            raise UserError(
                "quant_lm_head: the output head shares its weight with the input embedding; leave"
                " it off, or give it one of its own with --untie_lm_head"
            )
        return TIED
    return None if recipe.quant_lm_head else HEAD


def held(weight: WeightPlan, targets: Sequence[Format]) -> WeightPlan:
    """The weight, or that it stays where a format can't hold it."""
    if weight.scheme is None:
        return weight
    for target in targets:
        problem = target.check(weight.scheme, weight.out_features, weight.in_features)
        if problem:
            return replace(weight, scheme=None, reason=f"{target.name} {problem}")
    return weight


def grid_of(scheme: Scheme, peak: Tensor | None = None) -> Points:
    """The grid that a scheme describes. peak: largest magnitude of the weight and of those that
    engines fuse with it; NVFP4 and FP8 by tensor need it."""
    if scheme.data_type != "int":
        return float_grid(scheme.data_type, scheme.group_size, peak)
    dtype = SCALE_DTYPES[scheme.scale_dtype]
    return Grid(
        scheme.bits, scheme.sym, dtype, scheme.min_zero, scheme.scale_bits, scheme.scale_range
    )


def _check_fused(weights: Sequence[WeightPlan]) -> None:
    members: dict[tuple[str, Any], dict[str, Scheme | None]] = {}
    for weight in weights:
        if weight.block:
            members.setdefault(fused_set(weight.name), {})[weight.name.rpartition(".")[2]] = (
                weight.scheme
            )
    for (parent, _), schemes in members.items():
        if len(set(schemes.values())) > 1:
            raise UserError(
                f"{parent}: engines load {', '.join(sorted(schemes))} as one matrix, so they must"
                " share a scheme; name all of them in fp_layers or layer_config"
            )
