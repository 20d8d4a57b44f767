"""What is known about model families, as data: what `auto-round-mllm families` prints, and what
structure cannot tell.

A family that is missing here has no quirk and is read by its structure, see docs/new-model.md.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """One `config.model_type`.

    title: as people write it. calibrates: kinds of samples that it takes; without "text" it can't
      run on text alone.
    stages: names of its stages in forward order. template: name on the template shelf, where it
      is not the model type.
    connectors: names of module lists that look like blocks and are none, because no hidden state
    runs from one to the next. towers: part of a module name -> stage name, where the code does not
    declare what a tower reads. note: what users should know. Rows with stages are tested on tiny
    models, from plan to reload, towers included.
    """

    title: str
    calibrates: tuple[str, ...] = ("text", "image")
    stages: tuple[str, ...] = ("vision", "text")
    template: str | None = None
    connectors: tuple[str, ...] = ()
    towers: Mapping[str, str] = field(default_factory=dict)
    note: str = ""

    @property
    def text_only(self) -> bool:
        """The model runs on plain text, so a text set can calibrate it."""
        return "text" in self.calibrates


# What models read that read no words.
WORDLESS = {"input_features", "input_values", "pixel_values", "flattened_patches"}
TEXT, HEARING = ("text",), ("text", "audio")
SHARED = "keys and values shared between layers"

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family("Qwen2-VL"),
    "qwen2_5_vl": Family("Qwen2.5-VL", template="qwen2_vl"),
    "qwen3_vl": Family(
        "Qwen3-VL", connectors=("deepstack_merger_list",), note="deep-stacked vision features"
    ),
    "qwen3_vl_moe": Family(
        "Qwen3-VL-MoE",
        connectors=("deepstack_merger_list",),
        note="deep-stacked vision features; experts",
    ),
    "mllama": Family(
        "Llama-3.2-Vision", ("image",), note="cross attention; every sample needs an image"
    ),
    "phi3_v": Family("Phi-3.5-vision", note="its own code; tested on a stand-in"),
    "llava": Family("LLaVA-1.5"),
    "llava_next": Family("LLaVA-NeXT"),
    "llava_onevision": Family("LLaVA-OneVision"),
    "cogvlm2": Family(
        "CogVLM2", towers={"vision": "vision"}, note="its own code; tested on a stand-in"
    ),
    "gemma3": Family("Gemma 3"),
    "gemma4": Family("Gemma 4", note=SHARED),
    "smolvlm": Family("SmolVLM"),
    "idefics3": Family("Idefics3"),
    "mistral3": Family("Mistral 3 (Pixtral)"),
    "internvl": Family("InternVL"),
    "glm4v": Family("GLM-4V"),
    "llama4": Family(
        "Llama 4",
        note="experts; auto-round 0.16.1 in Transformers weighs their outputs, not their inputs",
    ),
    "lfm2_vl": Family("LFM2-VL"),
    "deepseek_vl": Family("DeepSeek-VL"),
    "kimi_k25": Family(
        "Kimi K2.5",
        note=(
            "experts; the tower's attention stays in 16 bits, and Transformers with auto-round"
            " misses it"
        ),
    ),
    "whisper": Family("Whisper", ("audio",), ("encoder", "text"), towers={"encoder": "encoder"}),
    "qwen2_audio": Family("Qwen2-Audio", HEARING, ("audio", "text")),
    "voxtral": Family("Voxtral", HEARING, ("audio", "text")),
    "granite_speech": Family(
        "Granite-Speech",
        HEARING,
        ("audio", "nontext", "text"),
        note="encoder inputs captured anew after each block",
    ),
    "qwen2_5_omni_thinker": Family(
        "Qwen2.5-Omni thinker", ("text", "image", "audio"), ("audio", "vision", "text")
    ),
    "phi4_multimodal": Family(
        "Phi-4-multimodal", ("text", "image", "audio"), ("vision", "audio", "text")
    ),
    "llama": Family("Llama", TEXT, TEXT),
    "qwen2": Family("Qwen2", TEXT, TEXT),
    "qwen3": Family("Qwen3", TEXT, TEXT),
    "qwen3_moe": Family("Qwen3-MoE", TEXT, TEXT, note="experts"),
    "phi3": Family("Phi-3", TEXT, TEXT),
    "gemma3_text": Family("Gemma 3 text", TEXT, TEXT),
    "gemma3n_text": Family("Gemma 3n text", TEXT, TEXT, note=f"parallel streams; {SHARED}"),
    "gpt2": Family("GPT-2", TEXT, TEXT),
}


def family_of(model_type: str) -> Family:
    """The family's entry, or one without quirks."""
    return FAMILIES.get(model_type, Family(model_type, stages=()))


class Swept(NamedTuple):
    """What became of a class of Transformers in the sweep (`scripts/sweep_families.py`).

    verdict: passed, refused, not built, or a fault. line: why it did not pass. ways: how it went:
    with text alone, with its media, with towers quantized. stages: their names.
    """

    model_type: str
    architecture: str
    group: str
    verdict: str
    line: str
    ways: list[str]
    stages: list[str]


def swept() -> list[Swept]:
    """Every class of the last sweep, by model type."""
    rows = json.loads(Path(__file__).with_name("swept.json").read_text())
    return [Swept(**row) for row in rows]


def reads_words(model: PreTrainedModel) -> bool:
    """Whether a model takes ids of words, beside those that its decoder writes."""
    takes = signature(model.forward).parameters
    return "input_ids" in takes or not WORDLESS & set(takes)


def calibrates(model: PreTrainedModel) -> tuple[str, ...]:
    """Kinds of samples that a model takes: by its family's row, else as its class declares."""
    if model.config.model_type in FAMILIES:
        return FAMILIES[model.config.model_type].calibrates
    declared = model.input_modalities
    kinds = (declared,) if isinstance(declared, str) else tuple(declared)
    return (
        *(("text",) if reads_words(model) else ()),
        *(kind for kind in kinds if kind in ("image", "audio")),
    )
