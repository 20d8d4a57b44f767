"""compressed-tensors checkpoints, as llm-compressor writes them: packed integers, int8 with int8
activations, or floats; their configuration, and how it is read."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.export import config_check
from auto_mmround.export.compressed_tensors import floats, integers, unread
from auto_mmround.export.compressed_tensors.targets import ends_of, matched, targets_of
from auto_mmround.export.format import (
    MADE_UP,
    NO_EXPERTS,
    STACKS_ALONE,
    TURNED,
    Format,
    Limit,
    PackedFormat,
    any_scheme,
    check_integers,
    wrong,
)
from auto_mmround.export.layout import (
    Layout,
    both_spellings,
    carried_names,
    kept_groups,
    part_patterns,
    tower_patterns,
)  # fmt: skip
from auto_mmround.export.method import Method
from auto_mmround.export.patterns import Lookup
from auto_mmround.numerics.grids import SCALE_DTYPES, Codes
from auto_mmround.recipe.schemes import Scheme

PARTS = floats.PARTS | {
    "weight_shape": "", "weight_g_idx": "", "input_zero_point": "",
}  # fmt: skip

# Keys and values: FP8 under one scale each, or each head's: `k_scale` and `v_scale` of attention.
KV_CACHE = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False}


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Codes:
    """The inverse of all packers. Raises ValueError where the tensors contradict the scheme."""
    parts = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
    layout = integers if scheme.data_type == "int" else floats
    return layout.unpack(name, parts, scheme)


def check_int8(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why int-quantized could not hold this weight for 8-bit activations, or None."""
    if not scheme.sym:
        return "holds symmetric weights beside 8-bit activations"
    if scheme.bits == 8 and scheme.group_size != -1:
        return "holds one scale per output channel beside 8-bit activations: group size -1"
    if scheme.act_data_type is not None:
        return "holds integers of inputs, not FP8"
    return check_integers((4, 8), (1, 1), SCALE_DTYPES)(
        replace(scheme, act_bits=16), out_features, in_features
    )


def check_words(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why pack-quantized could not hold this weight, with FP8 inputs where it says so, or None."""
    if scheme.act_data_type is not None:
        if (scheme.bits, scheme.sym, scheme.group_size) != (4, True, 128):
            return "holds 4-bit symmetric weights by 128 columns beside FP8 inputs: no kernel else"
        scheme = replace(scheme, act_bits=16, act_data_type=None)
    return check_integers(range(2, 9), (1, 1), SCALE_DTYPES)(scheme, out_features, in_features)


def config(layout: Layout) -> dict[str, Any]:
    """``quantization_config``: a group a scheme, the one of most modules first and by class, others
    by name."""
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in layout.quantized.items():
        by_scheme.setdefault(replace(scheme, min_zero=0, scale_dtype="fp16"), []).append(name)
    largest = max(by_scheme, key=lambda scheme: len(by_scheme[scheme]))
    groups, singles = kept_groups(layout)
    ignore = [f"re:{pattern}" for group in groups for pattern in tower_patterns(layout, group)]
    ignore += [f"re:{pattern}" for pattern in part_patterns(layout)]
    ignore += [spelling for single in singles for spelling in both_spellings(layout, single)]
    ignore += carried_names(layout)
    # vLLM puts a prefix before the output head of some models, but not before its name here.
    ignore += [f"re:.*{leaf}$" for leaf in _outside_lists(layout, singles)]
    ends = ends_of(layout, by_scheme)
    # compressed-tensors 0.20 forgets to pack the zero points of the layers it prepares for
    # Transformers, which then refuses ours; asked to dequantize at once Transformers reads them,
    # but with one scheme for all layers.
    dequantize = {"dequantize": True} if len(by_scheme) == 1 and not largest.sym else {}
    return {
        "quant_method": "compressed-tensors",
        "format": _whole_layout(by_scheme),
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": (KV_CACHE | {"strategy": layout.kv_cache} if layout.kv_cache else None),
        "ignore": list(dict.fromkeys(ignore)),
        "config_groups": {
            f"group_{i}": _group(
                scheme, targets_of(layout, by_scheme, scheme, ends, scheme == largest)
            )
            for i, scheme in enumerate(sorted(by_scheme, key=lambda scheme: scheme != largest))
        },
        **dequantize,
        "provider": "auto_mmround",
        "auto_mmround": dict(layout.details),
    }


def _outside_lists(layout: Layout, singles: Iterable[str]) -> list[str]:
    """Last parts of single modules that lie in no list (the output head), where no quantized module
    ends so."""
    leaves = {
        s.rpartition(".")[2]: None for s in singles if not any(map(str.isdigit, s.split(".")))
    }
    return [leaf for leaf in leaves if not any(name.endswith(leaf) for name in layout.quantized)]


def _layout(scheme: Scheme) -> str:
    integers = "int-quantized" if _int_inputs(scheme) else "pack-quantized"
    return floats.LAYOUTS.get(scheme.data_type, integers)


def _whole_layout(schemes: Iterable[Scheme]) -> str:
    layouts = {*map(_layout, schemes)}
    return layouts.pop() if len(layouts) == 1 else "mixed-precision"


def _int_inputs(scheme: Scheme) -> bool:
    return scheme.act_bits < 16 and scheme.inputs[0] == "int"


def _group(scheme: Scheme, targets: list[str]) -> dict[str, Any]:
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.sym, "dynamic": False}
    channel = scheme.group_size == -1
    weights |= (
        {"strategy": "channel"}
        if channel
        else {"strategy": "group", "group_size": scheme.group_size}
    )
    if scheme.data_type != "int":
        weights = floats.weight_args(scheme)
    return {
        "targets": targets,
        "format": _layout(scheme),
        "weights": weights,
        "input_activations": _inputs(scheme) if scheme.act_bits < 16 else None,
        "output_activations": None,
    }


def _inputs(scheme: Scheme) -> dict[str, Any]:
    """``input_activations`` of a config group."""
    return (integers if scheme.inputs[0] == "int" else floats).input_args(scheme)


def reader(quantization_config: Mapping[str, Any]) -> Callable[[str], Scheme]:
    """`scheme_of` of one configuration, for many names."""
    targets = {
        t: group
        for group in quantization_config["config_groups"].values()
        for t in group["targets"]
    }
    # names first, then patterns, the class last
    order = sorted(targets, key=lambda t: (t == "Linear", t.startswith("re:"), t))
    names = [t for t in order if t != "Linear" and not t.startswith("re:")]
    places = Lookup(names, [t[3:] for t in order if t.startswith("re:")])

    def scheme(name: str) -> Scheme:
        place = places.first(name)
        target = "Linear" if place is None else order[place]
        if target not in targets:
            raise UserError(
                f"quantization_config: {name} is quantized, but no config group is for it"
            )
        return _scheme_of_group(targets[target], name)

    return scheme


def _scheme_of_group(group: Mapping[str, Any], name: str) -> Scheme:
    """Raises UserError for weights other than integers with a scale a channel or a group, and
    floats that are read."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    scheme = floats.scheme_of(weights, inputs) if weights.get("type") == "float" else None
    if scheme is None and (
        weights.get("type") == "float" or weights.get("strategy") not in ("group", "channel")
    ):
        words = (
            f"{weights.get('num_bits')} bit {weights.get('type')} weights with strategy"
            f" {weights.get('strategy')}"
        )
        raise UserError(
            f"cannot read {name}: {words}; read are integers by group or channel, FP8, NVFP4 and MX"
        )
    if scheme is not None:
        return scheme
    size = weights["group_size"] if weights["strategy"] == "group" else -1
    return Scheme(
        weights["num_bits"],
        size,
        weights.get("symmetric", True),
        act_bits=inputs.get("num_bits", 16),
        act_data_type="fp8" if inputs.get("type") == "float" else None,
    )


def _unread(config: Mapping[str, Any], activations: bool) -> str | None:
    """See `Method.unread`."""
    found = unread.transforms(config)
    return unread.activations(config, _inputs_of) if activations and not found else found


def _inputs_of(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """How our reader rounds the inputs of a config group; empty for weights that it can't read."""
    try:
        return _inputs(_scheme_of_group(group, "weights"))
    except UserError:
        return {}


def _choose(schemes: Collection[Scheme]) -> Format:
    """Packed words, int8 beside 8-bit activations, floats, or several of these."""
    if len({*map(_layout, schemes)}) > 1:
        return MIXED
    if any(scheme.data_type != "int" for scheme in schemes):
        return FLOAT
    return INT8 if any(map(_int_inputs, schemes)) else WORDS


def _pack(name: str, codes: Codes) -> dict[str, Tensor]:
    """Integers as words, floats as they are."""
    return (integers.pack_words if codes.data_type == "int" else floats.pack)(name, codes)


def _check_mixed(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why the layout could not hold this weight, or None."""
    if _int_inputs(scheme):
        return "holds no 8-bit integers of inputs beside layers of another kind"
    return _choose([scheme]).check(scheme, out_features, in_features)


# Every layout has these. Transformers unpacks these weights in the model's first forward pass, but
# transcribing calls the encoder alone first.
_BASE = PackedFormat(
    name="compressed_tensors",
    summary=(
        "compressed-tensors checkpoint, packed: Transformers (compressed-tensors), vLLM, SGLang"
    ),
    bits=(2, 3, 4, 5, 6, 7, 8),
    check=check_words,
    pack=integers.pack_words,
    unpack=unpack,
    config=config,
    parts=PARTS,
    any_float=True,
    kv_cache=True,
    method=Method(
        "compressed-tensors",
        required=("format", "config_groups"),
        form={
            "ignore": config_check.maybe(config_check.targets),
            "config_groups": config_check.table(config_check.group),
            "kv_cache_scheme": config_check.maybe(config_check.numbers),
        },
        listed=("ignore", "config_groups"),
        schemes=reader,
        readers={"Transformers": matched, "vLLM": matched},
        unread=_unread,
    ),
    engines={"transformers": None, "vllm": "vllm"},
    limits=(
        wrong(
            "experts that the source stacks",
            MADE_UP.message,
            "quantized",
            "stacked",
            spared=("llama4", "llama4_text"),
        ),
        wrong("experts of several schemes", "it takes one for all", "several"),
        wrong("experts of another scheme than most layers", "it takes one", "other"),
        wrong("asymmetric experts", "zero points are dropped", "asymmetric"),
        wrong(TURNED, "parameters were made up: [.. attn.c_attn.weight ..]", "turned"),
        NO_EXPERTS,
        STACKS_ALONE,
    ),
    card={
        "imports": "CompressedTensorsConfig, pipeline",
        "options": (
            ', model_kwargs={"quantization_config": CompressedTensorsConfig(dequantize=True)}'
        ),
    },
)
_KERNEL = "Failed to find a kernel that can implement the"
_DROPPED = "the tensors of these experts are dropped while it merges them"
_TURNED_TWICE = Limit(
    "vllm",
    f"8 bits and {TURNED}",
    "AssertionError, for it turns every tensor that is called weight",
    any_scheme(lambda s: s.bits == 8 and s.act_bits < 16),
    ("turned",),
    fatal=True,
)
_LEFT = wrong(
    "tensors that stay and that it merges while loading",
    "RuntimeError: CONVERSION entries, for what is not packed is dropped there",
    "left",
)
WORDS = replace(
    _BASE,
    choose=_choose,
    limits=(
        Limit(
            "transformers",
            "several schemes, one of them asymmetric",
            "mismatched sizes",
            lambda s: len(s) > 1 and not all(scheme.sym for scheme in s),
        ),
        Limit(
            "vllm",
            "other than 4 bits",
            f"{_KERNEL} WNA16 linear layer. Quant type (uint3b4) not supported by CPUWNA16",
            any_scheme(lambda s: s.bits != 4 and s.act_bits == 16 and s.data_type == "int"),
        ),
        Limit(
            "vllm",
            "FP8 inputs beside integers",
            "No compressed-tensors compatible scheme was found",
            any_scheme(lambda s: s.act_data_type is not None),
        ),
        *_BASE.limits,
        _LEFT,
    ),
)
INT8 = replace(
    _BASE,
    name="compressed_tensors:int8",
    summary=(
        "compressed-tensors checkpoint for 8-bit activations (act_bits 8), W8A8 and W4A8, symmetric"
    ),
    bits=(4, 8),
    check=check_int8,
    pack=integers.pack_int8,
    limits=(
        *_BASE.limits,
        _LEFT,
        wrong("experts beside 8-bit activations", _DROPPED, "quantized"),
        _TURNED_TWICE,
    ),
)
FLOAT = replace(
    _BASE,
    name="compressed_tensors:float",
    summary=("compressed-tensors checkpoint with FP8, NVFP4, MXFP4 or MXFP8 weights (data_type)"),
    bits=(4, 8),
    check=floats.check,
    pack=floats.pack,
    any_float=False,
    limits=(
        Limit(
            "vllm",
            "FP8 in blocks",
            "CPUFp8W8A8BlockScaledMMKernel requires AMX tile support (Sapphire Rapids or newer)",
            any_scheme(lambda s: s.data_type == "fp8" and s.group_size > 0),
        ),
        Limit(
            "vllm",
            "NVFP4",
            "Forced NVFP4 kernel MarlinNvFp4LinearKernel is not supported: Marlin FP4 not"
            " available",
            any_scheme(lambda s: s.data_type == "nvfp4"),
        ),
        Limit(
            "vllm",
            "MXFP4 and MXFP8",
            f"{_KERNEL} MXFP4 linear layer",
            any_scheme(lambda s: s.data_type in floats.MX),
        ),
        *_BASE.limits,
        wrong("experts in blocks or MXFP8", "CONVERSION entries", "blocks"),
        wrong("experts in NVFP4", "their global scale is left out, so they are too large", "NVFP4"),
        wrong("tensors of 4 bits beside some it merges", _DROPPED, "left", "4 bits"),
        _TURNED_TWICE,
    ),
)
MIXED = replace(
    _BASE,
    name="compressed_tensors:mixed",
    summary="compressed-tensors checkpoint with floats of several kinds, or beside integers",
    check=_check_mixed,
    pack=_pack,
    limits=(*WORDS.limits, *(limit for limit in FLOAT.limits if limit not in WORDS.limits)),
)
FORMATS = (WORDS, INT8, FLOAT, MIXED)
