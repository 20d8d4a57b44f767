"""What Transformers merges and splits between a checkpoint's tensors and a model's parameters."""

from collections.abc import Mapping
from copy import deepcopy

from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    get_model_conversion_mapping,
)
from transformers.core_model_loading import WeightConverter, rename_source_key

from auto_mmround.model.keys import renamed_by


def loaded_tensors(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What Transformers makes of these tensors of a checkpoint while loading: by the parameter's
    name. All that it merges must be among them."""
    transforms = get_model_conversion_mapping(model)
    of_pattern = {
        pattern: transform
        for transform in transforms
        if isinstance(transform, WeightConverter)
        for pattern in transform.source_patterns
    }
    made: dict[str, Tensor] = {}
    merged: dict[str, WeightConverter] = {}
    for key, name, pattern in renamed_by(model, state):
        if pattern is None:
            made[name] = state[key]
        else:
            converter = merged.setdefault(name, deepcopy(of_pattern[pattern]))
            converter.add_tensor(name, key, pattern, state[key])  # type: ignore[arg-type]
    for name, converter in merged.items():
        for target, tensor in converter.convert(name, model=model, config=model.config).items():
            made[target] = tensor[0] if isinstance(tensor, list) else tensor
    return made


def merged_parameters(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Parameters that Transformers splits, fuses or permutes out of a checkpoint's tensors -> the
    patterns of those tensors."""
    there = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightConverter)]
    sources = {
        pattern: tuple(t._original_source_patterns)
        for t in there
        for pattern in t._original_target_patterns
    }
    back = [r for t in there if isinstance(r := t.reverse_transform(), WeightConverter)]
    merged = {}
    for name in model.state_dict():
        _, pattern = rename_source_key(name, [], back)
        if pattern is not None:
            merged[name] = sources.get(pattern, ())
    return merged


def own_merges(model: PreTrainedModel) -> set[str]:
    """The `merged_parameters` that the table of the model's own type makes, without the tables of
    its parts."""
    own = get_checkpoint_conversion_mapping(model.config.model_type) or []
    patterns = {
        source
        for transform in own
        if isinstance(transform, WeightConverter)
        for source in transform._original_source_patterns
    }
    merged = merged_parameters(model).items()
    return {name for name, sources in merged if not patterns.isdisjoint(sources)}
