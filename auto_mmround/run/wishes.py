"""What a recipe says of layers by name: does it fit some, and does it change anything?"""

import difflib
from collections.abc import Collection, Mapping, Sequence

from transformers import PreTrainedModel

from auto_mmround.errors import UserError, several
from auto_mmround.export import formats
from auto_mmround.export.format import Format
from auto_mmround.model.structure import LINEAR
from auto_mmround.recipe.patterns import Patterns, matches
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.recipe.schemes import overridden

OUTSIDE, HEAD = "outside the quantized blocks", "output head"
TIED = "tied to the input embedding"
# Reason to stay that lies in a layer's place -> what would change that.
PLACES = {
    OUTSIDE: "leave the entry out; blocks of towers are quantized with --quant_nontext_module",
    HEAD: "--quant_lm_head quantizes it",
    TIED: "--quant_lm_head with --untie_lm_head quantizes it",
}


def check_patterns(recipe: Recipe, classes: Mapping[str, Sequence[str]]) -> None:
    patterns = Patterns(
        [*recipe.kept_patterns, *(recipe.targets or []), *(recipe.layer_config or {})]
    )
    met = {pattern for name, own in classes.items() for pattern in patterns.of(name, own)}
    for pattern in patterns.all:
        if pattern not in met:
            raise UserError(
                f"layer pattern {pattern!r} matches no linear layer; {_nearest(pattern, classes)}"
            )


def check_overrides(
    recipe: Recipe, reasons: Mapping[str, str | None], classes: Mapping[str, Sequence[str]]
) -> None:
    """Raises UserError where layer_config asks for bits of layers that all stay for their place.
    reasons: layer -> why it stays."""
    for pattern, names in _overridden(recipe, reasons, classes).items():
        reason = str(reasons[names[0]])
        if {reasons[name] for name in names} <= PLACES.keys() and overridden(
            recipe.scheme, (recipe.layer_config or {})[pattern], pattern
        ):
            raise UserError(
                f"layer_config {pattern!r}: {names[0]}{several(names)} would stay in 16 bits all"
                f" the same, {reason}: {PLACES[reason]}"
            )


def check_held(
    recipe: Recipe,
    reasons: Mapping[str, str | None],
    classes: Mapping[str, Sequence[str]],
    targets: Sequence[Format],
) -> None:
    """Raises UserError where no format holds any layer as layer_config asks for it, or as the
    scheme asks for all others, whatever their shapes; in 16 bits it would be the opposite of what
    was asked. reasons: layer that has a scheme -> why it stays."""
    asked = _overridden(recipe, reasons, classes)
    others = reasons.keys() - {name for names in asked.values() for name in names}
    wishes = {f"layer_config {pattern!r}": names for pattern, names in asked.items()}
    # without layer_config there is nothing to quantize then, and that is told
    unheld = any(fmt.holds(formats.fitted([fmt.name], recipe.scheme)) for fmt in targets)
    if asked and others and unheld:
        wishes["scheme"] = sorted(others)
    for wish, names in wishes.items():
        if all(reasons[name] for name in names):
            raise UserError(
                f"{wish}: {names[0]}{several(names)} would stay in 16 bits,"
                f" {reasons[names[0]]}; bits = 16 in layer_config says so"
            )


def _overridden(
    recipe: Recipe, layers: Collection[str], classes: Mapping[str, Sequence[str]]
) -> dict[str, list[str]]:
    """Pattern of layer_config -> those of the layers that it fits."""
    patterns, met = Patterns(recipe.layer_config or {}), dict[str, list[str]]()
    for name in layers:
        for pattern in patterns.of(name, classes[name]):
            met.setdefault(pattern, []).append(name)
    return met


def check_mappings(model: PreTrainedModel, recipe: Recipe, blocks: Sequence[str]) -> None:
    if recipe.mappings and recipe.equalize not in ("smoothquant", "awq"):
        raise UserError("mappings: nothing uses them; set equalize to smoothquant or awq")
    inside = [
        (name, module)
        for block in blocks
        for name, module in model.get_submodule(block).named_modules(prefix=block)
    ]
    layers = [name for name, module in inside if isinstance(module, LINEAR)]
    for patterns, source in recipe.mappings or []:
        for pattern, names in [
            (source, [name for name, _ in inside]),
            *((pattern, layers) for pattern in patterns),
        ]:
            if not any(matches(pattern, name) for name in names):
                raise UserError(
                    f"mappings: {pattern!r} matches nothing in the blocks;"
                    f" {_nearest(pattern, names)}"
                )


def _nearest(pattern: str, names: Collection[str]) -> str:
    parts = sorted(
        {part for name in names for part in name.split(".") if not part.isdigit()} | set(names)
    )
    near = difflib.get_close_matches(pattern.removeprefix("re:"), parts, n=3, cutoff=0.4)
    return f"nearest: {', '.join(near)}" if near else f"names look like {next(iter(names), '')}"
