"""What an export format is (`Format`), what it is told about the whole model (`Layout`), and how
names are listed.

A configuration has to be understood by Transformers (its module names), by vLLM (its own module
names, matched by substring, prefix or regex) and by readers that only know the checkpoint. So every
name is written in both spellings, Transformers' and the checkpoint's, and a tower is named by a
pattern without an anchored prefix.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_mmround.export.patterns import as_pattern, folded
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.schemes import Scheme


@dataclass(frozen=True)
class Layout:
    """What was done to which module of the model; all names are Transformers module names.

    quantized: scheme of every quantized module. kept: Linear-like modules that stay in 16 bits.
    blocks: prefixes of the quantized block lists ("model.language_model.layers"). checkpoint_name:
    Transformers module name -> name in the checkpoint files. default: the recipe's scheme. details:
    facts recorded for information (iters, algorithm ..). parts: what the checkpoint calls kept
    modules that it stores in several, or under a name unlike Transformers'.
    """

    quantized: Mapping[str, Scheme]
    kept: Sequence[str]
    blocks: Sequence[str]
    checkpoint_name: Callable[[str], str]
    default: Scheme
    details: Mapping[str, Any] = field(default_factory=dict)
    parts: Sequence[str] = ()

    @cached_property
    def members(self) -> dict[str, str]:
        """A module's name, or a prefix of one, -> the first module that it is the name or a prefix
        of."""
        found: dict[str, str] = {}
        for name in (*self.quantized, *self.kept):
            for prefix in (*_ancestors(name), name):
                found.setdefault(prefix, name)
        return found


@dataclass(frozen=True)
class Whole:
    """A quantized model as formats see it that write files of their own kind instead of a
    Transformers checkpoint.

    codes: quantized weights by the checkpoint's module name. rest: (checkpoint key, tensor) of
    everything else, to be walked through once. config: the source's `config.json`. source: its
    folder, None for a model made in memory.
    """

    codes: Mapping[str, Codes]
    rest: Iterable[tuple[str, Tensor]]
    config: Mapping[str, Any]
    layout: Layout
    source: Path | None


@dataclass(frozen=True)
class Format:
    """One export format; four pure functions and what the tuner must know beforehand.

    check(scheme, out, in): why this weight cannot be held, or None. pack(module name, codes):
    tensors by full name. unpack(module name, tensors, scheme): the exact inverse, ValueError on
    tensors that contradict the scheme. config(layout): the ``quantization_config``, None for none.
    min_zero: smallest zero point an asymmetric weight may have.
    fused_zero: stores scale * zero as one float16, which is exact only for scales of 11 - bits
    significant bits. write(folder, whole): for files of another kind (GGUF, OpenVINO): writes them,
    and returns what `config` would; pack is not called then. ready(): raises UserError if a program
    that writing needs is not installed; asked before anything is tuned.
    parts: endings of the tensors that make one weight; no unquantized Linear has the first. Empty:
    nothing is packed, weights are written as the model in memory holds them. model_config(source's
    config.json, layout): `config.json` but for ``quantization_config``, if readers need more than
    the source's. read(folder, dtype): (checkpoint key, decoded tensor) of a folder that `write`
    made. check_model(config, checkpoint keys, source folder): UserError for a model it cannot
    write, asked before tuning. any_float: floating parts may be float16, bfloat16 or float32,
    whatever the scheme says. scale_range: holds super-blocks, with such bounds of the scales'
    integers (`Grid`); what was tuned on another grid is fitted once more. exact_rest: tensors that
    are not quantized are read back to the bit, of formats with `read`.
    """

    name: str
    summary: str
    bits: tuple[int, ...]
    check: Callable[[Scheme, int, int], str | None]
    pack: Callable[[str, Codes], dict[str, Tensor]]
    unpack: Callable[[str, Mapping[str, Tensor], Scheme], Codes]
    config: Callable[[Layout], dict[str, Any] | None]
    min_zero: int = 0
    fused_zero: bool = False
    write: Callable[[Path, Whole], dict[str, Any]] | None = None
    ready: Callable[[], object] | None = None
    parts: tuple[str, ...] = ("qweight", "qzeros", "scales", "g_idx")
    model_config: Callable[[Mapping[str, Any], Layout], dict[str, Any]] | None = None
    read: Callable[[Path, torch.dtype | None], Iterator[tuple[str, Tensor]]] | None = None
    check_model: Callable[[Mapping[str, Any], Iterable[str], Path | None], None] | None = None
    any_float: bool = False
    scale_range: tuple[int, int] | None = None
    exact_rest: bool = True


def check_int(
    scheme: Scheme,
    out_features: int,
    in_features: int,
    bits: Iterable[int],
    multiples: tuple[int, int],
    scale_dtypes: Collection[str] = ("fp16",),
) -> str | None:
    """The rules all integer layouts share. multiples: what out and in features must be multiples
    of."""
    group = in_features if scheme.group_size == -1 else scheme.group_size
    held = sorted(bits)
    rules = (
        (
            scheme.data_type != "int",
            f"holds integers, not {scheme.data_type}, which compressed_tensors does",
        ),
        (scheme.act_bits < 16, f"cannot state {scheme.act_bits}-bit activations"),
        (
            scheme.scale_dtype not in scale_dtypes,
            f"stores scales as {' or '.join(scale_dtypes)}, not {scheme.scale_dtype}",
        ),
        (scheme.bits not in held, f"holds {', '.join(map(str, held))} bits, not {scheme.bits}"),
        (
            group < 1 or in_features % group != 0,
            f"{in_features} inputs are no multiple of the group size {group}",
        ),
        (
            in_features % multiples[1] != 0,
            f"{in_features} inputs are no multiple of {multiples[1]}",
        ),
        (
            out_features % multiples[0] != 0,
            f"{out_features} outputs are no multiple of {multiples[0]}",
        ),
    )
    return next((reason for broken, reason in rules if broken), None)


def both_spellings(layout: Layout, name: str) -> list[str]:
    """A module name or a prefix of one, as Transformers says it and, where it differs, as the
    checkpoint says it."""
    member = layout.members.get(name)
    if member is None:
        return [name]
    rest, stored = member[len(name) :], layout.checkpoint_name(member)
    if stored == member or stored.endswith(rest):
        return list(dict.fromkeys([name, stored.removesuffix(rest)]))
    # respelled below the prefix too: a list of blocks still ends at the number
    number = rest.split(".")[1]
    return (
        [name, stored.partition(f".{number}.")[0]]
        if number.isdigit() and f".{number}." in stored
        else [name]
    )


def kept_groups(layout: Layout) -> tuple[list[str], list[str]]:
    """The kept modules as (prefixes that hold no quantized module, single modules that share their
    parent with one)."""
    busy = {ancestor for name in layout.quantized for ancestor in _ancestors(name)}
    groups: dict[str, None] = {}
    singles: dict[str, None] = {}
    for name in layout.kept:
        free = next((a for a in _ancestors(name) if a not in busy), None)
        (singles if free is None else groups)[free or name] = None
    return list(groups), list(singles)


def tower_patterns(layout: Layout, group: str) -> list[str]:
    """Regexes (for ``re.search`` and ``re.match``) of everything below a kept group, in any
    engine's spelling."""
    word = rf".*{re.escape(group.rpartition('.')[2])}\..*"
    if not group[-1].isdigit() and not _hits(layout, lambda name: re.match(word, name) is not None):
        return [word]
    return [rf".*{re.escape(spelling)}\..*" for spelling in both_spellings(layout, group)]


def tower_substrings(layout: Layout, group: str) -> list[str]:
    """The same for readers that look for substrings: prefixes with a closing dot (`encoder.` spares
    `encoder_attn`)."""
    word = group.rpartition(".")[2] + "."
    short = [] if group[-1].isdigit() or _hits(layout, lambda name: word in name) else [word]
    return list(dict.fromkeys([s + "." for s in both_spellings(layout, group)] + short))


def differences(scheme: Scheme, base: Scheme) -> dict[str, Any]:
    """The configuration keys in which a module's scheme differs from the default."""
    keys = ("bits", "group_size", "sym")
    return {key: getattr(scheme, key) for key in keys if getattr(scheme, key) != getattr(base, key)}


def part_patterns(layout: Layout) -> list[str]:
    """Regexes of the `parts`, and of kept modules that the checkpoint calls by names which the
    patterns of their group do not take; those that differ in numbers only by one."""
    groups = {group: tower_patterns(layout, group) for group in kept_groups(layout)[0]}
    names = list(layout.parts)
    for name in layout.kept:
        group = next((a for a in (*_ancestors(name), name) if a in groups), None)
        stored = layout.checkpoint_name(name)
        if group and not any(re.match(pattern, stored) for pattern in groups[group]):
            names.append(stored)
    everything = [layout.checkpoint_name(name) for name in layout.quantized]
    return [rf".*{as_pattern(t)}$" for t in folded(names, [*names, *everything])]


def _hits(layout: Layout, test: Callable[[str], bool]) -> list[str]:
    return [name for name in layout.quantized if test(name) or test(layout.checkpoint_name(name))]


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
