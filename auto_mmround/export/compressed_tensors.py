"""compressed-tensors checkpoints, as llm-compressor writes them: packed integers, or int8 with int8 activations.

Integers are signed there, ``q - 2**(bits-1)``; packed, that offset is added back, so words hold our codes as they are.
A row is one dense bit stream (``export/packing.py``); zero points are packed along the outputs, absent when symmetric.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.export import compressed_floats
from auto_mmround.export.layout import Format, Layout, both_spellings, check_int, kept_groups, tower_patterns
from auto_mmround.export.packing import pack_bits, unpack_bits
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.schemes import Scheme

SCALE_DTYPES = ("fp16", "bf16", "fp32")
# weight_scale first: the part that every quantized module has and no other.
PARTS = (
    "weight_scale", "weight_packed", "weight", "weight_shape", "weight_zero_point", "weight_global_scale",
    "weight_g_idx", "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip


def pack_words(name: str, codes: Codes) -> dict[str, Tensor]:
    """weight_packed int32 (out, ceil(in*b/32)), weight_scale (out, G), weight_shape, weight_zero_point if asymmetric.

    weight_zero_point is int32 (ceil(out*b/32), G).
    """
    tensors = {
        f"{name}.weight_packed": pack_bits(codes.q_OI, codes.bits),
        f"{name}.weight_scale": codes.scale_OG.contiguous(),
        f"{name}.weight_shape": torch.tensor(codes.q_OI.shape, dtype=torch.int64),
    }
    if not codes.sym:
        tensors[f"{name}.weight_zero_point"] = pack_bits(codes.zero_OG.T.contiguous(), codes.bits).T.contiguous()
    return tensors


def pack_int8(name: str, codes: Codes) -> dict[str, Tensor]:
    """weight int8 (out, in), weight_scale (out, G). ValueError for an asymmetric weight: no kernel reads one."""
    if not codes.sym:
        raise ValueError(f"{name}: int-quantized weights are symmetric")
    signed_OI = codes.q_OI.to(torch.int16) - 2 ** (codes.bits - 1)
    return {f"{name}.weight": signed_OI.to(torch.int8), f"{name}.weight_scale": codes.scale_OG.contiguous()}


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Codes:
    """The inverse of both packers. Raises ValueError where the tensors contradict the scheme."""
    parts = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
    if scheme.data_type != "int":
        return compressed_floats.unpack(name, parts, scheme)
    bits, scale_OG = scheme.bits, parts["weight_scale"]
    if "weight_packed" in parts:
        out_features, in_features = parts["weight_shape"].tolist()
        q_OI = unpack_bits(parts["weight_packed"], bits, in_features)
    elif parts["weight"].dtype == torch.int8:
        out_features, in_features = parts["weight"].shape
        q_OI = (parts["weight"].to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    else:
        raise ValueError(f"{name}.weight is {parts['weight'].dtype}, but quantization_config says integers")
    group = in_features if scheme.group_size == -1 else scheme.group_size
    if q_OI.shape[0] != out_features or scale_OG.shape != (out_features, -(-in_features // group)):
        raise ValueError(f"{name}.weight_scale {tuple(scale_OG.shape)} contradicts {bits} bits, group size {group}")
    g_idx = parts.get("weight_g_idx")
    if g_idx is not None and not torch.equal(g_idx.long(), torch.arange(in_features, device=g_idx.device) // group):
        raise ValueError(f"{name}.weight_g_idx reorders the inputs, which is not supported")
    return Codes(q_OI, scale_OG, _zeros(parts, scheme, scale_OG), bits, group, scheme.sym)


def _zeros(parts: Mapping[str, Tensor], scheme: Scheme, scale_OG: Tensor) -> Tensor:
    middle = 2 ** (scheme.bits - 1)
    if scheme.sym:
        if "weight_packed" in parts and "weight_zero_point" in parts:
            raise ValueError("a zero point is stored, but quantization_config says symmetric")
        return torch.full(scale_OG.shape, middle, dtype=torch.uint8, device=scale_OG.device)
    zero = parts["weight_zero_point"]
    if zero.dtype == torch.int8:
        return (zero.to(torch.int16) + middle).to(torch.uint8)
    return unpack_bits(zero.T.contiguous(), scheme.bits, scale_OG.shape[0]).T.contiguous()


def check_words(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why pack-quantized could not hold this weight, or None."""
    return check_int(scheme, out_features, in_features, WORDS.bits, (1, 1), SCALE_DTYPES)


def check_int8(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why int-quantized could not hold this weight for 8-bit activations, or None."""
    if not scheme.sym:
        return "holds symmetric weights beside 8-bit activations"
    if scheme.bits == 8 and scheme.group_size != -1:
        return "holds one scale per output channel beside 8-bit activations: group size -1"
    weight_only = replace(scheme, act_bits=16)
    return check_int(weight_only, out_features, in_features, INT8.bits, (1, 1), SCALE_DTYPES)


def config(layout: Layout) -> dict[str, Any]:
    """``quantization_config``: a group a scheme, the one of most modules first and by class, others by name."""
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in layout.quantized.items():
        by_scheme.setdefault(replace(scheme, min_zero=0, scale_dtype="fp16"), []).append(name)
    largest = max(by_scheme, key=lambda scheme: len(by_scheme[scheme]))
    groups, singles = kept_groups(layout)
    ignore = [f"re:{pattern}" for group in groups for pattern in tower_patterns(layout, group)]
    ignore += [spelling for single in singles for spelling in both_spellings(layout, single)]
    kind = _kind(largest)
    # compressed-tensors 0.20 forgets to pack the zero points of the layers it prepares for Transformers, which then
    # refuses ours; asked to dequantize at once Transformers reads them, but with one scheme for all layers.
    dequantize = {"dequantize": True} if len(by_scheme) == 1 and not largest.sym else {}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {
            f"group_{i}": _group(scheme, _targets(layout, by_scheme[scheme], scheme == largest), kind)
            for i, scheme in enumerate(sorted(by_scheme, key=lambda scheme: scheme != largest))
        },
        **dequantize,
        "provider": "auto_mmround",
        "auto_mmround": dict(layout.details),
    }


def _kind(scheme: Scheme) -> str:
    integers = "int-quantized" if scheme.act_bits < 16 else "pack-quantized"
    return compressed_floats.KINDS.get(scheme.data_type, integers)


def _group(scheme: Scheme, targets: list[str], kind: str) -> dict[str, Any]:
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.sym, "dynamic": False}
    channel = scheme.group_size == -1
    weights |= {"strategy": "channel"} if channel else {"strategy": "group", "group_size": scheme.group_size}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    if scheme.data_type != "int":
        weights, activations = compressed_floats.weight_args(scheme), compressed_floats.input_args(scheme)
    return {
        "targets": targets,
        "format": kind,
        "weights": weights,
        "input_activations": activations if scheme.act_bits < 16 else None,
        "output_activations": None,
    }


def _targets(layout: Layout, names: list[str], everything: bool) -> list[str]:
    """How readers find these modules: all by their class, a whole block list by a pattern, else one by one.

    Both Transformers and vLLM try names before classes, and vLLM tries the members of a matrix that it fuses.
    """
    outside = [name for name in names if not any(name.startswith(block + ".") for block in layout.blocks)]
    if everything:  # vLLM's output head is no Linear: it goes by name
        return ["Linear", *(target for name in outside for target in _by_name(layout, name, names))]
    targets: dict[str, None] = {}
    for name in names:
        block = next((b for b in layout.blocks if name.startswith(b + ".")), None)
        whole = block is not None and all(n in names for n in layout.quantized if n.startswith(block + "."))
        found = tail_pattern(layout, f"{block}.", names) if whole else None
        targets |= dict.fromkeys([found] if found else _by_name(layout, name, names))
    return list(targets)


def _by_name(layout: Layout, name: str, names: list[str]) -> list[str]:
    found = tail_pattern(layout, name, names)
    return [found] if found else both_spellings(layout, name)


def tail_pattern(layout: Layout, name: str, names: list[str]) -> str | None:
    """``re:`` pattern of what all spellings of a name, or of a prefix with its dot, end in; None if it takes others."""
    end = r"\." if name.endswith(".") else "$"
    spellings = [reversed(spelling.split(".")) for spelling in both_spellings(layout, name.removesuffix("."))]
    common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*spellings))]
    pattern = rf"(.*\.)?{re.escape('.'.join(reversed(common)))}{end}"
    others = [n for n in layout.quantized if n not in names]
    taken = any(re.match(pattern, spelling) for n in others for spelling in (n, layout.checkpoint_name(n)))
    return f"re:{pattern}" if common and not taken else None


def scheme_of(quantization_config: Mapping[str, Any], name: str) -> Scheme:
    """The scheme of a quantized module by the checkpoint's name, in the readers' order: name, pattern, class.

    Raises UserError if no group is for it, or for weights other than integers with a scale a channel or a group.
    """
    targets = {t: group for group in quantization_config["config_groups"].values() for t in group["targets"]}
    group = next((targets[t] for t in _in_order(targets) if _fits(t, name)), None)
    if group is None:
        raise UserError(f"quantization_config: {name} is quantized, but no config group is for it")
    weights, inputs = group["weights"], group.get("input_activations") or {}
    found = compressed_floats.scheme_of(weights, inputs) if weights.get("type") == "float" else None
    if found is None and (weights.get("type") == "float" or weights.get("strategy") not in ("group", "channel")):
        kind = f"{weights.get('num_bits')} bit {weights.get('type')} weights with strategy {weights.get('strategy')}"
        raise UserError(f"cannot read {name}: {kind}; read are integers by group or channel, FP8, NVFP4 and MX")
    if found is not None:
        return found
    size = weights["group_size"] if weights["strategy"] == "group" else -1
    return Scheme(weights["num_bits"], size, weights.get("symmetric", True), act_bits=inputs.get("num_bits", 16))


def _in_order(targets: Iterable[str]) -> list[str]:
    return sorted(targets, key=lambda target: (target == "Linear", target.startswith("re:"), target))


def _fits(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target in (name, "Linear")


WORDS = Format(
    name="compressed_tensors",
    summary="compressed-tensors checkpoint, packed: Transformers (compressed-tensors), vLLM, SGLang",
    bits=(2, 3, 4, 5, 6, 7, 8),
    check=check_words,
    pack=pack_words,
    unpack=unpack,
    config=config,
    parts=PARTS,
)
INT8 = Format(
    name="compressed_tensors:int8",
    summary="compressed-tensors checkpoint for 8-bit activations (act_bits 8), W8A8 and W4A8, symmetric",
    bits=(4, 8),
    check=check_int8,
    pack=pack_int8,
    unpack=unpack,
    config=config,
    parts=PARTS,
)
FLOAT = Format(
    name="compressed_tensors:float",
    summary="compressed-tensors checkpoint with FP8, NVFP4, MXFP4 or MXFP8 weights (data_type), rounded to nearest",
    bits=(4, 8),
    check=compressed_floats.check,
    pack=compressed_floats.pack,
    unpack=unpack,
    config=config,
    parts=PARTS,
)
