"""All export formats: by name, by a run's schemes, and by what a checkpoint says of itself.

A format is a file here, or a folder with a file `format`, that has its `FORMATS`.
"""

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from auto_mmround.errors import UserError
from auto_mmround.export import config_check, method
from auto_mmround.export.format import Format
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.untrusted import TooLong, time_limit

PATTERN_SECONDS = 30.0


def by_name() -> dict[str, Format]:
    """All by name, AutoRound's own first: they are the default."""
    room = iter_modules(import_module(str(__package__)).__path__)
    files = [f"{file.name}.format" if file.ispkg else file.name for file in room]
    modules = [import_module(f"{__package__}.{name}") for name in files if name != "formats"]
    every = [fmt for module in modules for fmt in getattr(module, "FORMATS", ())]
    return {fmt.name: fmt for fmt in sorted(every, key=lambda fmt: "auto_round" not in fmt.name)}


FORMATS: dict[str, Format] = by_name()


def get(name: str) -> Format:
    """The format of that exact name. Raises UserError with the nearest names."""
    if name in FORMATS:
        return FORMATS[name]
    near = difflib.get_close_matches(name, FORMATS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(FORMATS)}"
    raise UserError(f"unknown export format {name!r}: {hint}")


def resolve(name: str, schemes: Iterable[Scheme]) -> Format:
    """The format to write for these schemes: under ``auto_round`` and ``compressed_tensors`` there
    are several."""
    fmt = get(name)
    return fmt.choose(set(schemes)) if fmt.choose else fmt


def check_kv_cache(names: Iterable[str]) -> None:
    """Raises UserError for a format that has no place for scales of keys and values."""
    for fmt in map(get, names):
        if not fmt.kv_cache:
            able = next(name for name, other in FORMATS.items() if other.kv_cache)
            raise UserError(
                f"kv_cache_scheme: format {fmt.name} has no place for scales of keys and values,"
                f" {able} has"
            )


def check_schemes(names: Iterable[str], schemes: Collection[Scheme]) -> None:
    """Raises UserError for a format that holds none of a recipe's schemes, whatever the model."""
    for name in names:
        fmt = resolve(name, schemes)
        ordered = sorted(schemes, key=Scheme.stored)
        problems = [fmt.holds(fitted([name], scheme)) for scheme in ordered]
        if problems and all(problems):
            raise UserError(f"nothing to quantize: {fmt.name} {problems[0]}")


def fitted(names: Iterable[str], scheme: Scheme) -> Scheme:
    """The scheme with the grid that every one of these formats stores exactly: its smallest zero
    point, the significant bits of its scales, and their range in super-blocks.

    A float16 has 11 bits. scale * zero is exact if the bits of the scale and of the zero point fit
    into them. Formats that pack nothing hold whatever was tuned. A range is set where all others
    have that one.
    """
    targets = [resolve(name, [scheme]) for name in names]
    ranges = {fmt.scale_range for fmt in targets if fmt.packs}
    how = {fmt.act_how for fmt in targets if fmt.packs and scheme.act_bits < 16}
    scheme = replace(
        scheme,
        scale_range=ranges.pop() if len(ranges) == 1 else None,
        act_how=how.pop() if len(how) == 1 else scheme.act_how,
    )
    if scheme.sym:
        return scheme
    return replace(
        scheme,
        min_zero=max((fmt.min_zero for fmt in targets), default=0),
        scale_bits=11 - scheme.bits if any(fmt.fused_zero for fmt in targets) else None,
    )


def problem(quantization_config: Any) -> str | None:
    """Why this can't be the configuration of a quantized checkpoint, whatever its method; None if
    it can."""
    methods = [fmt.method for fmt in FORMATS.values() if fmt.method]
    form = {key: test for each in methods for key, test in each.form.items()}
    return config_check.problem(quantization_config, form)


def of_method(quantization_config: Mapping[str, Any]) -> list[Format]:
    """The formats of the method that a configuration names; none for one that is not known."""
    # MLX names a mode only
    name = quantization_config.get("quant_method", quantization_config.get("mode"))
    return [fmt for fmt in FORMATS.values() if fmt.method and fmt.method.name == name]


def from_config(quantization_config: Mapping[str, Any]) -> Format:
    """The format a checkpoint's ``quantization_config`` announces. Raises UserError for one we
    cannot read."""
    if wrong := problem(quantization_config):
        raise UserError(wrong)
    candidates = of_method(quantization_config)
    said = quantization_config.get("quant_method", quantization_config.get("mode"))
    if not candidates:
        known = dict.fromkeys(fmt.method.name for fmt in FORMATS.values() if fmt.method)
        raise UserError(f"cannot read quantization method {said!r}; known: {', '.join(known)}")
    stated = {
        key: str(quantization_config.get(key) or "").lower()
        for fmt in candidates
        for key in fmt.told
    }
    for fmt in candidates:
        if all(stated[key] in values for key, values in fmt.told.items()):
            return fmt
    may = {key: [v for fmt in candidates for v in fmt.told.get(key, ())] for key in stated}
    key = next((key for key, values in may.items() if stated[key] not in values), next(iter(may)))
    only = ", ".join(repr(value) for value in may[key] if value)
    raise UserError(f"cannot read quant_method {said!r} with {key} {stated[key]!r}, only {only}")


def entries(quantization_config: Mapping[str, Any]) -> list[str]:
    """Every name, prefix and pattern that the configuration uses to say what is quantized and what
    is not."""
    keys = [key for fmt in of_method(quantization_config)[:1] for key in _method(fmt).listed]
    return method.entries(quantization_config, keys)


def unread(quantization_config: Mapping[str, Any], activations: bool) -> str | None:
    """What a configuration asks engines to compute that our reader does not, or None. activations:
    of inputs, keys and values too. Raises UserError as `from_config` does."""
    return _method(from_config(quantization_config)).unread(quantization_config, activations)


def scheme_of(quantization_config: Mapping[str, Any], name: str) -> Scheme:
    """The scheme of one quantized module by the checkpoint's name; raises UserError if there is
    none, or for one that is not read."""
    return reader(quantization_config)(name)


def reader(quantization_config: Mapping[str, Any]) -> Callable[[str], Scheme]:
    """`scheme_of` for many names. Raises UserError for a method that is not known."""
    return _method(from_config(quantization_config)).schemes(quantization_config)


def _method(fmt: Format) -> method.Method:
    assert fmt.method is not None  # it was found by it
    return fmt.method


def schemes_of(quantization_config: Mapping[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
    """`scheme_of` for each name; those that the configuration has none for are left out.

    Raises UserError for patterns that take so long that they must be made for it.
    """
    schemes = {}
    try:
        with time_limit(PATTERN_SECONDS), suppress(UserError, KeyError):
            scheme = reader(quantization_config)
            for name in names:
                with suppress(UserError, KeyError):
                    schemes[name] = scheme(name)
    except TooLong:
        raise UserError("quantization_config: its patterns take too long to match") from None
    return schemes
