"""Dequantized weights in the source's dtype: a plain Transformers checkpoint that loads
anywhere."""

from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor

from auto_mmround.export.format import Format, Layout
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.schemes import Scheme


def check(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why not: floats hold every weight, but nothing tells a reader to quantize activations."""
    return f"cannot state {scheme.act_bits}-bit activations" if scheme.act_bits < 16 else None


def config(layout: Layout) -> None:
    """No ``quantization_config``: readers must see an ordinary model."""


def pack(name: str, codes: Codes) -> NoReturn:
    """Not called: the weights are written as the tuned model holds them."""
    raise NotImplementedError(name)


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> NoReturn:
    """Not called: nothing is packed."""
    raise NotImplementedError(name)


FORMAT = Format(
    name="fake",
    summary="dequantized weights in the source's dtype: everything that reads the source",
    bits=(2, 3, 4, 5, 6, 7, 8),
    check=check,
    pack=pack,
    unpack=unpack,
    config=config,
    parts=(),
)
