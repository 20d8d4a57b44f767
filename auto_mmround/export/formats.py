"""The registry of export formats: by name, by a run's schemes, and by what a checkpoint says of
itself."""

import difflib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

from auto_mmround.errors import UserError
from auto_mmround.export import auto_awq, auto_gptq, auto_round, config_check, fake, mlx
from auto_mmround.export.compressed_tensors import format as compressed_tensors
from auto_mmround.export.format import Format, Layout
from auto_mmround.export.gguf import format as gguf
from auto_mmround.export.openvino import format as openvino
from auto_mmround.export.patterns import Lookup
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.untrusted import TooLong, time_limit

__all__ = [
    "FORMATS",
    "Format",
    "Layout",
    "from_config",
    "get",
    "min_zero",
    "reader",
    "resolve",
    "scale_bits",
    "scale_range",
    "scheme_of",
]

FORMATS: dict[str, Format] = {
    fmt.name: fmt
    for fmt in (
        auto_round.PLAIN,
        auto_round.GPTQ,
        auto_round.AWQ,
        auto_gptq.FORMAT,
        auto_awq.FORMAT,
        compressed_tensors.WORDS,
        compressed_tensors.INT8,
        compressed_tensors.FLOAT,
        fake.FORMAT,
        mlx.FORMAT,
        openvino.FORMAT,
        *gguf.FORMATS,
    )
}


PATTERN_SECONDS = 30.0


def get(name: str) -> Format:
    """The format of that exact name. Raises UserError with the nearest names."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FORMATS)}"
    raise UserError(f"unknown export format {name!r}: {hint}")


def resolve(name: str, schemes: Iterable[Scheme]) -> Format:
    """The format to write for these schemes: ``auto_round`` and ``compressed_tensors`` choose their
    packing.

    ``auto_round``, all symmetric: GPTQ's packing; all asymmetric 4 bit with one group size: AWQ's;
    else zero points as they are. ``compressed_tensors``: packed words, int8 beside 8-bit
    activations, or floats.
    """
    fmt, used = get(name), set(schemes)
    if fmt is compressed_tensors.WORDS and any(scheme.data_type != "int" for scheme in used):
        return compressed_tensors.FLOAT
    if fmt is compressed_tensors.WORDS and any(scheme.act_bits < 16 for scheme in used):
        return compressed_tensors.INT8
    if fmt is not auto_round.PLAIN or not used:
        return fmt
    if all(scheme.sym for scheme in used):
        return auto_round.GPTQ
    awq_holds = all(
        s.bits == 4 and not s.sym and s.group_size in auto_awq.GROUP_SIZES for s in used
    )
    return auto_round.AWQ if awq_holds else auto_round.PLAIN


def min_zero(names: Iterable[str], scheme: Scheme) -> int:
    """The smallest zero point that every one of these formats can hold, for the tuner's grid."""
    return max((resolve(name, [scheme]).min_zero for name in names), default=0)


def scale_bits(names: Iterable[str], scheme: Scheme) -> int | None:
    """How many significant bits a scale may have so that every one of these formats stores it
    exactly; None: all.

    A float16 has 11: scale * zero keeps them if the scale leaves room for the bits of the zero
    point.
    """
    fused = not scheme.sym and any(resolve(name, [scheme]).fused_zero for name in names)
    return 11 - scheme.bits if fused else None


def scale_range(names: Iterable[str]) -> tuple[int, int] | None:
    """Bounds of the scales' integers in super-blocks, for the tuner's grid; None unless all of
    these formats have such.

    Formats that pack nothing hold whatever was tuned.
    """
    found = {fmt.scale_range for fmt in map(get, names) if fmt.parts}
    return found.pop() if len(found) == 1 else None


_BY_METHOD = {
    "gptq": "auto_gptq",
    "awq": "auto_awq",
    "affine": "mlx",
    "gguf": "gguf",
    "openvino": "openvino",
    "compressed-tensors": "compressed_tensors",
}

# Keys by which a method names its layouts, and the one that is read. AutoAWQ says version,
# GPTQModel both.
_LAYOUTS = {
    "gptq": {"checkpoint_format": "gptq"},
    "awq": {"checkpoint_format": "gemm", "version": "gemm"},
}


def from_config(quantization_config: Mapping[str, Any]) -> Format:
    """The format a checkpoint's ``quantization_config`` announces. Raises UserError for one we
    cannot read."""
    if wrong := config_check.problem(quantization_config):
        raise UserError(wrong)
    # MLX names a mode only
    method = quantization_config.get("quant_method", quantization_config.get("mode"))
    packing = quantization_config.get("packing_format", "auto_round:auto_gptq")
    name = packing if method == "auto-round" else _BY_METHOD.get(str(method))
    for key, layout in _LAYOUTS.get(str(method), {}).items():
        if (stated := str(quantization_config.get(key) or layout).lower()) != layout:
            raise UserError(
                f"cannot read quant_method {method!r} with {key} {stated!r}, only {layout!r}"
            )
    if name not in FORMATS:
        raise UserError(
            f"cannot read quantization method {method!r}, packing {packing!r}; known:"
            f" {', '.join(FORMATS)}"
        )
    return FORMATS[name]


def scheme_of(quantization_config: Mapping[str, Any], name: str) -> Scheme:
    """The scheme of one quantized module by the checkpoint's name; raises UserError if there is
    none, or for one that is not read."""
    return reader(quantization_config)(name)


def reader(quantization_config: Mapping[str, Any]) -> Callable[[str], Scheme]:
    """`scheme_of` for many names: the configuration's default with the first override that fits;
    groups in the order of `compressed-tensors`: name, pattern, class."""
    if "config_groups" in quantization_config:
        return compressed_tensors.reader(quantization_config)
    base = {
        "bits": quantization_config["bits"],
        "group_size": quantization_config["group_size"],
        "sym": quantization_config.get("sym", not quantization_config.get("zero_point", False)),
    }
    extra = quantization_config.get("extra_config") or {}
    dynamic = quantization_config.get("dynamic") or {}
    named = {
        **{key: value for key, value in quantization_config.items() if isinstance(value, Mapping)},
        **extra,
    }
    names, patterns = list(named), [key for key in extra if "*" in key]
    rules = [key for key in dynamic if key[:2] == "+:"]
    found = [*named.values(), *(extra[key] for key in patterns)]
    places, later = Lookup(names, patterns, anywhere=True), Lookup([], [key[2:] for key in rules])

    def scheme(name: str) -> Scheme:
        place, rule = places.first(name), later.first(name)
        own = found[place] if place is not None else {} if rule is None else dynamic[rules[rule]]
        return Scheme(**{key: own.get(key, value) for key, value in base.items()})

    return scheme


def schemes_of(quantization_config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """`scheme_of` for each name; those that the configuration has none for are left out.

    Raises UserError for patterns that take so long that they must be made for it.
    """
    found = {}
    try:
        with time_limit(PATTERN_SECONDS), suppress(UserError, KeyError):
            scheme = reader(quantization_config)
            for name in names:
                with suppress(UserError, KeyError):
                    found[name] = scheme(name)
    except TooLong:
        raise UserError("quantization_config: its patterns take too long to match") from None
    return found
