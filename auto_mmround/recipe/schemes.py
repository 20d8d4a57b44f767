"""Quantization schemes as data."""

from dataclasses import dataclass

# Float grids: bits, and the group sizes they exist for. -1: a scale an output channel; FP8's 128: blocks of 128 x 128.
FLOATS: dict[str, tuple[int, tuple[int, ...]]] = {"fp8": (8, (-1, 128)), "nvfp4": (4, (16,)), "mxfp4": (4, (32,))}


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored.

    bits: 2..8. group_size: columns that share a scale, -1 for one per output channel. sym: full-range symmetric
    (zero point 2**(bits-1)) or asymmetric. scale_dtype: "fp16", "bf16" or "fp32". min_zero: smallest zero point the
    file format can hold (1 for layouts that store zero - 1). scale_bits: significant bits of a scale or None.
    file format can hold (1 for layouts that store zero - 1). act_bits: 8 where the engine is to quantize the inputs,
    symmetric with a scale a token computed as it runs; 16 for none. data_type: "int" or one of FLOATS.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    data_type: str = "int"
    scale_dtype: str = "fp16"
    act_bits: int = 16
    min_zero: int = 0
    scale_bits: int | None = None
