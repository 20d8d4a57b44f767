"""How a configuration of compressed-tensors finds the modules of a scheme: by name or pattern."""

import re
from collections import Counter
from collections.abc import Mapping
from itertools import takewhile

from auto_mmround.export.layout import Layout, both_spellings, in_patterns
from auto_mmround.export.method import Overrides, Spelling
from auto_mmround.export.patterns import as_pattern, folded, tails, templates
from auto_mmround.recipe.schemes import Scheme

Ends = dict[str, set[Scheme]]


def targets_of(
    layout: Layout,
    by_scheme: Mapping[Scheme, list[str]],
    scheme: Scheme,
    ends: Ends,
    everything: bool,
) -> list[str]:
    """How readers find these modules: all by their class, a whole block list by a pattern, else one
    by one, those that differ in numbers only by one pattern.

    Both Transformers and vLLM try names before classes, and vLLM tries the members of a matrix that
    it fuses.
    """
    names, blocks = by_scheme[scheme], {name: _block(layout, name) for name in layout.quantized}
    outside = [name for name in names if blocks[name] is None]
    if everything:  # vLLM's output head is no Linear: it goes by name
        return [
            "Linear",
            *(target for name in outside for target in _by_name(layout, name, name, scheme, ends)),
        ]
    sizes, mine = Counter(blocks.values()), Counter(blocks[name] for name in names)
    whole = {
        block: pattern
        for block in layout.blocks
        if mine[block] == sizes[block] > 0
        and (pattern := _block_pattern(layout, block, by_scheme, scheme))
    }
    targets = dict.fromkeys(whole.values())
    single = [name for name in names if blocks[name] not in whole]
    for template, members in folded(single, layout.quantized).items():
        patterns = _by_name(layout, template, members[0], scheme, ends)
        if "#" in template and not patterns[0].startswith("re:"):
            patterns = [
                target
                for member in members
                for target in _by_name(layout, member, member, scheme, ends)
            ]
        targets |= dict.fromkeys(patterns)
    return list(targets)


def _block(layout: Layout, name: str) -> str | None:
    return next((block for block in layout.blocks if name.startswith(block + ".")), None)


def ends_of(layout: Layout, by_scheme: Mapping[Scheme, list[str]]) -> Ends:
    """What spellings of the modules end in, numbers also as ``#`` -> the schemes of those that
    do."""
    ends: Ends = {}
    for scheme, names in by_scheme.items():
        for name in names:
            for spelling in in_patterns(layout, name):
                for form in (spelling, *templates(spelling)):
                    for tail in tails(form):
                        ends.setdefault(tail, set()).add(scheme)
    return ends


def _by_name(layout: Layout, template: str, name: str, scheme: Scheme, ends: Ends) -> list[str]:
    """A pattern of what all spellings end in, or where it takes modules of other schemes, the
    spellings of ``name``."""
    shared = _shared_end(layout, name)
    end = ".".join(template.split(".")[-len(shared) :]) if shared else ""
    if not shared or _differs(template, name, shared) or ends[end] != {scheme}:
        return both_spellings(layout, name)
    return [rf"re:(.*\.)?{as_pattern(end)}$"]


def _differs(template: str, name: str, shared: list[str]) -> bool:
    """Whether a template has numbers in front of the end that all spellings share: the pattern
    would be too wide."""
    front = len(name.split(".")) - len(shared)
    return "#" in template.split(".")[:front]


def _shared_end(layout: Layout, name: str) -> list[str]:
    spellings = [reversed(spelling.split(".")) for spelling in in_patterns(layout, name)]
    common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*spellings))]
    return common[::-1]


def _block_pattern(
    layout: Layout, block: str, by_scheme: Mapping[Scheme, list[str]], scheme: Scheme
) -> str | None:
    """``re:`` pattern of everything below a block list in all spellings; None if it takes modules
    of other schemes."""
    shared = _shared_end(layout, block)
    pattern = re.compile(rf"(.*\.)?{re.escape('.'.join(shared))}\.")
    others = (name for other, names in by_scheme.items() if other != scheme for name in names)
    taken = any(
        pattern.match(spelling) for name in others for spelling in in_patterns(layout, name)
    )
    return f"re:{pattern.pattern}" if shared and not taken else None


def matched(q: Spelling) -> Mapping[str, Overrides]:
    """Exact names, `re:` patterns from the start, or the class name "Linear"; the same in both
    engines."""
    ignored = [_renamed(q, item) for item in q.config.get("ignore") or ()]
    targets: dict[str, Overrides] = {}
    for group in (q.config.get("config_groups") or {}).values():
        targets |= {_renamed(q, t): group.get("weights") or {} for t in group["targets"]}
    answer = {}
    for name in q.names:
        linear = name not in q.turned
        mine = [o for t, o in targets.items() if (t == "Linear" and linear) or _named(t, name)]
        if mine and not any(_named(item, name) for item in ignored):
            answer[name] = mine[0]
    return answer


def _renamed(q: Spelling, item: str) -> str:
    return item if item.startswith("re:") else q.rename(item)


def _named(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name
