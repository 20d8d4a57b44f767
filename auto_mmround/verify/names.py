"""How vLLM spells the modules of a model, by the tables of its model classes; whether an entry of a
configuration names any."""

import re
from collections.abc import Iterable

from auto_mmround.export.method import searched

Rename = tuple[str, str]

_HEAD: Rename = (r"^lm_head\.", "language_model.lm_head.")
_TEXT: Rename = (r"^model\.language_model\.", "language_model.model.")
_VISUAL: Rename = (r"^model\.visual\.", "visual.")
_REST: Rename = (r"^model\.", "language_model.model.")
_TOWERS = (
    _TEXT,
    *((rf"^model\.{w}\.", f"{w}.") for w in ("vision_tower", "multi_modal_projector")),
    _HEAD,
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
}


def vllm_rename(model_type: str, name: str) -> str:
    """A name or a prefix of one, from the checkpoint or the configuration, in vLLM's spelling."""
    for pattern, new in VLLM_NAMES.get(model_type, ()):
        name = re.sub(pattern, new, name, count=1)
    return name


def vllm_module(model_type: str, name: str) -> str:
    """The full name of a module, in vLLM's spelling."""
    return vllm_rename(model_type, name + ".").removesuffix(".")


def names_something(entry: str, names: Iterable[str]) -> bool:
    """Whether any reader could take an entry for one of the names: as part of it, or as a
    pattern."""
    if entry == "Linear":
        return True
    for mark in ("re:", "+:", "-:"):
        entry = entry.removeprefix(mark)
    return any(entry in name or searched(entry, name) for name in names)
