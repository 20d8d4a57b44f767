"""The float weights of compressed-tensors checkpoints: FP8 by channel or 128 x 128 block, NVFP4, MXFP4."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.schemes import FLOATS, Scheme

BLOCK = 128
KINDS = {"fp8": "float-quantized", "nvfp4": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized"}


def pack(name: str, codes: Codes) -> dict[str, Tensor]:
    """fp8: weight e4m3 (out, in), weight_scale float32 (out, 1) or (blocks of rows, blocks of columns).

    mxfp4, nvfp4: weight_packed uint8 (out, in/2), the even column in the low half; weight_scale (out, G) as the biased
    exponent in a uint8, or as e4m3 with weight_global_scale float32 (1,).
    """
    scale = codes.scale_OG
    if codes.data_type == "fp8":
        scale = scale if scale.shape[1] == 1 and codes.group_size != BLOCK else scale[::BLOCK]
        return {f"{name}.weight": codes.q_OI.view(torch.float8_e4m3fn), f"{name}.weight_scale": scale.contiguous()}
    tensors = {f"{name}.weight_packed": codes.q_OI[:, ::2] | codes.q_OI[:, 1::2] << 4}
    if codes.global_scale is None:
        return tensors | {f"{name}.weight_scale": (torch.frexp(scale).exponent + 126).to(torch.uint8)}
    tensors[f"{name}.weight_scale"] = scale.to(torch.float8_e4m3fn)
    return tensors | {f"{name}.weight_global_scale": codes.global_scale}


def unpack(name: str, parts: Mapping[str, Tensor], scheme: Scheme) -> Codes:
    """The inverse of :func:`pack`; parts by their last names. Raises ValueError where they contradict the scheme."""
    scale = parts["weight_scale"]
    if "weight_packed" in parts:
        packed = parts["weight_packed"]
        q_OI = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    elif parts["weight"].dtype == torch.float8_e4m3fn:
        q_OI = parts["weight"].view(torch.uint8)
    else:
        raise ValueError(f"{name}.weight is {parts['weight'].dtype}, but quantization_config says {scheme.data_type}")
    out_features, in_features = q_OI.shape
    group = in_features if scheme.group_size == -1 else scheme.group_size
    if scheme.data_type == "mxfp4":
        scale = torch.ldexp(torch.ones(scale.shape), scale.int() - 127)
    elif scheme.group_size == BLOCK:
        scale = scale.repeat_interleave(BLOCK, 0)[:out_features]
    if scale.shape != (out_features, -(-in_features // group)):
        raise ValueError(f"{name}.weight_scale {tuple(scale.shape)} contradicts {scheme.data_type} by {group} columns")
    zero_OG = torch.zeros(scale.shape, dtype=torch.uint8)
    global_scale = parts.get("weight_global_scale")
    return Codes(q_OI, scale.float(), zero_OG, scheme.bits, group, True, scheme.data_type, global_scale)


def check(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why these layouts could not hold this weight, or None."""
    bits, groups = FLOATS.get(scheme.data_type, (0, ()))
    group = in_features if scheme.group_size == -1 else scheme.group_size
    rules = (
        ((scheme.bits, True) != (bits, scheme.group_size in groups), f"has no {scheme.bits} bits by {group} columns"),
        (scheme.data_type != "fp8" and scheme.act_bits < 16, f"holds {scheme.data_type} with 16-bit activations only"),
        (in_features % group != 0, f"{in_features} inputs are no multiple of the group size {group}"),
    )
    return next((reason for broken, reason in rules if broken), None)


def weight_args(scheme: Scheme) -> dict[str, Any]:
    """``weights`` of a config group."""
    args = {"num_bits": scheme.bits, "type": "float", "symmetric": True, "dynamic": False}
    if scheme.data_type == "nvfp4":
        return args | {"strategy": "tensor_group", "group_size": 16, "scale_dtype": "torch.float8_e4m3fn"}
    if scheme.data_type == "mxfp4":
        return args | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    return args | (
        {"strategy": "channel"} if scheme.group_size == -1 else {"strategy": "block", "block_structure": [BLOCK, BLOCK]}
    )


def input_args(scheme: Scheme) -> dict[str, Any]:
    """``input_activations`` of a config group for FP8: a scale a token, or a token and 128 columns."""
    args = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
    return args | ({"strategy": "token"} if scheme.group_size == -1 else {"strategy": "group", "group_size": BLOCK})


def scheme_of(weights: Mapping[str, Any], act_bits: int) -> Scheme | None:
    """The scheme of a config group with float weights, None for one that is not read."""
    bits, strategy = weights.get("num_bits"), weights.get("strategy")
    if bits == 8 and strategy == "block" and weights.get("block_structure") == [BLOCK, BLOCK]:
        return Scheme(8, BLOCK, data_type="fp8", act_bits=act_bits)
    if bits == 8 and strategy == "channel":
        return Scheme(8, -1, data_type="fp8", act_bits=act_bits)
    kind = {"tensor_group": "nvfp4", "group": "mxfp4"}.get(str(strategy))
    if bits == 4 and kind and weights.get("group_size") in FLOATS[kind][1]:
        return Scheme(4, weights["group_size"], data_type=kind, act_bits=act_bits)
    return None
