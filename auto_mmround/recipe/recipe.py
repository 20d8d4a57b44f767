"""The one typed configuration. Flags, keyword arguments, TOML and YAML are four ways to write it."""

import dataclasses
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from auto_mmround.errors import UserError
from auto_mmround.recipe import aliases, llm_compressor
from auto_mmround.recipe.schemes import FLOATS, Scheme
from auto_mmround.recipe.steps import PRESETS, STEPS, Steps
from auto_mmround.untrusted import TooLong, one_line, read_text, time_limit

ALGORITHMS = ("auto", "sign_round", "gptq", "rtn")
ORDERS = ("none", "weight", "group")
LAYER = "Linear"
DEVICE_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
EQUALIZERS = ("none", "smoothquant", "awq")
SCALE_DTYPES = ("fp16", "bf16", "fp32")
RECIPE_BYTES = 1 << 20
RECIPE_VALUES = 100_000
RECIPE_SECONDS = 5.0
YAML = partial(yaml.load, Loader=llm_compressor.Reader)  # a SafeLoader
PARSERS: dict[str, Callable[[str], Any]] = {".toml": tomllib.loads, ".yaml": YAML, ".yml": YAML, ".json": YAML}
# TOML's and YAML's own errors, and what YAML's constructors raise for a date or a number that is none.
MISREAD = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, OverflowError)

# Flags of the original whose effect upstream was nothing, or that we refuse on purpose: said, never swallowed.
REFUSED: dict[str, tuple[Any, str]] = {
    "adam": (False, "only sign descent is implemented; the original reports Adam slightly worse"),
    "enable_norm_bias_tuning": (False, "the original rounds biases to 4 bits here, which costs accuracy"),
}


@dataclass(frozen=True)
class Recipe:
    """What to quantize, how, on which samples, and where the result goes. Defaults are those of the original."""

    model: str = "Qwen/Qwen2-VL-2B-Instruct"
    # scheme
    bits: int = 4
    group_size: int = 128
    sym: bool = True
    data_type: str = "int"
    scale_dtype: str = "fp16"
    act_bits: int = 32
    act_dynamic: bool = True
    target_bits: float | None = None
    bit_options: str | list[int] = "2,3,4,8"
    layer_config: dict[str, dict[str, Any]] | None = None
    fp_layers: str = ""
    ignore: list[str] | None = None
    targets: list[str] | None = None
    sequential_targets: list[str] | None = None
    quant_nontext_module: bool = False
    quant_lm_head: bool = False
    to_quant_block_names: str | None = None
    # equalization
    equalize: str = "none"
    smoothing_strength: float = 0.8
    duo_scaling: bool = True
    mappings: list[list[Any]] | None = None
    # tuning
    algorithm: str = "auto"
    preset: str = "default"
    iters: int | None = None
    lr: float | None = None
    minmax_lr: float | None = None
    batch_size: int | None = None
    gradient_accumulate_steps: int = 1
    nblocks: int = 1
    dampening: float = 0.05
    actorder: str = "weight"
    block_size: int = 64
    true_sequential: bool = False
    retarget: bool = False
    fisher: bool = True
    enable_minmax_tuning: bool = True
    enable_quanted_input: bool = True
    not_use_best_mse: bool = False
    trim: float = 0.0
    polish: bool = False
    dynamic_max_gap: int = -1
    adam: bool = False
    enable_norm_bias_tuning: bool = False
    # calibration
    dataset: str | None = None
    collator: str | None = None
    extra_data_dir: str | None = None
    template: str | None = None
    processor: str | None = None
    nsamples: int = 128
    seqlen: int | None = None
    truncation: bool | None = None
    seed: int = 42
    on_bad_sample: str = "error"
    allow_url: bool = False
    # machine
    device: str = "0"
    device_map: str | None = None
    amp: bool = True
    model_dtype: str | None = None
    trust_remote_code: bool = False
    enable_torch_compile: bool = False
    low_gpu_mem_usage: bool = False
    stream: bool | None = None
    offload_states: bool = False
    low_cpu_mem_usage: bool = False
    low_cpu_mem_mode: int = 0
    low_cpu_mem_tmp_dir: str | None = None
    # result
    format: str = "auto_round"
    output_dir: str = "./tmp_autoround"
    overwrite: bool = False
    restart: bool = False
    sample_generation: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _coerce(field.name, getattr(self, field.name), HINTS[field.name]))
        _require(2 <= self.bits <= 8, f"bits = {self.bits}: 2 to 8 are possible")
        _require(self.group_size == -1 or self.group_size >= 1, f"group_size = {self.group_size}: -1 or at least 1")
        _require(self.scale_dtype in SCALE_DTYPES, f"scale_dtype = {self.scale_dtype!r}: one of {SCALE_DTYPES}")
        _require(self.algorithm in ALGORITHMS, f"algorithm = {self.algorithm!r}: one of {', '.join(ALGORITHMS)}")
        _require(self.preset in PRESETS, f"preset = {self.preset!r}: one of {', '.join(PRESETS)}")
        _require(self.act_bits in (8, 16, 32), f"act_bits = {self.act_bits}: 8, quantized by the engine, or 16 and 32")
        if self.data_type == "int" and (self.act_bits, self.bits, self.group_size) == (8, 8, 128):
            object.__setattr__(self, "group_size", -1)  # the default, which no W8A8 kernel takes
        _require(self.device_map in (None, *DEVICE_MAPS), f"device_map = {self.device_map!r}: {', '.join(DEVICE_MAPS)}")
        _require(self.on_bad_sample in ("error", "skip"), f"on_bad_sample = {self.on_bad_sample!r}: error or skip")
        _require(self.iters is None or self.iters >= 0, f"iters = {self.iters}: 0 (round to nearest) or more")
        _require(self.actorder in ORDERS, f"actorder = {self.actorder!r}: one of {', '.join(ORDERS)}")
        _require(self.dampening > 0, f"dampening = {self.dampening}: above 0")
        _require(self.equalize in EQUALIZERS, f"equalize = {self.equalize!r}: one of {', '.join(EQUALIZERS)}")
        _require(0 <= self.smoothing_strength <= 1, f"smoothing_strength = {self.smoothing_strength}: from 0 to 1")
        for name in ("ignore", "targets", "sequential_targets"):
            _require(_all_strings(getattr(self, name) or []), f"{name}: a list of names or re: patterns")
        shaped = all(len(pair) == 2 and _all_strings([*pair[0], pair[1]]) for pair in _mapping_pairs(self.mappings))
        _require(shaped, 'mappings: each is [["re:.*q_proj", ..], "re:.*input_layernorm"], readers before their source')
        patterns = [
            *self.kept_patterns,
            *(self.targets or []),
            *(self.sequential_targets or []),
            *(self.layer_config or {}),
        ]
        for pattern in [*patterns, *(name for pair in self.mappings or [] for name in [*pair[0], pair[1]])]:
            _require(is_pattern(pattern), f"{pattern[:80]!r} is no regular expression after re:")
        _require(self.batch >= 1, f"batch_size = {self.batch_size}: at least 1")
        for name in ("gradient_accumulate_steps", "nsamples", "nblocks", "block_size"):
            _require(getattr(self, name) >= 1, f"{name} = {getattr(self, name)}: at least 1")
        for name, (allowed, why) in REFUSED.items():
            _require(getattr(self, name) == allowed, f"{name} = {getattr(self, name)!r} is refused: {why}")

        static = "act_dynamic = false is for FP8 by channel with act_bits = 8, as scheme = FP8_STATIC has it"
        _require(self.act_dynamic or (self.data_type, self.act_bits, self.group_size) == ("fp8", 8, -1), static)
        static_inputs = ("act_dynamic = false", not self.act_dynamic)
        for name, asked in (("equalize", self.equalize != "none"), ("polish", self.polish), static_inputs):
            _require(not (asked and self.streams), f"{name} needs the whole model in memory: no streaming")
        _require(not (self.retarget and self.in_turn), "retarget and true_sequential exclude one another")
        _require(0 <= self.trim < 0.5, f"trim = {self.trim}: a share of the errors, from 0 to below 0.5")
        _require(not self.polish or self.data_type == "int", "polish tunes scales of integers; data_type must be int")
        self._check_mixed()
        if self.data_type != "int":
            self._check_float()

    def _check_mixed(self) -> None:
        try:
            options = self.mixable
        except ValueError:
            options = ()
        valid = options and all(isinstance(bits, int) and 2 <= bits <= 8 for bits in options)
        _require(bool(valid), f"bit_options = {self.bit_options!r}: a comma list of 2 to 8, such as 2,3,4,8")
        if self.target_bits is not None:
            _require(self.data_type == "int", "target_bits mixes integers; data_type must be int")
            least = f"above {min(options)}, the least of bit_options; scales and zero points count"
            _require(self.target_bits > min(options), f"target_bits = {self.target_bits:g}: {least}")

    def _check_float(self) -> None:
        kinds = ", ".join(["int", *FLOATS])
        _require(self.data_type in FLOATS, f"data_type = {self.data_type!r}: one of {kinds}")
        bits, groups = FLOATS[self.data_type]
        fits = self.bits == bits and self.group_size in groups and self.sym
        sizes = " or ".join(map(str, groups))
        _require(fits, f"data_type {self.data_type} is symmetric with bits = {bits} and group_size = {sizes}")
        _require(
            not self.calibrates, f"data_type {self.data_type} is rounded to nearest only: algorithm rtn or iters 0"
        )

    @property
    def formats(self) -> list[str]:
        """Names of the export formats, in the order given, without repeats."""
        return list(dict.fromkeys(part.strip() for part in self.format.split(",") if part.strip()))

    @property
    def scheme(self) -> Scheme:
        """The scheme of every weight without an override in ``layer_config``."""
        return Scheme(
            self.bits, self.group_size, self.sym, self.data_type, self.scale_dtype, min(self.act_bits, 16),
            act_dynamic=self.act_dynamic,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        """Sign steps a block."""
        return self._usual.iters if self.iters is None or self.algorithm == "gptq" else self.iters

    @property
    def learning_rate(self) -> float | None:
        """First learning rate; None is 1/steps."""
        return self.lr or self._usual.lr

    @property
    def batch(self) -> int:
        """Samples that run together; times `gradient_accumulate_steps`, those of a sign step."""
        return self._usual.batch if self.batch_size is None else self.batch_size

    @property
    def _usual(self) -> Steps:
        return PRESETS[self.preset] if self.algorithm == "auto" else STEPS[self.algorithm]

    @property
    def kept_patterns(self) -> list[str]:
        """Patterns of the layers that stay in 16 bits: `fp_layers` and `ignore`."""
        return [part.strip() for part in self.fp_layers.split(",") if part.strip()] + (self.ignore or [])

    @property
    def streams(self) -> bool | None:
        """Whether blocks are read when their turn comes; None: where the model does not fit."""
        asked = self.low_cpu_mem_usage or self.low_cpu_mem_mode != 0
        return True if asked and self.stream is None else self.stream

    @property
    def mixable(self) -> tuple[int, ...]:
        """`bit_options`, growing."""
        options = self.bit_options.split(",") if isinstance(self.bit_options, str) else self.bit_options
        return tuple(sorted({int(option) for option in options}))

    @property
    def needs_samples(self) -> bool:
        """Whether calibration samples are read: to tune, to choose bits, or to see which channels, or inputs, are
        large."""
        return self.calibrates or self.whole_passes

    @property
    def whole_passes(self) -> bool:
        """Whether something works all over the model, before any block is quantized or after all are."""
        return self.polish or self.equalize != "none" or self.target_bits is not None or not self.act_dynamic

    @property
    def block_classes(self) -> list[str]:
        """Classes of the blocks to quantize, of `sequential_targets`; none: stages are chosen by other keys."""
        return [name for name in self.sequential_targets or [] if name != LAYER]

    @property
    def in_turn(self) -> bool:
        """Whether the closed form takes a block's layers one after another: llm-compressor says it by a layer's class
        among the `sequential_targets`."""
        return self.true_sequential or LAYER in (self.sequential_targets or [])

    @property
    def closed_form(self) -> bool:
        """Whether weights start from a GPTQ solution."""
        return self.algorithm == "gptq" or (self.algorithm == "auto" and self.steps > 0)

    @property
    def calibrates(self) -> bool:
        """False when the weights are only rounded to nearest: `rtn`, or as in the original 0 iterations."""
        return self.closed_form or (self.algorithm == "sign_round" and self.steps > 0)


HINTS = typing.get_type_hints(Recipe)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"recipe: {message}")


def _all_strings(values: list[Any]) -> bool:
    return all(isinstance(value, str) for value in values)


def _mapping_pairs(mappings: Any) -> list[Any]:
    """Entries that have the outer form of a mapping; others as an empty one, which has the wrong length."""
    return [m if isinstance(m, list) and m and isinstance(m[0], list) and m[0] else [] for m in mappings or []]


def _coerce(name: str, value: Any, hint: Any) -> Any:
    """Check ``value`` against the field's type; an int is welcome where a float is expected, nothing else bends."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = tuple(typing.get_origin(option) or option for option in options)
    if isinstance(value, int) and not isinstance(value, bool) and float in plain and int not in plain:
        value = float(value) if abs(value) < 2**53 else math.inf
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"recipe: {name} = {value} is no finite number")
    if (isinstance(value, bool) and bool not in plain) or not isinstance(value, plain):
        expected = " or ".join("nothing" if p is type(None) else p.__name__ for p in plain)
        raise UserError(f"recipe: {name} = {value!r} is a {type(value).__name__}, expected {expected}")
    return value


def from_mapping(values: dict[str, Any], where: str = "recipe", base: Recipe | None = None) -> Recipe:
    """A recipe from plain values; names of other tools are welcome (`aliases`). Unknown keys raise UserError with the
    nearest known name."""
    return dataclasses.replace(base or Recipe(), **aliases.resolve(values, where, HINTS))


def read(path: str | Path) -> dict[str, Any]:
    """The keys of a TOML, YAML or JSON recipe file; sections only group keys, and `layer_config` is a table.

    A recipe of llm-compressor is translated.
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
        raise UserError(f"recipe file {path}: reading it takes more than {RECIPE_SECONDS:.0f} seconds") from None
    except (*MISREAD, RecursionError) as error:
        raise UserError(f"recipe file {path}: {one_line(str(error))[:400] or 'is nested too deep'}") from None
    _require(_small(tree), f"{path} holds more than {RECIPE_VALUES:,} values (a YAML alias counts as what it repeats)")
    if not isinstance(tree, dict):
        raise UserError(f"recipe file {path}: expected keys and values")
    if llm_compressor.is_recipe(tree):
        return llm_compressor.translate(tree, f"recipe file {path}")
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= value if isinstance(value, dict) and key != "layer_config" else {key: value}
    return flat


def _small(tree: Any) -> bool:
    """Whether a tree, its repeated parts counted each time, has no more than RECIPE_VALUES values."""
    left, count = [tree], 0
    while left and count <= RECIPE_VALUES:
        value, count = left.pop(), count + 1
        left += value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    return count <= RECIPE_VALUES


def to_toml(recipe: Recipe) -> str:
    """The resolved recipe, every key, as TOML that `read` takes back unchanged (unset keys are left out)."""
    values = dataclasses.asdict(recipe)
    layers = values.pop("layer_config") or {}
    lines = [f"{key} = {_literal(value)}" for key, value in values.items() if value is not None]
    for name, options in layers.items():
        lines += ["", f"[layer_config.{json.dumps(name)}]"]
        lines += [f"{key} = {_literal(value)}" for key, value in options.items()]
    return "\n".join(lines) + "\n"


def _literal(value: Any) -> str:
    # A JSON string is a TOML basic string; repr gives shortest floats, which TOML reads except for "1e-05"-like ones
    # without a point, and those it reads too.
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def is_pattern(pattern: str) -> bool:
    """Whether `matches` can take it."""
    try:
        return not pattern.startswith("re:") or bool(re.compile(pattern[3:]))
    except (re.error, OverflowError, RecursionError):
        return False


def matches(pattern: str, name: str) -> bool:
    """`re:` patterns match anywhere from the start, others must be the name, its end after a dot, or its class.

    The original matched any substring; whole dotted parts keep `--fp_layers q_proj` working without surprises.
    """
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return f".{pattern}." in f".{name}."
