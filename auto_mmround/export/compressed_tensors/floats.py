"""The float weights of compressed-tensors checkpoints: FP8 by tensor, channel or 128 x 128 block,
NVFP4, MXFP4, MXFP8."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.schemes import FLOATS, Scheme

BLOCK = 128
LAYOUTS = {
    "fp8": "float-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "mxfp4": "mxfp4-pack-quantized",
    "mxfp8": "mxfp8-quantized",
}
MX = ("mxfp4", "mxfp8")
# As `Format.parts`; weight_scale first: the part that every quantized module has and no other.
PARTS = {
    "weight_scale": "scale", "weight_packed": "q", "weight": "q",
    "weight_global_scale": "global_scale",
    "input_scale": "input_scale", "input_global_scale": "input_scale", "weight_zero_point": "zero",
}  # fmt: skip
INPUT = {"nvfp4": "input_global_scale"}  # what was measured of inputs, where its name is its own


def pack(name: str, codes: Codes) -> dict[str, Tensor]:
    """8 bits: weight e4m3 (out, in); 4 bits: weight_packed uint8 (out, in/2), the even column in
    the low half.

    weight_scale: fp8 float32 (1,), (out, 1) or (blocks of rows, blocks of columns), and for static
    inputs input_scale float32 (1,); mx (out, G) the biased exponent in a uint8; nvfp4 (out, G)
    e4m3, and weight_global_scale float32 (1,), for 4-bit inputs input_global_scale too.
    """
    scale = codes.scale_OG
    if codes.bits == 8:
        tensors = {f"{name}.weight": codes.q_OI.view(torch.float8_e4m3fn)}
    else:
        tensors = {f"{name}.weight_packed": codes.q_OI[:, ::2] | codes.q_OI[:, 1::2] << 4}
    if codes.data_type in MX:
        scale = (torch.frexp(scale).exponent + 126).to(torch.uint8)
    elif codes.data_type == "nvfp4":
        scale = scale.to(torch.float8_e4m3fn)
    elif codes.group_size == BLOCK:
        scale = scale[::BLOCK]
    elif codes.group_size == 0:
        scale = scale[0]
    wholes = {
        "weight_global_scale": codes.global_scale,
        INPUT.get(codes.data_type, "input_scale"): codes.input_scale,
    }
    tensors[f"{name}.weight_scale"] = scale.contiguous()
    return tensors | {
        f"{name}.{part}": whole for part, whole in wholes.items() if whole is not None
    }


def unpack(name: str, parts: Mapping[str, Tensor], scheme: Scheme) -> Codes:
    """The inverse of :func:`pack`; parts by their last names. Raises ValueError where they
    contradict the scheme."""
    scale = parts["weight_scale"]
    if "weight_packed" in parts:
        packed = parts["weight_packed"]
        q_OI = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
    elif parts["weight"].dtype == torch.float8_e4m3fn:
        q_OI = parts["weight"].view(torch.uint8)
    else:
        raise ValueError(
            f"{name}.weight is {parts['weight'].dtype}, but quantization_config says"
            f" {scheme.data_type}"
        )
    out_features, in_features = q_OI.shape
    group = in_features if scheme.group_size < 1 else scheme.group_size
    if scheme.data_type in MX:
        scale = torch.ldexp(torch.ones(scale.shape), scale.int() - 127)
    elif scheme.group_size == 0 and scale.numel() == 1:
        scale = scale.reshape(1, 1).expand(out_features, 1).contiguous()
    elif scheme.group_size == BLOCK:
        scale = scale.repeat_interleave(BLOCK, 0)[:out_features]
    if scale.shape != (out_features, -(-in_features // group)):
        raise ValueError(
            f"{name}.weight_scale {tuple(scale.shape)} contradicts {scheme.data_type} by {group}"
            " columns"
        )
    zero_OG = torch.zeros(scale.shape, dtype=torch.uint8)
    of_inputs = parts.get(INPUT.get(scheme.data_type, "input_scale"))
    wholes = parts.get("weight_global_scale"), of_inputs
    size = group if scheme.group_size else 0
    return Codes(q_OI, scale.float(), zero_OG, scheme.bits, size, True, scheme.data_type, *wholes)


def check(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why these layouts could not hold this weight, or None."""
    bits, groups = FLOATS.get(scheme.data_type, (0, ()))
    group = in_features if scheme.group_size < 1 else scheme.group_size
    rules = (
        (
            (scheme.bits, True) != (bits, scheme.group_size in groups),
            f"has no {scheme.bits} bits by {group} columns",
        ),
        (
            scheme.act_bits not in (scheme.bits, 16),
            f"holds {scheme.data_type} beside activations of {scheme.bits} or 16 bits, not"
            f" {scheme.act_bits}",
        ),
        (
            scheme.group_size == -1 and in_features == BLOCK,
            "cannot tell a channel of 128 inputs from a block",
        ),
        (
            in_features % group != 0,
            f"{in_features} inputs are no multiple of the group size {group}",
        ),
    )
    return next((reason for broken, reason in rules if broken), None)


def weight_args(scheme: Scheme) -> dict[str, Any]:
    """``weights`` of a config group."""
    args = {"num_bits": scheme.bits, "type": "float", "symmetric": True, "dynamic": False}
    if scheme.data_type == "nvfp4":
        return args | {
            "strategy": "tensor_group",
            "group_size": 16,
            "scale_dtype": "torch.float8_e4m3fn",
        }
    if scheme.data_type in MX:
        return args | {"strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    strategy = {-1: "channel", 0: "tensor", BLOCK: "block"}[scheme.group_size]
    blocks = {"block_structure": [BLOCK, BLOCK]} if strategy == "block" else {}
    return args | {"strategy": strategy} | blocks


def input_args(scheme: Scheme) -> dict[str, Any]:
    """``input_activations`` of a config group: a static scale, or one a token, or a token and the
    weight's group."""
    args = {"type": "float", "symmetric": True, "dynamic": scheme.act_dynamic}
    args = {"num_bits": scheme.act_bits} | args
    if scheme.inputs[2] < 1:
        return args | {"strategy": "token" if scheme.act_dynamic else "tensor"}
    if scheme.data_type == "nvfp4":  # its scales are the engine's, what divides them is not
        return weight_args(scheme) | {"dynamic": "local"}
    scale = {"scale_dtype": "torch.uint8"} if scheme.data_type in MX else {}
    return args | {"strategy": "group", "group_size": scheme.group_size} | scale


# (bits, strategy) of float weights -> data type and group size
READ = {
    (8, "block"): ("fp8", BLOCK),
    (8, "channel"): ("fp8", -1),
    (8, "tensor"): ("fp8", 0),
    (8, "group"): ("mxfp8", 32),
    (4, "group"): ("mxfp4", 32),
    (4, "tensor_group"): ("nvfp4", 16),
}


def scheme_of(weights: Mapping[str, Any], inputs: Mapping[str, Any]) -> Scheme | None:
    """The scheme of a config group with float weights, None for one that is not read. inputs: empty
    for none."""
    row = READ.get((weights.get("num_bits", 0), str(weights.get("strategy"))))
    if row is None:
        return None
    data_type, size = row
    columns = (weights.get("block_structure") or [None, weights.get("group_size")])[-1]
    act_bits, dynamic = inputs.get("num_bits", 16), bool(inputs.get("dynamic", True))
    scheme = Scheme(
        FLOATS[data_type][0], size, data_type=data_type, act_bits=act_bits, act_dynamic=dynamic
    )
    return scheme if size in (-1, 0, columns) else None
