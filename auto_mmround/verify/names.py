"""Which linear layers an engine will build as quantized ones, judged as the engine judges: by their
names.

A quantization configuration is a list of names and patterns, and every reader matches it in its own
way against its own module names. A layer that is packed in the file but plain in the engine starts
from random numbers, mostly without a word. The rules below restate those of Transformers 5.23 (with
auto-round 0.16, optimum 2.3, gptqmodel 7.7) and vLLM 0.32; vLLM's renaming tables are those of its
model classes.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from auto_mmround.export.patterns import tails

Config = Mapping[str, Any]
Overrides = Mapping[str, Any]
Rename = tuple[str, str]
SPECIAL = re.compile(r"[*+?^$()\[\]{}|\\]")  # what makes vLLM take a name for a pattern
DEFAULTS: Overrides = MappingProxyType({})

_HEAD: Rename = (r"^lm_head\.", "language_model.lm_head.")
_TEXT: Rename = (r"^model\.language_model\.", "language_model.model.")
_VISUAL: Rename = (r"^model\.visual\.", "visual.")
_REST: Rename = (r"^model\.", "language_model.model.")
_TOWERS = (
    _TEXT,
    *((rf"^model\.{w}\.", f"{w}.") for w in ("vision_tower", "multi_modal_projector")),
    _HEAD,
)
_THINKER = (
    (r"^thinker\.lm_head\.", "language_model.lm_head."),
    (r"^thinker\.model\.", "language_model.model."),
    (r"^thinker\.", ""),
)
_FC: Rename = (r"\.fc([12])\.", r".mlp.fc\1.")

# config.model_type -> renamings from checkpoint or Transformers names to vLLM's, applied in order.
# Types that are not listed keep the checkpoint's names.
VLLM_NAMES: dict[str, tuple[Rename, ...]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), (_TEXT, _VISUAL, _HEAD, _REST)),
    **dict.fromkeys(("qwen3_vl", "glm4v"), (_VISUAL, _HEAD, _TEXT)),
    **dict.fromkeys(("llava", "llava_next", "llava_onevision", "gemma3", "paligemma"), _TOWERS),
    "mistral3": (*_TOWERS, _REST),
    "lfm2_vl": _TOWERS,
    "whisper": (_FC,),
    **dict.fromkeys(("qwen2_5_omni", "qwen3_omni_moe"), _THINKER),
}
# Where optimum looks for the blocks of a GPTQ checkpoint that does not name them.
GPTQ_BLOCKS = (
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "model.language_model.layers",
)


@dataclass(frozen=True)
class Question:
    """names: linear layers as the engine spells them. head: the output head's name. packed: those
    packed in the file.
    rename: a name of the configuration as the engine rewrites it before matching."""

    config: Config
    names: Sequence[str]
    head: str | None
    packed: frozenset[str]
    rename: Callable[[str], str] = str

    def listed(self, key: str) -> list[str]:
        """A list of the configuration, flattened (a string is split at commas) and rewritten."""
        value = self.config.get(key) or []
        return [
            self.rename(item)
            for item in (value.split(",") if isinstance(value, str) else _flat(value))
        ]


# The answer: the quantized layers, with what the configuration says of each beyond its defaults.
Reader = Callable[[Question], Mapping[str, Overrides]]


def vllm_rename(model_type: str, name: str) -> str:
    """A name or a prefix of one, from the checkpoint or the configuration, in vLLM's spelling."""
    for pattern, new in VLLM_NAMES.get(model_type, ()):
        name = re.sub(pattern, new, name, count=1)
    return name


def vllm_module(model_type: str, name: str) -> str:
    """The full name of a module, in vLLM's spelling."""
    return vllm_rename(model_type, name + ".").removesuffix(".")


def _auto_round_transformers(q: Question) -> Mapping[str, Overrides]:
    prefixes = tuple(q.listed("block_name_to_quantize") or q.listed("to_quant_block_names"))
    # Without prefixes all numbered blocks count, those of towers too.
    inside = [
        n for n in q.names if (n.startswith(prefixes) if prefixes else re.search(r"\.\d+\.", n))
    ]
    extra = q.config.get("extra_config") or {}
    names = set(q.names)
    found = {key: options for key, options in extra.items() if key in names}
    for key, options in extra.items():
        if key not in found:
            matched = [n for n in inside if _search(key, n)] or [
                n for n in q.names if _search(key, n)
            ]
            found |= {n: options for n in matched if n not in found}
    return {
        n: found.get(n, {})
        for n in dict.fromkeys([*inside, *found])
        if found.get(n, {}).get("bits", 0) < 16
    }


def _gptq_transformers(q: Question) -> Mapping[str, Overrides]:
    """optimum reads the block prefix and the endings, but not ``dynamic``."""
    prefix = q.config.get("block_name_to_quantize")
    if prefix is None:
        prefix = next(
            (block for block in GPTQ_BLOCKS if any(name.startswith(block) for name in q.names)),
            "\0",
        )
    prefix = prefix if isinstance(prefix, str) else "\0"  # optimum takes one name, no list
    endings = tuple(q.listed("modules_in_block_to_quantize")) or ("",)
    return dict.fromkeys(
        (n for n in q.names if n.startswith(prefix) and n.endswith(endings)), DEFAULTS
    )


def _awq_transformers(q: Question) -> Mapping[str, Overrides]:
    keep = q.listed("modules_to_not_convert")
    matches = [re.compile(rf"(?:{key})(?:(?<=\.)|(?=\.|$))") for key in keep]
    kept = {n for n in q.names if n.endswith(tuple(keep)) or any(m.match(n) for m in matches)}
    return dict.fromkeys((n for n in q.names if n not in kept and n != q.head), DEFAULTS)


def _compressed_tensors(q: Question) -> Mapping[str, Overrides]:
    """Exact names, `re:` patterns from the start, or the class name "Linear"; the same in both
    engines."""
    ignored = [
        item if item.startswith("re:") else q.rename(item) for item in q.config.get("ignore") or ()
    ]
    targets: dict[str, Overrides] = {}
    for group in (q.config.get("config_groups") or {}).values():
        targets |= {
            t if t.startswith("re:") else q.rename(t): group.get("weights") or {}
            for t in group["targets"]
        }
    answer = {}
    for name in q.names:
        mine = [
            options
            for target, options in targets.items()
            if target == "Linear" or _named(target, name)
        ]
        if mine and not any(_named(item, name) for item in ignored):
            answer[name] = mine[0]
    return answer


def _auto_round_vllm(q: Question) -> Mapping[str, Overrides]:
    prefixes = tuple(q.listed("block_name_to_quantize") or q.listed("to_quant_block_names"))
    extra = {
        q.rename(key): options for key, options in (q.config.get("extra_config") or {}).items()
    }
    places, patterns = (
        {key: i for i, key in enumerate(extra)},
        [k for k in extra if SPECIAL.search(k)],
    )
    answer = {}
    for name in q.names:
        ends = (end for end in list(tails(name))[1:] if end in places)
        key = name if name in extra else min(ends, key=places.__getitem__, default=None)
        inside = name.startswith(prefixes) if prefixes else name != q.head
        if key is None:
            key = next((k for k in patterns if _search(k, name)), None)
            options = {"bits": 0 if inside else 16} | (extra[key] if key is not None else {})
        else:
            options = extra[key]
        if options.get("bits", 0) < 16:
            answer[name] = {k: v for k, v in options.items() if (k, v) != ("bits", 0)}
    return answer


def _gptq_vllm(q: Question) -> Mapping[str, Overrides]:
    # by substring; without a list, whatever is packed in the file
    listed = q.listed("modules_in_block_to_quantize")
    dynamic = q.config.get("dynamic") or {}
    answer = {}
    for name in q.names:
        rule = next(
            (k for k in dynamic if re.match(k.removeprefix("-:").removeprefix("+:"), name)), ""
        )
        inside = any(part in name for part in listed) if listed else name in q.packed
        if inside and not rule.startswith("-:") and (name != q.head or q.config.get("lm_head")):
            answer[name] = dynamic.get(rule, {})
    return answer


def _awq_vllm(q: Question) -> Mapping[str, Overrides]:
    keep = q.listed("modules_to_not_convert")
    skipped = {
        n for n in q.names if (any(part in n for part in keep) if keep else n not in q.packed)
    }
    head = q.head if not q.config.get("lm_head") else None
    return dict.fromkeys((n for n in q.names if n not in skipped and n != head), DEFAULTS)


READERS: dict[tuple[str, str], Reader] = {
    ("Transformers", "auto-round"): _auto_round_transformers,
    ("Transformers", "gptq"): _gptq_transformers,
    ("Transformers", "awq"): _awq_transformers,
    ("Transformers", "compressed-tensors"): _compressed_tensors,
    ("vLLM", "auto-round"): _auto_round_vllm,
    ("vLLM", "gptq"): _gptq_vllm,
    ("vLLM", "awq"): _awq_vllm,
    ("vLLM", "compressed-tensors"): _compressed_tensors,
}


def vllm_reads(config: Config) -> bool:
    """Whether vLLM takes such checkpoints at all; if not, its names do not matter."""
    method, bits = config.get("quant_method"), config.get("bits")
    if method == "gptq":
        return bits in (4, 8) and bool(config.get("sym"))
    if method == "auto-round":
        return config.get("packing_format") in ("auto_round:auto_gptq", "auto_round:auto_awq")
    return method != "awq" or bits == 4


def entries(config: Config) -> list[str]:
    """Every name, prefix and pattern that the configuration uses to say what is quantized and what
    is not."""
    lists = (
        "block_name_to_quantize",
        "to_quant_block_names",
        "modules_in_block_to_quantize",
        "modules_to_not_convert",
    )
    found = [item for key in lists for item in Question(config, (), None, frozenset()).listed(key)]
    found += [
        *(config.get("extra_config") or {}),
        *(config.get("dynamic") or {}),
        *(config.get("ignore") or ()),
    ]
    groups = (config.get("config_groups") or {}).values()
    return list(
        dict.fromkeys([*found, *(target for group in groups for target in group["targets"])])
    )


def names_something(entry: str, names: Iterable[str]) -> bool:
    """Whether any reader could take an entry for one of the names: as part of it, or as a
    pattern."""
    if entry == "Linear":
        return True
    for mark in ("re:", "+:", "-:"):
        entry = entry.removeprefix(mark)
    return any(entry in name or _search(entry, name) for name in names)


def _named(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _search(pattern: str, name: str) -> bool:
    try:
        return re.search(pattern, name) is not None
    except re.error:
        return False


def _flat(value: Any) -> list[str]:
    return (
        [item for part in value for item in _flat(part)]
        if isinstance(value, (list, tuple))
        else [value]
    )
