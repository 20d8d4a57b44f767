"""Dequantized weights in the source's dtype: a plain Transformers checkpoint that loads
anywhere."""

from auto_mmround.export.format import Format
from auto_mmround.recipe.schemes import Scheme


def check(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why not: floats hold every weight, but nothing tells a reader to quantize activations."""
    return f"cannot state {scheme.act_bits}-bit activations" if scheme.act_bits < 16 else None


FORMATS = (
    Format(
        name="fake",
        summary="dequantized weights in the source's dtype: everything that reads the source",
        bits=(2, 3, 4, 5, 6, 7, 8),
        check=check,
        engines={"transformers": None},
    ),
)
