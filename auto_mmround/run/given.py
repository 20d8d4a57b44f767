"""A model in memory beside the folder it came from: whether it came from there, and what of it has
changed since."""

import copy
import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from auto_mmround.errors import UserError
from auto_mmround.model.keys import loaded_names, parameter_names
from auto_mmround.model.loading import NONSENSE
from auto_mmround.model.quantized import plain
from auto_mmround.model.speaking import is_several, speaking
from auto_mmround.model.stored import Reader, Stored, stored_tensors
from auto_mmround.model.structure import input_weight
from auto_mmround.strict import untagged
from auto_mmround.untrusted import read_object

# Keys by which a configuration speaks of its file, not of the model.
OF_THE_FILE = {"dtype", "torch_dtype", "transformers_version", "_name_or_path", "architectures",
    "auto_map",
               "quantization_config", "return_dict", "transformers_weights"}  # fmt: skip
DTYPE_KEYS = ("dtype", "torch_dtype")
ABSENT = object()


def is_from(model: PreTrainedModel, folder: Path) -> bool:
    """Whether the model's weights are the folder's, but for what was changed: same type, some
    matrix with its first row unchanged. A row of one value, as new weights have it, proves nothing.

    Raises UserError for files that can't be read.
    """
    if read_object(folder / "config.json").get("model_type") != model.config.model_type:
        return False
    stored, state = stored_tensors(folder), model.state_dict()
    with Reader(stored) as reader:
        for name, key in parameter_names(model, stored.files).items():
            if state[name].ndim > 1 and key not in stored.scales:
                row, current = reader.plain(key)[:1], state[name][:1].cpu()
                if (
                    row.shape == current.shape
                    and torch.equal(row.to(current.dtype), current)
                    and len(row.unique()) > 1
                ):
                    return True
    return False


def check_apart(model: PreTrainedModel, changed: Collection[str] | None) -> None:
    """Raises UserError for parameters that are to be changed and share memory, with another one
    or within themselves: none would hold what was found for it. changed: names; None: all."""
    there: dict[tuple[torch.device, int], str] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta or not parameter.numel():
            continue
        first = there.setdefault((parameter.device, parameter.data_ptr()), name)
        own = all(
            step for step, size in zip(parameter.stride(), parameter.shape, strict=True) if size > 1
        )
        if (own and first == name) or not (changed is None or first in changed or name in changed):
            continue
        other = "itself (expand)" if first == name else f"{first}, and is another parameter"
        raise UserError(
            f"{name} shares memory with {other}: give it memory of its own (clone), or make the two"
            " one parameter"
        )


def aliases(model: PreTrainedModel, whole: Iterable[str]) -> set[str]:
    """Parameters that are another one under a second name, as loading ties them: the head and the
    embedding mostly.

    whole: those that the source has a tensor for; the others are the second names.
    """
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    head = getattr(speaking(model).get_output_embeddings(), "weight", None)
    ends = [input_weight(model), head]
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in tied or any(parameter is end for end in ends):
            groups.setdefault(id(parameter), []).append(name)
    known = set(whole)
    return {
        name
        for group in groups.values()
        for name in sorted(group, key=lambda n: n not in known)[1:]
    }


def pruned(model: PreTrainedModel, stored: Stored, source: Path) -> set[str]:
    """Keys of the source that a model of its configuration has a place for, and this one has not.
    What no model of the class reads (layers for multi-token prediction) is not among them."""
    unknown = [key for key, (name, _) in loaded_names(model, stored.files).items() if name is None]
    if not unknown:
        return set()
    try:
        with torch.device("meta"):
            fresh = type(model)(_config_of(model, _raw(source)))
    except NONSENSE:
        return set()
    return {key for key, (name, _) in loaded_names(fresh, unknown).items() if name is not None}


def config_of(model: PreTrainedModel, source: Path | None, given: bool) -> dict[str, Any]:
    """`config.json` of the model: as the source has it, with what the model's own configuration
    says otherwise.

    given: the user's own model, whose dtype counts where it holds less than the source's, and whose
    head is tied or not, whatever the configuration says.
    """
    if source is None:
        return plain(_json(model.config)) | {"architectures": [type(model).__name__]}
    raw = _raw(source)
    before, own = _config_of(model, raw), _plain(_json(model.config))
    made = _merged(raw, _plain(_json(before)), own)
    # an old spelling stands beside the new one
    if made != raw and _plain(_json(_config_of(model, made))) != own:
        made = own | {key: raw[key] for key in OF_THE_FILE if key in raw}
    if given:
        stated = before.dtype or getattr(before.get_text_config(), "dtype", None)
        if stated is not None and torch.promote_types(stated, model.dtype) != model.dtype:
            made = _with_dtype({"dtype": ""} | made, str(model.dtype).removeprefix("torch."))
        tied = head_is_tied(model)
        if tied is not None and tied != getattr(model.config, "tie_word_embeddings", tied):
            made["tie_word_embeddings"] = tied
    return made


def newest(stored: Tensor, current: Tensor | None, given: bool, tuned: bool) -> Tensor:
    """A tensor as stored where the model holds the same, else the model's.

    It gets the source's dtype, but for what the user's own model holds otherwise: in a smaller
    dtype, or changed (not by us) to values that the source's dtype does not hold.
    """
    if current is None:
        return stored
    smaller = torch.promote_types(stored.dtype, current.dtype) != current.dtype
    if stored.shape != current.shape or (given and smaller):
        return current
    if torch.equal(stored.to(current.dtype), current):
        return stored
    short = current.to(stored.dtype)
    return short if tuned or not given or torch.equal(short.to(current.dtype), current) else current


def head_is_tied(model: PreTrainedModel) -> bool | None:
    """Whether head and embedding are one parameter; None where there is no head, and where a part
    of the model has it, whose own configuration says so."""
    if is_several(type(model)):
        return None
    one, other = input_weight(model), getattr(model.get_output_embeddings(), "weight", None)
    return None if one is None or other is None or one.shape != other.shape else one is other


def _raw(source: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((source / "config.json").read_text())
    return {key: value for key, value in plain(config).items() if key != "transformers_weights"}


def _config_of(model: PreTrainedModel, raw: Mapping[str, Any]) -> Any:
    """A configuration of the model's class; it takes its dictionary apart, so it gets a copy."""
    return type(model.config).from_dict(untagged(copy.deepcopy(dict(raw))))


def _json(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values


def _plain(level: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is of the file, at any depth."""
    kept = {key: value for key, value in level.items() if key not in OF_THE_FILE}
    return {key: _plain(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _merged(
    raw: Mapping[str, Any], before: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    """``raw`` with the values in which ``own`` differs from ``before``, what ``raw`` was read
    as."""
    made = dict(raw)
    for key in {**before, **own}:
        old, new = before.get(key, ABSENT), own.get(key, ABSENT)
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict) and isinstance(raw.get(key), dict):
            made[key] = _merged(raw[key], old, new)
        elif new is ABSENT:
            made.pop(key, None)
        else:
            made[key] = new
    return made


def _with_dtype(level: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """With another dtype wherever one is stated."""
    made = {
        key: _with_dtype(value, dtype) if isinstance(value, dict) else value
        for key, value in level.items()
    }
    return made | {key: dtype for key in DTYPE_KEYS if key in made}
