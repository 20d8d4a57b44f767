"""AutoRound's own checkpoints: four packings under one configuration.

``auto_round:auto_gptq`` is GPTQ's layout (zero points minus one), ``auto_round:auto_awq`` is AWQ's,
plain ``auto_round`` is GPTQ's with zero points as they are. ``auto_round:llm_compressor`` has the
tensors of compressed-tensors for NVFP4, MXFP4 and MXFP8.
"""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.export import auto_awq, config_check
from auto_mmround.export.auto_gptq import pack_gptq, unpack_gptq
from auto_mmround.export.compressed_tensors import floats
from auto_mmround.export.format import (
    NO_EXPERTS,
    STACKS_ALONE,
    TURNED,
    UNQUANTIZED_EXPERTS,
    WORDS,
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
)
from auto_mmround.export.method import (
    SPECIAL,
    Config,
    Method,
    Overrides,
    Spelling,
    flat_schemes,
    searched,
)
from auto_mmround.export.patterns import tails
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.schemes import FLOATS, Scheme

KEPT = {"bits": 16, "data_type": "float"}
# Data type -> its names in AutoRound: for weights, for inputs.
NAMES = {
    "nvfp4": ("nv_fp", "nv_fp4_with_static_gs"),
    "mxfp4": ("mx_fp", "mx_fp"),
    "mxfp8": ("mx_fp", "mx_fp"),
}
# What it calls inputs -> `Scheme.act_how`.
HOW = {
    "nv_fp4_with_static_gs": "auto_round",
    "mx_fp": "auto_round",
    "mx_fp_rceil": "auto_round_rceil",
}
SYMMETRIC = "auto-round reads this packing as symmetric only; use plain auto_round"


def _config(packing: str, layout: Layout) -> dict[str, Any]:
    """``quantization_config``; names both as Transformers and as the checkpoint (and so vLLM)
    spells them."""
    groups, singles = kept_groups(layout)
    extra: dict[str, Any] = {}
    default = _keys(layout.default)
    kept = KEPT | ({"act_bits": 16} if "act_bits" in default else {})
    for name, scheme in layout.quantized.items():
        outside = not any(name.startswith(block + ".") for block in layout.blocks)
        own = _keys(scheme)
        always = ("bits", "data_type") if outside else ()
        keys = {k: v for k, v in own.items() if k in always or default.get(k) != v}
        extra |= {spelling: keys for spelling in both_spellings(layout, name) if keys}
    extra |= {pattern: kept for group in groups for pattern in tower_patterns(layout, group)}
    extra |= {spelling: kept for single in singles for spelling in both_spellings(layout, single)}
    extra |= dict.fromkeys(carried_names(layout), kept)
    extra |= dict.fromkeys(part_patterns(layout), kept)
    blocks = dict.fromkeys(
        spelling for block in layout.blocks for spelling in both_spellings(layout, block)
    )
    return {
        "quant_method": "auto-round",
        "packing_format": packing,
        **default,
        "block_name_to_quantize": ",".join(blocks),
        "extra_config": extra,
        "provider": "auto_mmround",
        "auto_mmround": dict(layout.details),
    }


def _keys(scheme: Scheme) -> dict[str, Any]:
    """What the configuration says of a scheme."""
    weights, inputs = NAMES.get(scheme.data_type, (scheme.data_type, ""))
    said: dict[str, Any] = {"bits": scheme.bits, "group_size": scheme.group_size}
    said |= {"sym": scheme.sym, "data_type": weights}
    if not inputs:
        return said
    said |= {"act_bits": scheme.act_bits, "act_data_type": inputs, "act_sym": True}
    return said | {"act_group_size": scheme.group_size, "act_dynamic": True}


def _schemes(config: Config) -> Callable[[str], Scheme]:
    unsaid = {"data_type": "int", "act_bits": None, "act_data_type": None}
    return flat_schemes(config, unsaid, _scheme_of)


def _scheme_of(
    bits: int, group_size: int, sym: bool, data_type: str, act_bits: int | None,
    act_data_type: str | None,
) -> Scheme:  # fmt: skip
    """Raises UserError for floats, or floats of inputs, that are not read."""
    if data_type == "int":
        return Scheme(bits, group_size, sym)
    own = (name for name, (called, _) in NAMES.items() if called == data_type)
    ours = next((name for name in own if FLOATS[name] == (bits, (group_size,))), None)
    if ours is None:
        raise UserError(
            f"cannot read {bits} bit {data_type} weights by {group_size} columns; read are integers"
            " and nv_fp, mx_fp of 4 and mx_fp of 8 bits"
        )
    if act_bits in (None, 16, 32):
        return Scheme(bits, group_size, data_type=ours)
    how = HOW.get(act_data_type or "")
    if how is None or act_bits != bits:
        raise UserError(f"cannot read {ours} weights beside {act_bits} bit {act_data_type} inputs")
    return Scheme(bits, group_size, data_type=ours, act_bits=act_bits, act_how=how)


def _check_floats(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why the peer's loader could not read this weight, or None."""
    if scheme.data_type not in NAMES:
        return f"holds {', '.join(NAMES)}, not {scheme.data_type}"
    if scheme.act_bits != scheme.bits:
        return (
            f"holds {scheme.data_type} beside {scheme.bits}-bit inputs only (act_bits); for others"
            " take compressed_tensors"
        )
    return floats.check(scheme, out_features, in_features)


def _unpack_floats(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Codes:
    parts = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
    return floats.unpack(name, parts, scheme)


def _transformers(q: Spelling) -> Mapping[str, Overrides]:
    prefixes = tuple(q.listed("block_name_to_quantize", "to_quant_block_names"))
    # Without prefixes all numbered blocks count, also in towers.
    inside = [
        n for n in q.names if (n.startswith(prefixes) if prefixes else re.search(r"\.\d+\.", n))
    ]
    extra = q.config.get("extra_config") or {}
    names = set(q.names)
    options_of = {key: options for key, options in extra.items() if key in names}
    for key, options in extra.items():
        if key not in options_of:
            matched = [n for n in inside if searched(key, n)] or [
                n for n in q.names if searched(key, n)
            ]
            options_of |= {n: options for n in matched if n not in options_of}
    return {
        n: options_of.get(n, {})
        for n in dict.fromkeys([*inside, *options_of])
        if options_of.get(n, {}).get("bits", 0) < 16
    }


def _vllm(q: Spelling) -> Mapping[str, Overrides] | None:
    if q.config.get("packing_format") not in (GPTQ.name, AWQ.name, FLOAT.name):
        return None
    prefixes = tuple(q.listed("block_name_to_quantize", "to_quant_block_names"))
    extra = {
        q.rename(key): options for key, options in (q.config.get("extra_config") or {}).items()
    }
    places = {key: i for i, key in enumerate(extra)}
    patterns = [k for k in extra if SPECIAL.search(k)]
    answer = {}
    for name in q.names:
        ends = (end for end in list(tails(name))[1:] if end in places)
        key = name if name in extra else min(ends, key=places.__getitem__, default=None)
        inside = name.startswith(prefixes) if prefixes else name != q.head
        if key is None:
            key = next((k for k in patterns if searched(k, name)), None)
            options = {"bits": 0 if inside else 16} | (extra[key] if key is not None else {})
        else:
            options = extra[key]
        if options.get("bits", 0) < 16:
            answer[name] = {k: v for k, v in options.items() if (k, v) != ("bits", 0)}
    return answer


def _choose(schemes: Collection[Scheme]) -> Format:
    """Floats: their own. All symmetric: GPTQ's packing; all asymmetric 4 bit with one group size:
    AWQ's; else zero points as they are."""
    if any(scheme.data_type != "int" for scheme in schemes):
        return FLOAT
    if schemes and all(scheme.sym for scheme in schemes):
        return GPTQ
    awq_holds = all(
        s.bits == 4 and not s.sym and s.group_size in auto_awq.GROUP_SIZES for s in schemes
    )
    return AWQ if schemes and awq_holds else PLAIN


METHOD = Method(
    "auto-round",
    required=("bits", "group_size", "sym", "packing_format"),
    form={
        "packing_format": config_check.text,
        "block_name_to_quantize": config_check.names,
        "to_quant_block_names": config_check.names,
        "data_type": config_check.text,
        "act_bits": config_check.maybe(config_check.BITS),
        "act_data_type": config_check.maybe(config_check.text),
        "extra_config": config_check.maybe(
            config_check.overrides(lambda key: key if SPECIAL.search(key) else "")
        ),
    },
    listed=("block_name_to_quantize", "to_quant_block_names", "extra_config"),
    schemes=_schemes,
    readers={"Transformers": _transformers, "vLLM": _vllm},
    copied=True,
)
_LIMITS = (
    wrong(
        "experts that the checkpoint names w1, w2, w3",
        "parameters were made up: [.. experts.0.down_proj.qweight ..]",
        "quantized", "renamed",
    ),
    wrong(
        "experts that stay",
        "parameters were made up: [.. experts.0.down_proj.weight ..]",
        "kept",
    ),
    wrong(
        "Llama 4's experts",
        "auto-round weighs what they give where the model weighs what they are given",
        "quantized",
        families=("llama4", "llama4_text"),
    ),
    wrong(
        "Qwen3-Omni's experts",
        "'Qwen3OmniMoeThinkerTextExperts' object has no attribute 'gate_up_proj'",
        "quantized",
        families=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    ),
    wrong(
        "a tower whose q, k, v are one tensor",
        "tensors were not used: ['model.vision_tower.layers.0.wqkv.bias', ..]",
        families=("kimi_k25",),
    ),
    wrong(
        "tensors that it merges while loading",
        "parameters were made up: auto-round switches the merging off",
        "merged",
    ),
)  # fmt: skip
_INTEGERS = check_integers(range(2, 9), (32, 32))
PLAIN = PackedFormat(
    name="auto_round",
    summary="AutoRound checkpoint, zero points as they are: Transformers (auto-round)",
    bits=(2, 3, 4, 5, 6, 7, 8),
    check=_INTEGERS,
    pack=partial(pack_gptq, zero_offset=0, g_idx=False),
    unpack=partial(unpack_gptq, zero_offset=0),
    config=partial(_config, "auto_round"),
    parts=WORDS,
    choose=_choose,
    method=METHOD,
    told={"packing_format": ("auto_round",)},
    engines={"transformers": None},
    limits=_LIMITS,
)
GPTQ = replace(
    PLAIN,
    name="auto_round:auto_gptq",
    summary=(
        "AutoRound checkpoint in GPTQ's packing, symmetric: Transformers (auto-round), vLLM, SGLang"
    ),
    check=lambda scheme, *shape: SYMMETRIC if not scheme.sym else _INTEGERS(scheme, *shape),
    pack=partial(pack_gptq, zero_offset=1, g_idx=False),
    unpack=partial(unpack_gptq, zero_offset=1),
    config=partial(_config, "auto_round:auto_gptq"),
    min_zero=1,
    choose=None,
    told={"packing_format": ("auto_round:auto_gptq", "")},
    engines={"transformers": None, "vllm": "vllm"},
    limits=(
        Limit(
            "vllm",
            "other than 4 bits",
            "INC on CPU: unsupported config INCLayerConfig(bits=8, ..)",
            any_scheme(lambda s: s.bits != 4),
        ),
        *_LIMITS,
        UNQUANTIZED_EXPERTS,
        STACKS_ALONE,
    ),
)
AWQ = replace(
    PLAIN,
    name="auto_round:auto_awq",
    summary=(
        "AutoRound checkpoint in AWQ's packing, 4 bits: Transformers (auto-round + gptqmodel), vLLM"
    ),
    bits=(4,),
    check=auto_awq.FORMAT.check,
    pack=auto_awq.pack,
    unpack=auto_awq.unpack,
    config=partial(_config, "auto_round:auto_awq"),
    choose=None,
    told={"packing_format": ("auto_round:auto_awq",)},
    engines={"transformers": "gptqmodel", "vllm": "vllm"},
    limits=(*_LIMITS, UNQUANTIZED_EXPERTS, STACKS_ALONE),
)
FLOAT = replace(
    PLAIN,
    name="auto_round:llm_compressor",
    summary="AutoRound checkpoint with NVFP4, MXFP4 or MXFP8 weights and inputs: Transformers",
    bits=(4, 8),
    check=_check_floats,
    pack=floats.pack,
    unpack=_unpack_floats,
    config=partial(_config, "auto_round:llm_compressor"),
    parts=floats.PARTS,
    act_how="auto_round",
    choose=None,
    told={"packing_format": ("auto_round:llm_compressor",)},
    engines={"transformers": None, "vllm": "vllm"},
    limits=(
        Limit(
            "vllm",
            "NVFP4",
            "Unsupported data_type: nv_fp, currently only support {'fp', 'int', 'mx_fp'}",
            any_scheme(lambda s: s.data_type == "nvfp4"),
        ),
        Limit("vllm", "MXFP4 and MXFP8", "Failed to find a kernel that can implement the layer"),
        *_LIMITS,
        wrong(TURNED, "'Conv1D' object has no attribute 'in_features'", "turned"),
        NO_EXPERTS,
        STACKS_ALONE,
    ),
)
FORMATS = (PLAIN, GPTQ, AWQ, FLOAT)
