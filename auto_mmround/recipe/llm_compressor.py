"""Recipes of llm-compressor (YAML) as our keys: GPTQ, SmoothQuant, AWQ, plain quantization.

Such a recipe names neither model nor data: give them as flags. Its targets are the linear layers of
the whole model, with towers, without the ignored ones. With `sequential_targets`, only blocks of
these classes are quantized.
"""

import difflib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from auto_mmround.errors import UserError
from auto_mmround.recipe.aliases import preset

log = logging.getLogger("auto_mmround")

Values = dict[str, Any]
Take = Callable[[Any, str], Values]  # (value, where) -> keys of our recipe

NO_EFFECT = {
    "update_size": "it changes no result",
    "offload_hessians": "second moments live for one block",
    "offload_device": "second moments live for one block",
    "observer": "scales are searched by the weights' share in the output error",
    "observer_kwargs": "scales are searched by the weights' share in the output error",
    "weight_observer": "scales are searched by the weights' share in the output error",
    "input_observer": "ranges of activations are the engine's, a token at a time",
    "output_observer": "outputs are not quantized",
    "batched_quantization": "layers that share an input are solved together",
    "bypass_divisibility_checks": "layers whose columns a format can't group stay in 16 bits",
    "requires_calibration_data": "the algorithm says it",
    "num_calibration_steps": "all samples are used",
    "run_type": "there is one way to run",
}


# Names with another meaning there. Their FP8 has one scale per weight, ours one per channel.
RENAMED = {"FP8": "FP8_TENSOR", "FP8_DYNAMIC": "FP8"}


class RecipeLoader(yaml.SafeLoader):
    """YAML, with the enumerations of llm-compressor read as their values. Nothing is called."""


def _value_of_enumeration(loader: yaml.SafeLoader, name: str, node: yaml.Node) -> Any:
    """The first argument of `!!python/object/apply:compressed_tensors...`.

    Raises ConstructorError for other classes.
    """
    if not name.startswith(("compressed_tensors.", "llmcompressor.")) or not isinstance(
        node, yaml.SequenceNode
    ):
        problem = f"could not determine a constructor for {name}"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return next(iter(loader.construct_sequence(node)), None)


RecipeLoader.add_multi_constructor("tag:yaml.org,2002:python/object/apply:", _value_of_enumeration)


def is_recipe(tree: dict[str, Any]) -> bool:
    """Whether content has llm-compressor's form: stages, groups of modifiers, or modifiers."""
    return any(str(key).endswith(("_stage", "_modifiers", "Modifier")) for key in tree)


def translate(tree: dict[str, Any], where: str) -> Values:
    """Our keys. Raises UserError for modifiers, keys and values without a counterpart."""
    values: Values = {}
    seen: list[str] = []
    for name, options in _modifiers(tree, where):
        start, takes = _known(name, MODIFIERS, where, "modifier")
        clash = {"equalize", "algorithm"} & values.keys() & start.keys()
        if clash:
            raise UserError(
                f"{where}: {seen[-1]} and {name} both set {clash.pop()}; one of them can run"
            )
        seen.append(name)
        _merge(values, start)
        for key, value in _mapping(options, f"{where}: {name}").items():
            if key in NO_EFFECT:
                log.warning("%s: %s: %s has no effect here: %s", where, name, key, NO_EFFECT[key])
            else:
                _merge(
                    values, _known(key, takes, f"{where}: {name}", "key")(value, f"{where}: {name}")
                )
    values.setdefault("algorithm", "rtn")
    if "bits" not in values:
        raise UserError(
            f"{where}: {' and '.join(seen) or 'no modifier'} names no scheme: nothing would be"
            " quantized"
        )
    # the grain alone, not the blocks
    if values.get("sequential_targets", ["Linear"]) == ["Linear"]:
        values["quant_nontext_module"] = True
    return {"format": "compressed_tensors", **values}


def _modifiers(tree: dict[str, Any], where: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if str(key).endswith(("_stage", "_modifiers")):
            yield from _modifiers(_mapping(value, f"{where}: {key}"), where)
        elif key not in NO_EFFECT:
            yield str(key), value


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{where}: expected keys and values, found {value!r}")
    return value or {}


def _known(key: Any, table: dict[str, Any], where: str, what: str) -> Any:
    if key not in table:
        near = difflib.get_close_matches(str(key), table, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(table)}"
        raise UserError(f"{where}: unknown {what} {key!r}; {hint}")
    return table[key]


def _merge(values: Values, more: Values) -> None:
    """Lay keys over others; patterns of kept layers and overrides of layers add up."""
    for key, value in more.items():
        if key == "ignore":
            value = list(dict.fromkeys([*values.get(key, []), *value]))
        elif key == "layer_config":
            value = {**values.get(key, {}), **value}
        values[key] = value


# ------------------------------------------------------------------------------------- one function
# a kind of value


def _as(name: str) -> Take:
    return lambda value, where: {name: value}


def _patterns(name: str) -> Take:
    return lambda value, where: {} if value is None else {name: _texts(value, f"{where}: {name}")}


def _texts(value: Any, where: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(item, str) for item in texts):
        raise UserError(f"{where}: expected a name or a list of names, found {str(value)[:80]!r}")
    return texts


def _only(*allowed: Any) -> Take:
    def take(value: Any, where: str) -> Values:
        if value not in allowed:
            raise UserError(
                f"{where}: {value!r} can't be translated, only {' or '.join(map(repr, allowed))}"
            )
        return {}

    return take


def _targets(value: Any, where: str) -> Values:
    """All linear layers: we quantize these anyway."""
    return {} if value in (None, "Linear", ["Linear"]) else _patterns("targets")(value, where)


def _scheme(value: Any, where: str) -> Values:
    """A preset's name, or {name: targets}."""
    if isinstance(value, dict) and len(value) != 1:
        raise UserError(
            f"{where}: scheme names {len(value)} presets; use config_groups for layers that differ"
        )
    name, targets = next(iter(value.items())) if isinstance(value, dict) else (value, None)
    meant = RENAMED.get(str(name).upper(), name)
    # the modifier says it
    scheme = {key: value for key, value in preset(meant, where).items() if key != "algorithm"}
    return scheme | _targets(targets, where)


def _mappings(value: Any, where: str) -> Values:
    """Pairs [readers, source], or tables with smooth_layer and balance_layers."""
    pairs = []
    for item in value if isinstance(value, list) else [value] if value else []:
        pair = (
            [item.get("balance_layers"), item.get("smooth_layer")]
            if isinstance(item, dict)
            else item
        )
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[1], str):
            raise UserError(
                f"{where}: mappings: expected pairs of readers and their source, found"
                f" {str(item)[:80]!r}"
            )
        pairs.append([_texts(pair[0], f"{where}: mappings"), pair[1]])
    return {"mappings": pairs} if pairs else {}


def _config_groups(value: Any, where: str) -> Values:
    """The group of all linear layers, or the only one, sets the scheme; others override it."""
    groups = []
    for name, options in _mapping(value, where).items():
        inside = f"{where}: config_groups: {name}"
        options = _mapping(options, inside)
        _check_keys(
            options,
            ("targets", "weights", "input_activations", "output_activations", "format"),
            inside,
        )
        _only(None)(options.get("output_activations"), f"{inside}: output_activations")
        scheme = _weights(options.get("weights"), f"{inside}: weights")
        scheme |= _activations(options.get("input_activations"), f"{inside}: input_activations")
        groups.append((_targets(options.get("targets"), inside).get("targets"), scheme))
    main = next(
        (group for group in groups if group[0] is None), groups[0] if len(groups) == 1 else None
    )
    if main is None:
        raise UserError(
            f"{where}: config_groups: none has the target Linear, which the others would override"
        )
    layers = {
        pattern: {key: scheme[key] for key in ("bits", "group_size", "sym")}
        for targets, scheme in groups
        if (targets, scheme) != main
        for pattern in targets or []
    }
    return (
        main[1]
        | ({"targets": main[0]} if main[0] else {})
        | ({"layer_config": layers} if layers else {})
    )


def _weights(value: Any, where: str) -> Values:
    options = _mapping(value, where)
    _check_keys(options, (*ARGUMENTS, "block_structure"), where)
    for key in ("block_structure", "scale_dtype", "zp_dtype"):
        _only(None)(options.get(key), f"{where}: {key}")
    _only("int")(options.get("type", "int"), f"{where}: type")
    _only(False, None)(options.get("dynamic"), f"{where}: dynamic")
    group_size = options.get("group_size")
    strategy = options.get("strategy") or ("group" if group_size else "channel")
    _only("group", "channel")(strategy, f"{where}: strategy")
    if strategy == "group" and not group_size:
        raise UserError(f"{where}: strategy group needs group_size")
    keys = {
        "bits": options.get("num_bits", 8),
        "group_size": group_size if strategy == "group" else -1,
        "sym": options.get("symmetric", True),
        "act_bits": 32,
    }
    return keys | ({"actorder": options["actorder"]} if "actorder" in options else {})


def _activations(value: Any, where: str) -> Values:
    if value is None:
        return {}
    options = _mapping(value, where)
    _check_keys(options, (*ARGUMENTS, "block_structure"), where)
    type_name = options.get("type", "int")
    _only("int", "float")(type_name, f"{where}: type")
    _only("token")(options.get("strategy", "token"), f"{where}: strategy")
    _only(True)(options.get("dynamic", False), f"{where}: dynamic")
    other = {"act_data_type": "fp8"} if type_name == "float" else {}
    return {"act_bits": options.get("num_bits", 8)} | other


def _check_keys(options: dict[str, Any], known: tuple[str, ...], where: str) -> None:
    for key in options:
        if key not in NO_EFFECT:
            _known(key, dict.fromkeys(known), where, "key")


ARGUMENTS = (
    "num_bits", "type", "symmetric", "strategy", "group_size", "actorder", "dynamic", "scale_dtype",
    "zp_dtype",
)  # fmt: skip
QUANTIZING: dict[str, Take] = {
    "targets": _targets,
    "ignore": _patterns("ignore"),
    "scheme": _scheme,
    "config_groups": _config_groups,
    "kv_cache_scheme": _only(None),
    "sequential_targets": _patterns("sequential_targets"),
}
SMOOTHING: dict[str, Take] = {"mappings": _mappings}
# Modifier -> (the keys that it stands for, how its own keys are taken).
MODIFIERS: dict[str, tuple[Values, dict[str, Take]]] = {
    "GPTQModifier": (
        {"algorithm": "gptq"},
        QUANTIZING
        | {
            "dampening_frac": _as("dampening"),
            "actorder": _as("actorder"),
            "block_size": _as("block_size"),
            "sequential_update": _as("enable_quanted_input"),
        },
    ),
    "QuantizationModifier": ({"algorithm": "rtn"}, QUANTIZING),
    "SmoothQuantModifier": (
        {"equalize": "smoothquant", "smoothing_strength": 0.5},
        SMOOTHING
        | {
            "smoothing_strength": _as("smoothing_strength"),
            "algorithm": _only("smoothquant"),
            "ignore": _only(None, []),
        },
    ),
    "AWQModifier": (
        {"equalize": "awq"},
        QUANTIZING | SMOOTHING | {"duo_scaling": _as("duo_scaling"), "n_grid": _only(20)},
    ),
}
