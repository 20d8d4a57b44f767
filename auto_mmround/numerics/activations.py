"""Rounding of a layer's inputs, as engines do it while they run.

Pure functions of (.., in) tensors, which keep the dtype. The loader's hooks, `verify` and the tuner
call the same ones.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from auto_mmround.numerics.float_grids import (
    E4M3_TOP,
    TINY,
    FloatGrid,
    nearest,
    nvfp4_global,
    to_e4m3,
)
from auto_mmround.numerics.grids import from_groups, levels, to_groups


def rounded_inputs(
    x_TI: Tensor,
    data_type: str,
    bits: int,
    group_size: int,
    whole: Tensor | None = None,
    how: str = "compressed_tensors",
) -> Tensor:
    """The inputs of a layer, rounded as its scheme says (`Scheme.inputs`). bits: of an integer.

    whole: measured over all inputs in calibration: the scale of static FP8, or the divisor of
    NVFP4's scales. how: the reader's arithmetic, a row of `float_grids.HOW`.
    """
    if data_type == "int":
        return integers_a_token(x_TI, bits)
    if data_type != "fp8":
        return as_rows(x_TI, data_type, group_size, whole, how)
    return e4m3_a_token(x_TI, group_size) if whole is None else e4m3_static(x_TI, whole)


def integers_a_token(x_TI: Tensor, bits: int = 8) -> Tensor:
    """Symmetric integers. Each token has one scale, max|x| / top."""
    top = 2 ** (bits - 1) - 1
    scale_T1 = (x_TI.float().abs().amax(-1, keepdim=True) / top).clamp(min=TINY)
    return ((x_TI.float() / scale_T1).round().clamp(-top - 1, top) * scale_T1).to(x_TI.dtype)


def e4m3_static(x_TI: Tensor, scale: Tensor) -> Tensor:
    """FP8 under one scale for all inputs. Numbers beyond 448 scales become 448 scales."""
    return (levels(to_e4m3(x_TI.float() / scale), 8) * scale).to(x_TI.dtype)


def e4m3_a_token(x_TI: Tensor, group_size: int = -1) -> Tensor:
    """FP8. Each token, or each group of a token, has one scale, max|x| / 448."""
    columns = x_TI.shape[-1]
    x_TGg = to_groups(x_TI.float().flatten(0, -2), group_size)
    scale_TG1 = (x_TGg.abs().amax(-1, keepdim=True) / E4M3_TOP).clamp(min=TINY)
    ratio_TGg = (x_TGg / scale_TG1).clamp(-E4M3_TOP, E4M3_TOP)
    rounded_TGg = ratio_TGg.to(torch.float8_e4m3fn).float() * scale_TG1
    return from_groups(rounded_TGg, columns).reshape(x_TI.shape).to(x_TI.dtype)


def as_rows(
    x_TI: Tensor,
    data_type: str,
    group_size: int,
    global_scale: Tensor | None = None,
    how: str = "compressed_tensors",
) -> Tensor:
    """MX or NVFP4, rounded like the rows of a weight. global_scale: of NVFP4; None: that of these
    inputs."""
    x_TGg = to_groups(x_TI.float().flatten(0, -2), group_size)
    if data_type == "nvfp4" and global_scale is None:
        global_scale = nvfp4_global(x_TGg.abs().max())
    whole = 1.0 if global_scale is None else global_scale
    rounded_TGg = nearest(x_TGg, FloatGrid(data_type, whole=whole, how=how))
    return from_groups(rounded_TGg, x_TI.shape[-1]).reshape(x_TI.shape).to(x_TI.dtype)


def straight_through(x: Tensor, function: Callable[..., Tensor], *args: Any) -> Tensor:
    """``function(x, *args)``, to the bit; gradients pass as if it did nothing."""
    result: Tensor = _StraightThrough.apply(x, function, args)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Callable[..., Tensor], args: Any) -> Tensor:
        return function(x, *args)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None
