"""The one typed configuration: flags, keyword arguments, TOML and YAML write the same recipe."""

import dataclasses
import os
import typing
from dataclasses import dataclass
from itertools import chain
from typing import Any

from auto_mmround.readers import READERS
from auto_mmround.recipe import aliases
from auto_mmround.recipe.algorithms import ALGORITHMS, Algorithm, Steps
from auto_mmround.recipe.checks import all_strings, coerce, mapping_pairs, require
from auto_mmround.recipe.fields import Fields, Key
from auto_mmround.recipe.patterns import is_pattern
from auto_mmround.recipe.schemes import (
    FLOATS,
    OTHER_INPUTS,
    SCHEMES,
    Option,
    Scheme,
    of_option,
    overridden,
)
from auto_mmround.untrusted import shown

LAYER = "Linear"
# Flags of the original that had no effect there, or that we refuse. Each gives a message.
REFUSED: dict[str, tuple[Any, str]] = {
    "adam": (False, "only sign descent is implemented; the original reports Adam slightly worse"),
    "enable_norm_bias_tuning": (
        False,
        "the original rounds biases to 4 bits here, which costs accuracy",
    ),
}


@dataclass(frozen=True)
class Recipe(Fields):
    """Model, scheme, algorithm, samples and output of a run.

    Raises UserError for wrong values, and for values that contradict each other.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(
                self, field.name, coerce(field.name, getattr(self, field.name), HINTS[field.name])
            )
            KEYS[field.name].check(field.name, getattr(self, field.name))
        if self.data_type == "int" and (self.act_bits, self.bits, self.group_size) == (8, 8, 128):
            object.__setattr__(self, "group_size", -1)  # no W8A8 kernel takes the default
        if self.act_data_type == self.data_type:
            object.__setattr__(self, "act_data_type", None)
        object.__setattr__(self, "output_dir", os.path.expanduser(self.output_dir))
        self._check_ranges()
        self._check_names()
        self._check_mixed()
        self._check_together()
        if self.data_type != "int":
            self._check_float()

    def _check_ranges(self) -> None:
        """Values that are wrong by themselves."""
        whole = (-1, 0) if self.data_type == "fp8" else (-1,)
        for name, fits, allowed in (
            ("bits", 2 <= self.bits <= 8, "2 to 8 are possible"),
            ("group_size", self.group_size in whole or self.group_size >= 1,
             "-1 or at least 1, for fp8 also 0"),
            ("act_bits", self.act_bits in (4, 8, 16, 32),
             "8 or 4, quantized by the engine, or 16 and 32"),
            ("iters", self.iters is None or self.iters >= 0, "0 (round to nearest) or more"),
            ("dampening", self.dampening > 0, "above 0"),
            ("smoothing_strength", 0 <= self.smoothing_strength <= 1, "from 0 to 1"),
            ("batch_size", self.batch >= 1, "at least 1"),
            ("lr", (self.lr or 0) >= 0, "0 (the usual one) or more"),
            ("minmax_lr", (self.minmax_lr or 0) >= 0, "0 (that of lr) or more"),
            ("seed", 0 <= self.seed < 2**63, "from 0 to below 2^63"),
            ("trim", 0 <= self.trim < 0.5, "a share of the errors, from 0 to below 0.5"),
        ):  # fmt: skip
            require(fits, f"{name} = {getattr(self, name)}: {allowed}")
        for name, (allowed, why) in REFUSED.items():
            value = getattr(self, name)
            require(value == allowed, f"{name} = {value!r} is refused: {why}")
        require(
            bool(self.output_dir.strip()),
            "output_dir is empty: name a folder, or . for the current one",
        )
        require("\0" not in self.output_dir, "output_dir holds a NUL, which no name can")

    def _check_names(self) -> None:
        """The form of lists and tables of names, and of each pattern in them."""
        for name in ("ignore", "targets", "sequential_targets"):
            require(
                all_strings(getattr(self, name) or []), f"{name}: a list of names or re: patterns"
            )
        shaped = all(
            len(pair) == 2 and all_strings([*pair[0], pair[1]])
            for pair in mapping_pairs(self.mappings)
        )
        require(
            shaped,
            'mappings: each is [["re:.*q_proj", ..], "re:.*input_layernorm"], readers before their'
            " source",
        )
        layers = self.layer_config or {}
        tables = all_strings([*layers]) and all(isinstance(each, dict) for each in layers.values())
        require(
            tables,
            'layer_config: each entry is a pattern with a table, such as {"q_proj": {"bits": 8}}',
        )
        lists = (self.kept_patterns, self.targets or [], self.sequential_targets or [], layers)
        mapped = ((*pair[0], pair[1]) for pair in self.mappings or [])
        for pattern in chain(*lists, *mapped):
            require(is_pattern(pattern), f"{pattern[:80]!r} is no regular expression after re:")
        for name in self.read_by:
            known = name in READERS
            require(known, f"engines: no engine {shown(name)}; there are {', '.join(READERS)}")

    def _check_together(self) -> None:
        """Values that contradict each other."""
        require(
            self.act_bits != 4 or self.data_type in ("nvfp4", "mxfp4"),
            f"act_bits = 4 is for data_type nvfp4 and mxfp4, not {self.data_type}",
        )
        if self.act_data_type is not None:
            bits = OTHER_INPUTS.get(self.data_type, {}).get(self.act_data_type, ())
            require(
                self.act_bits == 8 and self.sym and self.bits in bits,
                f"act_data_type = {shown(self.act_data_type)}: there is fp8 of 8 bits beside"
                " symmetric integers of 4, as scheme = W4AFP8 has it",
            )
        static_fp8 = (self.data_type, self.act_bits) == ("fp8", 8) and self.group_size < 1
        require(
            self.act_dynamic or static_fp8,
            "act_dynamic = false is for FP8 by channel or tensor with act_bits = 8, as scheme ="
            " FP8_STATIC has it",
        )
        for name, instead in self._on_the_whole().items():
            text = f"{name} needs the whole model in memory: no streaming; {instead}"
            require(not self.streams, text)
        alone = self.untie_lm_head and not (self.quant_lm_head or self.equalize == "hadamard")
        require(not alone, "untie_lm_head is for a head that is quantized: set quant_lm_head")
        both = self.retarget and self.in_turn
        require(not both, "retarget and true_sequential exclude one another")
        other = next((s.data_type for s in self.schemes if s.data_type != "int"), None)
        require(
            not (self.polish and other),
            f"polish tunes scales of integers, not those of {other}; leave polish out",
        )

    def _on_the_whole(self) -> dict[str, str]:
        """What of the recipe works on the whole model -> what to use where that does not fit."""
        nearest_cache = self.kv_cache_scheme is not None and not self.calibrates
        steps = {
            "equalize": (self.equalize != "none", "use no equalization"),
            "polish": (self.polish, "leave it out"),
            "target_bits": (self.target_bits is not None, "name bits in layer_config"),
            **self._inputs_first(),
            "kv_cache_scheme, rounded to nearest,": (nearest_cache, "tune the layers"),
        }
        return {name: instead for name, (asked, instead) in steps.items() if asked}

    def _inputs_first(self) -> dict[str, tuple[bool, str]]:
        """Where inputs of layers are measured on the whole model, by what the recipe asks for."""
        if not self.inputs_first:
            return {}
        scheme, other = "act_dynamic = false", "FP8"
        if any(each.data_type == "nvfp4" and each.inputs_measured for each in self.schemes):
            scheme, other = "nvfp4 with 4-bit inputs", "NVFP4A16"
        name, instead = f"{scheme}, rounded to nearest,", "tune the layers"
        if self.calibrates:
            name, instead = f"quant_lm_head with {scheme}", "leave quant_lm_head out"
        return {name: (True, f"{instead}, or use {other}")}

    def _check_mixed(self) -> None:
        options = self._options
        valid = options and all(
            2 <= option <= 8 if isinstance(option, int) else option in SCHEMES for option in options
        )
        require(
            bool(valid),
            f"bit_options = {self.bit_options!r}: a comma list of 2 to 8, such as 2,3,4,8, and of"
            " schemes, such as NVFP4,FP8",
        )
        if self.target_bits is not None:
            whole = any(isinstance(option, int) for option in options)
            require(
                self.data_type == "int" or not whole,
                f"bit_options = {self.bit_options!r}: numbers are bits of integers, and data_type"
                f" is {self.data_type}; name schemes, such as NVFP4,FP8",
            )
            bits = min(scheme.bits for scheme in self.schemes)
            least = f"above {bits}, the least of bit_options; scales and zero points count"
            require(self.target_bits > bits, f"target_bits = {self.target_bits:g}: {least}")

    def _check_float(self) -> None:
        names = ", ".join(["int", *FLOATS])
        require(self.data_type in FLOATS, f"data_type = {self.data_type!r}: one of {names}")
        bits, groups = FLOATS[self.data_type]
        fits = self.bits == bits and self.group_size in groups and self.sym
        sizes = " or ".join(map(str, groups))
        require(
            fits,
            f"data_type {self.data_type} is symmetric with bits = {bits} and group_size = {sizes}",
        )

    @property
    def formats(self) -> list[str]:
        """Names of the export formats in the given order, each once."""
        return list(dict.fromkeys(part.strip() for part in self.format.split(",") if part.strip()))

    @property
    def read_by(self) -> list[str]:
        """Names of the engines that must read the result."""
        return list(dict.fromkeys(part.strip() for part in self.engines.split(",") if part.strip()))

    @property
    def scheme(self) -> Scheme:
        """The scheme of every weight without an override in ``layer_config``; where `bit_options`
        names schemes alone, the smallest of them."""
        if self.target_bits is not None and not isinstance(self.mixable[0], int):
            return of_option(self._plain, self.mixable[0])
        return self._plain

    @property
    def _plain(self) -> Scheme:
        return Scheme(
            self.bits, self.group_size, self.sym, self.data_type, self.scale_dtype,
            min(self.act_bits, 16),
            act_dynamic=self.act_dynamic,
            act_data_type=self.act_data_type,
        )  # fmt: skip

    @property
    def schemes(self) -> set[Scheme]:
        """All that weights may come to have, before formats are asked."""
        base = self.scheme
        if self.target_bits is not None:
            return {of_option(self._plain, option) for option in self.mixable}
        own = (overridden(base, each, name) for name, each in (self.layer_config or {}).items())
        return {base, *(scheme for scheme in own if scheme)}

    @property
    def steps(self) -> int:
        """Sign steps per block."""
        return self._usual.iters if self.iters is None or not self.how.steps else self.iters

    @property
    def gradients(self) -> int:
        """Gradients of the model's output, for the weights of tokens."""
        return self._usual.gradients

    @property
    def learning_rate(self) -> float | None:
        """First learning rate; None is 1/steps."""
        return self.lr or self._usual.lr

    @property
    def batch(self) -> int:
        """Samples that run together; a sign step takes `step_samples`."""
        return self._usual.batch if self.batch_size is None else self.batch_size

    @property
    def step_samples(self) -> int:
        """Samples that are asked for in a sign step."""
        return self.batch * self.gradient_accumulate_steps

    def with_preset(self, name: str) -> "Recipe":
        """The same with the steps of another preset."""
        samples = max(1, self.step_samples * self.how.presets[name].batch // self._usual.batch)
        return dataclasses.replace(
            self, preset=name, iters=None, lr=0.0, batch_size=1, gradient_accumulate_steps=samples
        )

    @property
    def how(self) -> Algorithm:
        """The algorithm's row."""
        return ALGORITHMS[self.algorithm]

    @property
    def _usual(self) -> Steps:
        return self.how.presets.get(self.preset, self.how.presets["default"])

    @property
    def kept_patterns(self) -> list[str]:
        """Patterns of the layers that stay in 16 bits: `fp_layers` and `ignore`."""
        return [part.strip() for part in self.fp_layers.split(",") if part.strip()] + (
            self.ignore or []
        )

    @property
    def streams(self) -> bool | None:
        """Whether blocks are read when their turn comes; None: if the model does not fit."""
        asked = self.low_cpu_mem_usage or self.low_cpu_mem_mode != 0
        return True if asked and self.stream is None else self.stream

    @property
    def mixable(self) -> tuple[Option, ...]:
        """`bit_options` from the smallest to the largest, scales counted."""
        sizes = {option: of_option(self._plain, option).stored() for option in self._options}
        return tuple(sorted(sizes, key=lambda option: sizes[option]))

    @property
    def _options(self) -> set[Option]:
        given = self.bit_options
        words = given.split(",") if isinstance(given, str) else given
        names = [str(word).strip().upper() for word in words]
        return {int(name) if name.isdigit() else name for name in names}

    @property
    def needs_samples(self) -> bool:
        """Whether calibration samples are read: to tune, to choose bits, or to measure inputs, keys
        and values."""
        return self.calibrates or self.whole_passes

    @property
    def whole_passes(self) -> bool:
        """Whether some step works on the whole model, before the first or after the last block."""
        return bool(self._on_the_whole())

    @property
    def inputs_first(self) -> bool:
        """Whether the inputs of layers are measured on the whole model, before the first block.

        Else each block's are when its turn comes.
        """
        first = not self.calibrates or self.quant_lm_head
        return first and any(scheme.inputs_measured for scheme in self.schemes)

    @property
    def block_classes(self) -> list[str]:
        """Classes of the blocks to quantize, from `sequential_targets`.

        Empty if other keys choose the stages.
        """
        return [name for name in self.sequential_targets or [] if name != LAYER]

    @property
    def in_turn(self) -> bool:
        """Whether the closed form takes a block's layers one after another.

        llm-compressor asks for this by a layer's class among the `sequential_targets`.
        """
        return self.true_sequential or LAYER in (self.sequential_targets or [])

    @property
    def closed_form(self) -> bool:
        """Whether weights start elsewhere than at rounding to nearest, by second moments."""
        return self.how.start is not None and self.calibrates

    @property
    def details(self) -> dict[str, Any]:
        """How weights are rounded, for information in configurations; without unused keys."""
        solve = {
            "dampening": self.dampening,
            "actorder": self.actorder,
            "true_sequential": self.in_turn,
        }
        return {"iters": self.steps if self.calibrates else 0, "algorithm": self.algorithm} | (
            solve if self.closed_form else {}
        )

    @property
    def calibrates(self) -> bool:
        """False if weights are only rounded to nearest: `rtn`, or 0 iterations."""
        return self.steps > 0 or (self.how.start is not None and not self.how.steps)


HINTS = typing.get_type_hints(Recipe)
KEYS: dict[str, Key] = {
    name: hint.__metadata__[0]
    for name, hint in typing.get_type_hints(Recipe, include_extras=True).items()
}
ALIASES = {other: name for name, key in KEYS.items() for other in key.names}


def from_mapping(
    values: dict[str, Any], where: str = "recipe", base: Recipe | None = None
) -> Recipe:
    """A recipe from plain values, also with other tools' names (`aliases`).

    Unknown keys raise UserError with the nearest known name.
    """
    return dataclasses.replace(base or Recipe(), **aliases.resolve(values, where, HINTS, ALIASES))
