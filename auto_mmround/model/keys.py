"""Which parameter Transformers makes of each key of a checkpoint, whole or in part."""

import re
from collections.abc import Iterable, Iterator

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from auto_mmround.model.structure import find_stages

# How checkpoints call layers that predict further tokens.
FURTHER = re.compile(r"(^|\.)(mtp\w*|\w*_mtp|nextn\w*|multi_token_pred\w*)\.")


def parameter_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Name of the parameter in the model -> key in the checkpoint, for keys that hold exactly one
    parameter.

    Keys that are fused or split on the way are left out.
    """
    return {
        name: key
        for key, (name, whole) in loaded_names(model, keys).items()
        if whole and name is not None
    }


def loaded_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, tuple[str | None, bool]]:
    """Key in the checkpoint -> (name of the parameter it ends up in, or None; whether it is the
    whole of it).

    Transformers renames while loading (`model.layers` -> `model.language_model.layers`); the same
    tables are applied here.
    """
    own = dict.fromkeys(model.state_dict())
    return {
        key: (name if name in own else None, not converted)
        for key, name, converted in renamed_keys(model, keys)
    }


def filled_parameters(model: PreTrainedModel, keys: Iterable[str]) -> set[str]:
    """The parameters that a checkpoint with these keys fills, those that several are split into
    included."""
    own = set(model.state_dict())
    targets = {
        pattern: transform.target_patterns
        for transform in get_model_conversion_mapping(model)
        if isinstance(transform, WeightConverter)
        for pattern in transform.source_patterns
    }
    names = set()
    for _, name, pattern in renamed_by(model, sorted(keys)):  # some renamings go by the order
        first, *others = targets.get(pattern or "", [""])
        names |= {name, *(name.replace(first, other) for other in others)}
    return names & own


def further_layers(model: PreTrainedModel, keys: Iterable[str]) -> set[str]:
    """The keys of layers behind the model's own, which predict further tokens. Their prefix tells
    them, since the lists of classes name the numbers of one published model."""
    own, text = set(model.state_dict()), find_stages(model)[-1]
    number = re.compile(rf"{re.escape(text.path)}\.(\d+)\.")
    return {
        key
        for key, name, _ in renamed_keys(model, keys)
        if name not in own
        and (FURTHER.search(key) or ((n := number.match(name)) and int(n[1]) >= text.depth))
    }


def converted_keys(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """Key in the checkpoint -> parameter that it becomes a part of, for the keys that
    `parameter_names` leaves out."""
    return {key: name for key, name, converted in renamed_keys(model, keys) if converted}


def renamed_keys(model: PreTrainedModel, keys: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """(key in the checkpoint, parameter in the model, whether it is more than renamed on the
    way)."""
    for key, name, pattern in renamed_by(model, keys):
        yield key, name, pattern is not None


def renamed_by(
    model: PreTrainedModel, keys: Iterable[str]
) -> Iterator[tuple[str, str, str | None]]:
    """The same with the pattern by which Transformers converts the tensor, None where it only
    renames it."""
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    meta = dict.fromkeys(model.state_dict(), True)
    prefix = model.base_model_prefix
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, meta)
        if name not in meta and key in meta:  # renamed by a pattern that is meant for another one
            name, pattern = rename_source_key(key, [], [], prefix, meta)
        yield key, name, pattern


def converted_parameters(model: PreTrainedModel, names: Iterable[str]) -> set[str]:
    """The parameters that Transformers splits, fuses or permutes on the way from the checkpoint's
    tensors."""
    transforms = getattr(model, "_weight_conversions", None)
    if transforms is None:
        transforms = get_model_conversion_mapping(model, add_legacy=False)
    back = [back for t in transforms if isinstance(back := t.reverse_transform(), WeightConverter)]
    return {name for name in names if rename_source_key(name, [], back)[1] is not None}
