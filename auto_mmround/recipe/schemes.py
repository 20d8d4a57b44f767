"""Quantization schemes as data."""

import difflib
from dataclasses import dataclass, replace
from typing import Any

from auto_mmround.errors import UserError
from auto_mmround.untrusted import shown

# Float grids: bits and possible group sizes. -1: one scale per output channel; FP8's 128: blocks of
# 128 x 128, its 0: one for the whole weight. `SCALE_BITS`: of a scale.
FLOATS: dict[str, tuple[int, tuple[int, ...]]] = {
    "fp8": (8, (-1, 0, 128)),
    "nvfp4": (4, (16,)),
    "mxfp4": (4, (32,)),
    "mxfp8": (8, (32,)),
}
OVERRIDES = ("scheme", "bits", "group_size", "sym")  # of a layer_config entry
SCALE_BITS = {"fp8": 32, "nvfp4": 8, "mxfp4": 8, "mxfp8": 8}


@dataclass(frozen=True)
class Scheme:
    """How one weight is stored.

    bits: 2..8. group_size: columns that share a scale, -1 for one scale per output channel. sym:
    full-range symmetric (zero point 2**(bits-1)) or asymmetric. scale_dtype: "fp16", "bf16" or
    "fp32". min_zero: smallest zero point that the file format can hold (1 for layouts that store
    zero - 1). scale_bits: significant bits of a scale, or None.

    act_bits: 8 if the engine quantizes the inputs, symmetric; 16 if not. act_dynamic: True for one
    scale per token, which the engine computes; False for one scale measured beforehand. data_type:
    "int" or one of FLOATS. scale_range: in super-blocks of 256 columns, scales are integers times a
    unit; these are the bounds of the integers. act_data_type: of the inputs, where it is not that
    of the weights. act_how: in whose arithmetic MX and NVFP4 inputs are rounded, a
    row of `numerics.float_grids.HOW`.
    """

    bits: int = 4
    group_size: int = 128
    sym: bool = True
    data_type: str = "int"
    scale_dtype: str = "fp16"
    act_bits: int = 16
    min_zero: int = 0
    scale_bits: int | None = None
    act_dynamic: bool = True
    scale_range: tuple[int, int] | None = None
    act_data_type: str | None = None
    act_how: str = "compressed_tensors"

    @property
    def inputs(self) -> tuple[str, int, int]:
        """Data type, bits and group size of the inputs that engines round."""
        if self.act_data_type is None:
            return self.data_type, self.act_bits, self.group_size
        return self.act_data_type, self.act_bits, -1

    def stored(self, rows: int = 2**20, columns: int = 2**20) -> float:
        """Bits of a value of a weight (rows, columns), with its share of scales and zero points. A
        group's scale takes 16, its zero point as many as a code. Floats have no zero points, and
        scales of other sizes, which FP8's blocks and whole weights share among rows."""
        group = columns if self.group_size < 1 else self.group_size
        if self.data_type == "int":
            return self.bits + (16 + self.bits) / group
        shared = {128: 128, 0: rows}.get(self.group_size, 1)
        return self.bits + SCALE_BITS[self.data_type] / (group * shared)

    @property
    def one_for_fused(self) -> bool:
        """Whether weights that engines fuse (q, k, v) have one scale: NVFP4's for the whole weight,
        and FP8's."""
        return self.data_type == "nvfp4" or (self.data_type, self.group_size) == ("fp8", 0)

    @property
    def inputs_measured(self) -> bool:
        """Whether engines round inputs by what calibration found of them: a static scale, or what
        NVFP4 divides its scales by."""
        return self.act_bits < 16 and (not self.act_dynamic or self.data_type == "nvfp4")


def _weights(
    bits: int, group_size: int = 128, sym: bool = True, act_bits: int = 32, data_type: str = "int"
) -> dict[str, Any]:
    return {
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "act_bits": act_bits,
        "data_type": data_type,
    }


def _floats(data_type: str, group_size: int, act_bits: int = 32) -> dict[str, Any]:
    """The keys of a float grid."""
    return _weights(FLOATS[data_type][0], group_size, True, act_bits, data_type)


# Names in llm-compressor, vLLM and AutoRound -> keys of a recipe. A key beside `scheme` overrides.
SCHEMES: dict[str, dict[str, Any]] = {
    "W2A16": _weights(2),
    "W3A16": _weights(3),
    "W4A16": _weights(4),
    "W4A16_ASYM": _weights(4, sym=False),
    "W8A16": _weights(8, -1),
    "W8A8": _weights(8, -1, act_bits=8),
    "W4A8": _weights(4, act_bits=8),
    "W4AFP8": _weights(4, act_bits=8) | {"act_data_type": "fp8"},
    "FP8": _floats("fp8", -1, 8),
    "FP8_STATIC": _floats("fp8", -1, 8) | {"act_dynamic": False},
    "FP8_TENSOR": _floats("fp8", 0, 8) | {"act_dynamic": False},
    "FP8_BLOCK": _floats("fp8", 128, 8),
    "MXFP8": _floats("mxfp8", 32, 8),
    "MXFP4": _floats("mxfp4", 32, 4),
    "MXFP4A16": _floats("mxfp4", 32),
    "NVFP4": _floats("nvfp4", 16, 4),
    "NVFP4A16": _floats("nvfp4", 16),
}
# Data type of weights -> another one that their inputs may have -> bits of the weights then.
OTHER_INPUTS: dict[str, dict[str, tuple[int, ...]]] = {"int": {"fp8": (4,)}}


# What a layer may get: the bits of an integer, or a name of `SCHEMES`.
Option = int | str


def of_option(scheme: Scheme, option: Option) -> Scheme:
    """The scheme with other bits, or the named one; formats' demands on it stay."""
    if isinstance(option, int):
        return replace(scheme, bits=option)
    keys = {"act_data_type": None, "act_dynamic": True} | SCHEMES[option]
    return replace(scheme, **keys | {"act_bits": min(keys["act_bits"], 16)})


def option_keys(option: Option) -> dict[str, Any]:
    """The `layer_config` entry that says it."""
    return {"bits": option} if isinstance(option, int) else {"scheme": option}


def overridden(scheme: Scheme, options: dict[str, Any], where: str) -> Scheme | None:
    """The scheme with what a layer_config entry says: another by name, its bits, group_size and
    sym; None for 16 bits or more, which means keep."""
    for key in options:
        if key not in (*OVERRIDES, "data_type"):
            near = difflib.get_close_matches(key, OVERRIDES, n=1)
            raise UserError(
                f"layer_config {where!r}: unknown key {key!r}; known:"
                f" {', '.join(near or OVERRIDES)}"
            )
    if "scheme" in options:
        scheme = of_option(scheme, _known(options["scheme"], where))
    bits = options.get("bits", scheme.bits)
    kept = ("float", "fp") if isinstance(bits, int) and bits >= 16 else ()
    if options.get("data_type", scheme.data_type) not in (scheme.data_type, *kept):
        raise UserError(
            f"layer_config {where!r}: data_type = {shown(options['data_type'])}, but all layers"
            f" have that of the scheme, {scheme.data_type}; leave it out"
        )
    if not isinstance(bits, int) or bits < 2 or 8 < bits < 16:
        raise UserError(
            f"layer_config {where!r}: bits = {shown(bits)}, possible are 2 to 8, or 16 to keep the"
            " layer"
        )
    if bits >= 16:
        return None
    return replace(scheme, **{key: options[key] for key in OVERRIDES[1:] if key in options})


def _known(name: Any, where: str) -> str:
    if not isinstance(name, str) or name not in SCHEMES:
        raise UserError(
            f"layer_config {where!r}: scheme = {shown(name)}; there are {', '.join(SCHEMES)}"
        )
    return name
