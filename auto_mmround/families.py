"""What is known about model families, as data: what `auto-round-mllm families` prints, and what
structure cannot tell.

A family that is missing here has no quirk and is read by its structure, see docs/new-model.md.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import NamedTuple

from transformers import PreTrainedModel

Rename = tuple[str, str]
# G_: the text model's names begin with nothing in GGUF's tables. V_: vLLM's renamings.
G_PLAIN = {"model.language_model.": "", "model.": "", "lm_head.": "lm_head."}
G_WRAPPED = {
    "model.language_model.": "", "language_model.model.": "",
    "lm_head.": "lm_head.", "language_model.lm_head.": "lm_head.",
}  # fmt: skip
G_INNER = {"model.language_model.": "", "lm_head.": "lm_head."}
G_CONNECTED = {"model.text_model.": "", "lm_head.": "lm_head."}

V_HEAD: Rename = (r"^lm_head\.", "language_model.lm_head.")
V_TEXT: Rename = (r"^model\.language_model\.", "language_model.model.")
V_VISUAL: Rename = (r"^model\.visual\.", "visual.")
V_REST: Rename = (r"^model\.", "language_model.model.")
V_QWEN2 = (V_TEXT, V_VISUAL, V_HEAD, V_REST)
V_TOWER = (
    V_TEXT,
    *((rf"^model\.{w}\.", f"{w}.") for w in ("vision_tower", "multi_modal_projector")),
    V_HEAD,
)
GEMMA_PARTS = (
    "vision_tower", "audio_tower", "embed_vision", "embed_audio", "multi_modal_projector",
    "vision_embedder",
)  # fmt: skip
V_GEMMA = (V_TEXT, *((rf"^model\.{w}\.", f"{w}.") for w in GEMMA_PARTS), V_HEAD, V_REST)
V_THINKER = (
    (r"^thinker\.lm_head\.", "language_model.lm_head."),
    (r"^thinker\.model\.", "language_model.model."),
    (r"^thinker\.", ""),
)


@dataclass(frozen=True)
class Family:
    """One `config.model_type`.

    title: as people write it. calibrates: kinds of samples that it takes; without "text" it can't
      run on text alone.
    stages: names of its stages in forward order. template: name on the template shelf, where it
      is not the model type.
    connectors: names of module lists that look like blocks and are none, because no hidden state
    runs from one to the next. towers: part of a module name -> stage name, where the code does not
    declare what a tower reads. decoder: the module that makes the logits, where the class names
    another. note: what users should know. Rows with stages are tested on tiny models, from plan to
    reload, towers included.

    Names in engines. vllm: renamings from the checkpoint's names to the names in vLLM's model
    class, in order; without any vLLM keeps the checkpoint's. gguf: how checkpoints begin the text
    model's names -> how the tables of `export/gguf` do. mlx_vision: the vision model_type that
    mlx-vlm insists on; it reads the text configuration of these flat from the root. openvino: the
    converter has a way for its tower. What llama.cpp computes stands in `export/gguf`: it is code.
    """

    title: str
    calibrates: tuple[str, ...] = ("text", "image")
    stages: tuple[str, ...] = ("vision", "text")
    template: str | None = None
    connectors: tuple[str, ...] = ()
    towers: Mapping[str, str] = field(default_factory=dict)
    decoder: str = ""
    note: str = ""
    vllm: tuple[Rename, ...] = ()
    gguf: Mapping[str, str] = field(default_factory=lambda: G_PLAIN)
    mlx_vision: str | None = None
    openvino: bool = False

    @property
    def text_only(self) -> bool:
        """The model runs on plain text, so a text set can calibrate it."""
        return "text" in self.calibrates


# What models read that read no words.
WORDLESS = {"input_features", "input_values", "pixel_values", "flattened_patches"}
TEXT, HEARING = ("text",), ("text", "audio")
SHARED = "keys and values shared between layers"

FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family("Qwen2-VL", vllm=V_QWEN2, mlx_vision="qwen2_vl", openvino=True),
    "qwen2_5_vl": Family("Qwen2.5-VL", template="qwen2_vl", vllm=V_QWEN2, mlx_vision="qwen2_5_vl"),
    "qwen3_vl": Family(
        "Qwen3-VL",
        connectors=("deepstack_merger_list",),
        note="deep-stacked vision features",
        vllm=(V_VISUAL, V_HEAD, V_TEXT),
        gguf=G_INNER,
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
    "llava": Family("LLaVA-1.5", vllm=V_TOWER, gguf=G_WRAPPED, openvino=True),
    "llava_next": Family("LLaVA-NeXT", vllm=V_TOWER),
    "llava_onevision": Family("LLaVA-OneVision", vllm=V_TOWER),
    "cogvlm2": Family(
        "CogVLM2", towers={"vision": "vision"}, note="its own code; tested on a stand-in"
    ),
    "gemma3": Family("Gemma 3", vllm=V_TOWER, gguf=G_WRAPPED),
    "gemma4": Family("Gemma 4", note=SHARED, vllm=V_GEMMA),
    "smolvlm": Family("SmolVLM", gguf=G_CONNECTED),
    "idefics3": Family("Idefics3", gguf=G_CONNECTED),
    "mistral3": Family("Mistral 3 (Pixtral)", vllm=(*V_TOWER, V_REST), gguf=G_WRAPPED),
    "internvl": Family("InternVL"),
    "glm4v": Family("GLM-4V", vllm=(V_VISUAL, V_HEAD, V_TEXT)),
    "llama4": Family(
        "Llama 4",
        note="experts; auto-round 0.16.1 in Transformers weighs their outputs, not their inputs",
    ),
    "lfm2_vl": Family("LFM2-VL", vllm=V_TOWER),
    "deepseek_vl": Family("DeepSeek-VL"),
    "kimi_k25": Family(
        "Kimi K2.5",
        note=(
            "experts; the tower's attention stays in 16 bits, and Transformers with auto-round"
            " misses it"
        ),
    ),
    "whisper": Family(
        "Whisper",
        ("audio",),
        ("encoder", "text"),
        towers={"encoder": "encoder"},
        vllm=((r"\.fc([12])\.", r".mlp.fc\1."),),
    ),
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
    "qwen2_5_omni": Family(
        "Qwen2.5-Omni",
        ("text", "image", "audio"),
        ("audio", "vision", "text"),
        note="its thinker is quantized; talker, vocoder and voices come along",
        vllm=V_THINKER,
    ),
    "qwen3_omni_moe_thinker": Family(
        "Qwen3-Omni thinker",
        ("text", "image", "audio"),
        ("audio", "vision", "text"),
        connectors=("merger_list",),
        note="deep-stacked vision features; experts",
    ),
    "qwen3_omni_moe": Family(
        "Qwen3-Omni",
        ("text", "image", "audio"),
        ("audio", "vision", "text"),
        note="its thinker is quantized; talker and vocoder come along",
        vllm=V_THINKER,
    ),
    "qwen3_5": Family("Qwen3.5", note="a hybrid of linear and full attention"),
    "qwen3_next": Family("Qwen3-Next", TEXT, TEXT, note="linear and full attention; experts"),
    "qwen3_asr": Family("Qwen3-ASR", HEARING, ("audio", "text")),
    "glm4v_moe": Family("GLM-4.5V", note="experts"),
    "glm46v": Family("GLM-4.6V"),
    "ministral3": Family("Ministral 3 text", TEXT, TEXT),
    "paddleocr_vl": Family("PaddleOCR-VL"),
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


# Families that no test goes through, whose names are known.
UNTESTED = {
    "paligemma": Family("PaliGemma", stages=(), vllm=V_TOWER),
    "blt": Family(
        "BLT",
        TEXT,
        stages=(),
        connectors=("cross_attn_layers",),
        towers=dict.fromkeys(("patcher", "local_encoder", "global_transformer"), "nontext"),
        decoder="model.local_decoder",
    ),
    "idefics": Family("IDEFICS", ("image",), stages=(), connectors=("gated_cross_attn_layers",)),
    "gemma3n": Family("Gemma 3n", stages=(), vllm=V_GEMMA),
    "gemma4_unified": Family("Gemma 4 unified", stages=(), vllm=V_GEMMA),
}

# Without a quirk: read by their structure, and tested by the sweep in every run of the tests.
PLAIN = {
    "MiniCPMV4_6ForConditionalGeneration": Family(
        "MiniCPM-V 4.6", stages=("vision", "nontext", "text")
    ),
    "Ernie4_5_VLMoeForConditionalGeneration": Family("ERNIE-4.5-VL", note="experts"),
    "DeepseekOcr2ForConditionalGeneration": Family("DeepSeek-OCR 2", note="experts"),
    "Florence2ForConditionalGeneration": Family("Florence-2", stages=("vision", "encoder", "text")),
    "Ovis2ForConditionalGeneration": Family("Ovis2"),
    "AriaForConditionalGeneration": Family("Aria", note="experts"),
    "Granite4VisionForConditionalGeneration": Family(
        "Granite 4 Vision", stages=("vision", "nontext", "text")
    ),
    "GraniteMoeHybridForCausalLM": Family("Granite 4", TEXT, TEXT, note="hybrid; experts"),
    "MoonshineForConditionalGeneration": Family("Moonshine", ("audio",), ("audio", "text")),
    "ParakeetForCTC": Family("Parakeet", ("audio",), TEXT),
    "GptOssForCausalLM": Family("gpt-oss", TEXT, TEXT, note="experts"),
    "MiniMaxM2ForCausalLM": Family("MiniMax-M2", TEXT, TEXT, note="experts"),
    "DeepseekV3ForCausalLM": Family("DeepSeek-V3", TEXT, TEXT, note="experts"),
}


def family_of(model_type: str) -> Family:
    """The family's entry, or one without quirks."""
    known = {**FAMILIES, **UNTESTED}
    return known.get(model_type, Family(model_type, stages=()))


def vllm_rename(model_type: str, name: str) -> str:
    """A name or a prefix of one, from the checkpoint or the configuration, in vLLM's spelling."""
    for pattern, new in family_of(model_type).vllm:
        name = re.sub(pattern, new, name, count=1)
    return name


def vllm_module(model_type: str, name: str) -> str:
    """The full name of a module, in vLLM's spelling."""
    return vllm_rename(model_type, name + ".").removesuffix(".")


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
