"""What compressed-tensors configurations ask engines to compute that our reader does not."""

from collections.abc import Callable, Mapping
from typing import Any

OFFLINE = ("weight_input", "weight_output")  # places of transforms that are in the weights already
COMPARED = ("num_bits", "type", "symmetric", "strategy", "dynamic", "group_size")
# What compressed-tensors takes for a key that is not there.
UNSAID = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
CACHES = ("tensor", "attn_head")


def transforms(config: Mapping[str, Any]) -> str | None:
    """Of transforms of what layers read while they run: the weights alone are another model."""
    said = config.get("transform_config") or {}
    groups = said.get("config_groups") if isinstance(said, Mapping) else None
    if not said or (isinstance(groups, Mapping) and all(map(_offline, groups.values()))):
        return None
    return "transform_config: engines transform what layers read, our reader does not"


def _offline(group: Any) -> bool:
    applied = group.get("apply") if isinstance(group, Mapping) else None
    return isinstance(applied, list) and all(
        isinstance(each, Mapping) and each.get("location") in OFFLINE for each in applied
    )


def activations(
    config: Mapping[str, Any], ours: Callable[[Mapping[str, Any]], Mapping[str, Any]]
) -> str | None:
    """Of inputs, outputs, keys and values. ours: how our reader rounds the inputs of a group."""
    for name, group in config["config_groups"].items():
        inputs = group.get("input_activations")
        if group.get("output_activations"):
            return f"{name}: engines round what layers give, our reader does not"
        if inputs and _said(inputs) != _said(ours(group)):
            return f"{name}: inputs of {_words(inputs)} are not rounded as engines do"
    cache = config.get("kv_cache_scheme")
    if cache and (
        [cache.get(key, UNSAID.get(key)) for key in COMPARED[:3]] != [8, "float", True]
        or cache.get("dynamic")
        or cache.get("strategy", CACHES[0]) not in CACHES
    ):
        return f"kv_cache_scheme: keys and values of {_words(cache)} are not rounded as engines do"
    return None


def _said(options: Mapping[str, Any]) -> list[Any]:
    return [options.get(key, UNSAID.get(key)) for key in COMPARED]


def _words(options: Mapping[str, Any]) -> str:
    """In words, such as "8 bit int, asymmetric, static, one scale by tensor"."""
    bits, kind, symmetric, strategy, dynamic, _ = _said(options)
    evenly = "symmetric" if symmetric else "asymmetric"
    when = "dynamic" if dynamic else "static"
    return f"{bits} bit {kind}, {evenly}, {when}, one scale by {strategy}"
