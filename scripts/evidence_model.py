"""The evidence model: Qwen2.5-Coder-0.5B as the text of a real Qwen2-VL, with a small tower."""

from __future__ import annotations

from pathlib import Path

import torch
from demo_model import CHAT_TEMPLATE
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.initialization import no_init_weights

# Of the demo model, whose trained tower is where this one starts.
TOWER = {"depth": 4, "embed_dim": 128, "num_heads": 4}
LAST = "merger.mlp.2"


# What the template says where no system message is given. Told so, the text model answers half of
# the questions right before anything is trained.
SYSTEM = """You see a picture, told as words such as "left red star; middle word lion; number \
407". Answer in one short sentence.
What color is the star? The star is red.
What shape is red? The red shape is a star.
Where is the star? The star is on the left.
Where is the ring? The ring is in the middle.
What is on the left? The left is a red star.
What is on the right? The right is empty.
How many shapes are there? There are two shapes.
How many shapes are there? There is one shape.
What is the word? The word is lion.
What is the number? The number is 407."""


def sections(half: int) -> list[int]:
    """Of `half` frequencies, those that turn with time, height and width: all with the width.

    Qwen2-VL gives the fast ones to time, which the picture's tokens share. A text model that was
    never trained on pictures would take them for a bag; so it reads them one after the other.
    """
    return [0, 0, half]


def build_processor(tokenizer) -> Qwen2VLProcessor:
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=dict(pixels)),
        tokenizer,
        Qwen2VLVideoProcessor(size=dict(pixels)),
        CHAT_TEMPLATE.replace("You are a helpful assistant.", SYSTEM),
    )


def build_config(text, tokenizer, tower: dict[str, int]) -> Qwen2VLConfig:
    """Of a Qwen2 text model's configuration; text alone is read at the same positions."""
    token = tokenizer.convert_tokens_to_ids
    kept = text.to_dict()
    for key in ("architectures", "model_type", "torch_dtype", "dtype", "_name_or_path"):
        kept.pop(key, None)
    head = text.hidden_size // text.num_attention_heads
    kept["rope_parameters"] = {**text.rope_parameters, "mrope_section": sections(head // 2)}
    ids = {"bos_token_id": text.bos_token_id, "eos_token_id": text.eos_token_id}
    return Qwen2VLConfig(
        text_config=kept,
        vision_config={**tower, "hidden_size": text.hidden_size},
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=text.tie_word_embeddings,
        **ids,
    )


def build(
    text_folder: Path, tower: dict[str, int] = TOWER
) -> tuple[Qwen2VLForConditionalGeneration, Qwen2VLProcessor]:
    """The text model of a folder in a Qwen2-VL whose tower is random, in bfloat16, frozen."""
    text = AutoModelForCausalLM.from_pretrained(text_folder, dtype=torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    config = build_config(text.config, tokenizer, tower)
    config.dtype = torch.bfloat16
    with no_init_weights():
        model = Qwen2VLForConditionalGeneration._from_config(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model.generation_config = GenerationConfig(
        do_sample=False, bos_token_id=text.config.bos_token_id,
        eos_token_id=[end, text.config.bos_token_id], pad_token_id=text.config.bos_token_id,
    )  # fmt: skip
    return model.eval().requires_grad_(False), build_processor(tokenizer)


def join(
    text_folder: Path, trained: Path
) -> tuple[Qwen2VLForConditionalGeneration, Qwen2VLProcessor]:
    """The text model with the tower that was trained for it; the text's tensors are untouched."""
    model, processor = build(text_folder)
    model.model.visual.load_state_dict(load_file(trained))
    return model, processor


def folded(tower: dict[str, torch.Tensor], table: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tower whose last layer names features, with one that says them to the text model: the sum
    of the rows of `table` (features, D) is linear, so both are one layer."""
    last = {
        f"{LAST}.weight": table.T @ tower[f"{LAST}.weight"],
        f"{LAST}.bias": table.T @ tower[f"{LAST}.bias"],
    }
    return tower | last
