"""Recipe files: TOML, YAML and JSON to keys, and a recipe to TOML."""

import dataclasses
import json
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from auto_mmround.errors import UserError
from auto_mmround.recipe import llm_compressor
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.untrusted import TooLong, one_line, read_text, time_limit

RECIPE_BYTES = 1 << 20
RECIPE_VALUES = 100_000
RECIPE_SECONDS = 5.0
YAML = partial(yaml.load, Loader=llm_compressor.RecipeLoader)  # a SafeLoader
PARSERS: dict[str, Callable[[str], Any]] = {
    ".toml": tomllib.loads,
    ".yaml": YAML,
    ".yml": YAML,
    ".json": YAML,
}
# TOML's and YAML's own errors, and the errors of YAML's constructors for a bad date or number.
MISREAD = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError)


def read(path: str | Path) -> dict[str, Any]:
    """The keys of a TOML, YAML or JSON recipe file.

    Sections only group keys; `layer_config` is a table. A recipe of llm-compressor is translated.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"recipe file {path} does not exist")
    parse = PARSERS.get(path.suffix)
    if parse is None:
        raise UserError(f"recipe file {path}: the name must end in {', '.join(PARSERS)}")
    text = read_text(path, f"recipe file {path}", RECIPE_BYTES)
    try:
        with time_limit(RECIPE_SECONDS):
            tree = parse(text)
    except TooLong:
        raise UserError(
            f"recipe file {path}: reading it takes more than {RECIPE_SECONDS:.0f} seconds"
        ) from None
    except (*MISREAD, RecursionError) as error:
        raise UserError(
            f"recipe file {path}: {one_line(str(error))[:400] or 'is nested too deep'}"
        ) from None
    if not _small(tree):
        what = f"more than {RECIPE_VALUES:,} values (a YAML alias counts as what it repeats)"
        raise UserError(f"recipe file {path}: {what}")
    if not isinstance(tree, dict):
        raise UserError(f"recipe file {path}: expected keys and values")
    if llm_compressor.is_recipe(tree):
        return llm_compressor.translate(tree, f"recipe file {path}")
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= value if isinstance(value, dict) and key != "layer_config" else {key: value}
    return flat


def _small(tree: Any) -> bool:
    """Whether a tree has at most RECIPE_VALUES values; repeated parts count each time."""
    left, count = [tree], 0
    while left and count <= RECIPE_VALUES:
        value, count = left.pop(), count + 1
        left += (
            value.values()
            if isinstance(value, dict)
            else value
            if isinstance(value, (list, tuple, set))
            else ()
        )
    return count <= RECIPE_VALUES


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe as TOML that `read` takes back unchanged; unset keys are left out."""
    values = dataclasses.asdict(recipe)
    layers = values.pop("layer_config") or {}
    lines = [f"{key} = {_literal(value)}" for key, value in values.items() if value is not None]
    for name, options in layers.items():
        lines += ["", f"[layer_config.{json.dumps(name)}]"]
        lines += [f"{key} = {_literal(value)}" for key, value in options.items()]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    # A JSON string is a TOML basic string. repr gives the shortest floats; TOML reads them all.
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
