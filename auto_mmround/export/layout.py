"""What an export format is told about the whole model (`Layout`), and how names are listed.

A configuration has to be understood by Transformers (its module names), by vLLM (its own module
names, matched by substring, prefix or regex) and by readers that only know the checkpoint. vLLM
renames plain names by itself, if it needs no more than the name for that. It never renames
patterns. So names are written in both spellings, Transformers' and the checkpoint's, and patterns
in vLLM's too. A tower is named by a pattern without an anchored prefix.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from auto_mmround.export.patterns import as_pattern, folded
from auto_mmround.families import vllm_module, vllm_rename
from auto_mmround.recipe.schemes import Scheme


@dataclass(frozen=True)
class Layout:
    """What was done to which module of the model; all names are Transformers module names.

    quantized: scheme of every quantized module. kept: Linear-like modules that stay in 16 bits.
    blocks: prefixes of the quantized block lists ("model.language_model.layers").
    checkpoint_name: Transformers module name -> name in the checkpoint files. default: the
    recipe's scheme. details: facts recorded for information (iters, algorithm ..). carried:
    modules that engines load and the model's class does not. parts: what the checkpoint calls kept
    modules that it stores in several, or under a name unlike Transformers'. kv_cache: FP8 scales of
    keys and values, "tensor": one of each, "attn_head": one a head; "": none. model_type: the
    configuration's, by which vLLM's spelling is known.
    """

    quantized: Mapping[str, Scheme]
    kept: Sequence[str]
    blocks: Sequence[str]
    checkpoint_name: Callable[[str], str]
    default: Scheme
    details: Mapping[str, Any] = field(default_factory=dict)
    carried: Sequence[str] = ()
    parts: Sequence[str] = ()
    kv_cache: str = ""
    model_type: str = ""

    @cached_property
    def outside(self) -> list[str]:
        """Quantized modules that lie in no block: the output head."""
        return [
            name
            for name in self.quantized
            if not any(name.startswith(block + ".") for block in self.blocks)
            and name not in self.carried
        ]

    @cached_property
    def members(self) -> dict[str, str]:
        """A module's name, or a prefix of one, -> the first module that it is the name or a prefix
        of."""
        templates: dict[str, str] = {}
        for name in (*self.quantized, *self.kept):
            for prefix in (*_ancestors(name), name):
                templates.setdefault(prefix, name)
        return templates


def both_spellings(layout: Layout, name: str) -> list[str]:
    """A module name or a prefix of one, as Transformers says it and, where it differs, as the
    checkpoint says it; and as vLLM does, where it can't rename these itself."""
    both = _both(layout, name)
    own = vllm_module(layout.model_type, both[-1])
    renamed = {vllm_rename(layout.model_type, each) for each in both}
    return both if own in renamed else [*both, own]


def in_patterns(layout: Layout, name: str) -> list[str]:
    """The same for patterns: as Transformers, the checkpoint and vLLM say it."""
    both = _both(layout, name)
    return list(dict.fromkeys([*both, vllm_module(layout.model_type, both[-1])]))


def _both(layout: Layout, name: str) -> list[str]:
    member = layout.members.get(name)
    if member is None:
        return [name]
    rest, stored = member[len(name) :], layout.checkpoint_name(member)
    if stored == member or stored.endswith(rest):
        return list(dict.fromkeys([name, stored.removesuffix(rest)]))
    # respelled below the prefix too: a list of blocks still ends at the number
    number = rest.split(".")[1]
    if number.isdigit() and f".{number}." in stored:
        return [name, stored.partition(f".{number}.")[0]]
    return [name]


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
    """Regexes (for ``re.search`` and ``re.match``) of everything below a kept group: in any
    engine's spelling, if that hits no quantized module, else from the start of a name."""
    spelled = [re.escape(spelling) for spelling in in_patterns(layout, group)]
    word = [rf".*{re.escape(_short(group))}\..*"]
    choices = [word, *([head + name + r"\..*" for name in spelled] for head in (".*", r"(^|.*\.)"))]
    return next(
        (patterns for patterns in choices if not _hits(layout, patterns)),
        [rf"^{name}\..*" for name in spelled],
    )


def tower_substrings(layout: Layout, group: str) -> list[str]:
    """The same for readers that look for substrings: prefixes with a closing dot (`encoder.` spares
    `encoder_attn`). One that stands in a quantized module's name too gets the start of the name
    before it, for those that read patterns."""
    spelled = [spelling + "." for spelling in both_spellings(layout, group)]
    short = [_short(group) + "."]
    free = [word for word in short if not _hits(layout, [".*" + re.escape(word)])]
    words = [
        "^" + re.escape(word) if _hits(layout, [".*" + re.escape(word)]) else word
        for word in spelled
    ]
    return list(dict.fromkeys(words + free))


def carried_names(layout: Layout) -> list[str]:
    """The layers that the model's class does not load and that stay, by the shortest prefixes that
    hold nothing quantized, in both spellings; for readers and people that look for a plain name."""
    kept = [name for name in layout.carried if name not in layout.quantized]
    groups, singles = kept_groups(replace(layout, kept=kept))
    names = dict.fromkeys(s for name in (*groups, *singles) for s in both_spellings(layout, name))
    quantized = [s for name in layout.quantized for s in (name, layout.checkpoint_name(name))]
    return [name for name in names if not any(name in other for other in quantized)]


def _short(group: str) -> str:
    """The last part of a group's name; a number with what it counts."""
    *_, parent, last = f".{group}".split(".")
    return f"{parent}.{last}" if last.isdigit() and parent else last


def part_patterns(layout: Layout) -> list[str]:
    """Regexes of the `parts`, and of kept modules that the checkpoint calls by names which the
    patterns of their group do not take; those that differ in numbers only by one."""
    groups = {group: tower_patterns(layout, group) for group in kept_groups(layout)[0]}
    names = list(layout.parts)
    for name in layout.kept:
        group = next((a for a in (*_ancestors(name), name) if a in groups), None)
        taken = groups.get(group or "", ["."])
        names += [s for s in in_patterns(layout, name) if not any(re.match(p, s) for p in taken)]
    everything = [s for name in layout.quantized for s in in_patterns(layout, name)]
    return [rf".*{as_pattern(t)}$" for t in folded(names, [*names, *everything])]


def _hits(layout: Layout, patterns: Sequence[str]) -> bool:
    """Whether a quantized module is met by one of the patterns, in either spelling."""
    return any(
        re.match(pattern, spelling)
        for pattern in patterns
        for name in layout.quantized
        for spelling in in_patterns(layout, name)
    )


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]
