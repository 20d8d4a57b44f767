"""The integer weights of compressed-tensors checkpoints: packed words, or int8 for int8
activations.

Integers are signed there, ``q - 2**(bits-1)``; packed, that offset is added back, so words hold our
codes as they are. A row is one dense bit stream (``export/packing.py``); zero points are packed
along the outputs, absent when symmetric.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from auto_mmround.export.packing import pack_bits, unpack_bits
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.schemes import Scheme


def pack_words(name: str, codes: Codes) -> dict[str, Tensor]:
    """weight_packed int32 (out, ceil(in*b/32)), weight_scale (out, G), weight_shape,
    weight_zero_point if asymmetric.

    weight_zero_point is int32 (ceil(out*b/32), G).
    """
    tensors = {
        f"{name}.weight_packed": pack_bits(codes.q_OI, codes.bits),
        f"{name}.weight_scale": codes.scale_OG.contiguous(),
        f"{name}.weight_shape": torch.tensor(codes.q_OI.shape, dtype=torch.int64),
    }
    if not codes.sym:
        tensors[f"{name}.weight_zero_point"] = pack_bits(
            codes.zero_OG.T.contiguous(), codes.bits
        ).T.contiguous()
    return tensors


def pack_int8(name: str, codes: Codes) -> dict[str, Tensor]:
    """weight int8 (out, in), weight_scale (out, G). ValueError for an asymmetric weight: no kernel
    reads one."""
    if not codes.sym:
        raise ValueError(f"{name}: int-quantized weights are symmetric")
    signed_OI = codes.q_OI.to(torch.int16) - 2 ** (codes.bits - 1)
    return {
        f"{name}.weight": signed_OI.to(torch.int8),
        f"{name}.weight_scale": codes.scale_OG.contiguous(),
    }


def unpack(name: str, parts: Mapping[str, Tensor], scheme: Scheme) -> Codes:
    """The inverse of both packers; parts by their last names. Raises ValueError where they
    contradict the scheme."""
    bits, scale_OG = scheme.bits, parts["weight_scale"]
    if "weight_packed" in parts:
        out_features, in_features = parts["weight_shape"].tolist()
        q_OI = unpack_bits(parts["weight_packed"], bits, in_features)
    elif parts["weight"].dtype == torch.int8:
        out_features, in_features = parts["weight"].shape
        q_OI = (parts["weight"].to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    else:
        raise ValueError(
            f"{name}.weight is {parts['weight'].dtype}, but quantization_config says integers"
        )
    group = in_features if scheme.group_size == -1 else scheme.group_size
    if q_OI.shape[0] != out_features or scale_OG.shape != (out_features, -(-in_features // group)):
        raise ValueError(
            f"{name}.weight_scale {tuple(scale_OG.shape)} contradicts {bits} bits, group size"
            f" {group}"
        )
    g_idx = parts.get("weight_g_idx")
    if g_idx is not None and not torch.equal(
        g_idx.long(), torch.arange(in_features, device=g_idx.device) // group
    ):
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


def input_args(scheme: Scheme) -> dict[str, Any]:
    """``input_activations`` of a config group: symmetric, one scale a token."""
    return {
        "num_bits": scheme.act_bits, "type": "int", "symmetric": True, "strategy": "token",
        "dynamic": True,
    }  # fmt: skip
