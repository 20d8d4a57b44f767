"""Processor and model of the bundled demo, untrained, and the fast passes that train it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from demo_data import GRID, stream
from demo_scenes import conversation
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.vision_utils import get_vision_position_ids

VOCABULARY = 2048
SPECIAL_TOKENS = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
]
CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for"
    " message in messages %}{% if loop.first and message['role'] != 'system'"
    " %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}<|im_start|>{{"
    " message['role'] }}\n{% if message['content'] is string %}{{ message['content']"
    " }}<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] =="
    " 'image' or 'image' in content or 'image_url' in content %}{% set image_count.value ="
    " image_count.value + 1 %}{% if add_vision_id %}Picture {{ image_count.value }}: {% endif"
    " %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == 'video' or 'video' in"
    " content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video {{"
    " video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in"
    " content %}{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{%"
    " if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_processor(documents: list[str], seed: int) -> Qwen2VLProcessor:
    """Learn the byte-level BPE merges and put them in the real Qwen2-VL processor classes."""
    rng = stream(seed, "order")
    # Question words must be frequent enough to become single tokens.
    chats = [
        f"{q}\n{a}"
        for _ in range(1500)
        for q, a in conversation(rng, int(rng.integers(1, 3)), 4)[1]
    ]
    chats += ["system\nYou are a helpful assistant.", "user\n", "assistant\n"] * 500
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS), initial_alphabet=alphabet, show_progress=False
    )
    learner.train_from_iterator(documents + chats, trainer)
    bpe = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=bpe["vocab"],
        merges=[tuple(merge) for merge in bpe["merges"]],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        additional_special_tokens=SPECIAL_TOKENS,
    )
    assert len(tokenizer) == VOCABULARY
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    return Qwen2VLProcessor(
        Qwen2VLImageProcessor(size=dict(pixels)),
        tokenizer,
        Qwen2VLVideoProcessor(size=dict(pixels)),
        CHAT_TEMPLATE,
    )


def build_model(processor: Qwen2VLProcessor) -> Qwen2VLForConditionalGeneration:
    token = processor.tokenizer.convert_tokens_to_ids
    ids = {"bos_token_id": token("<|endoftext|>"), "eos_token_id": token("<|im_end|>")}
    config = Qwen2VLConfig(
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=5,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            rms_norm_eps=1e-6,
            initializer_range=0.05,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
            },
            tie_word_embeddings=True,
            **ids,
        ),
        vision_config={
            "depth": 4,
            "embed_dim": 128,
            "hidden_size": 256,
            "num_heads": 4,
            "initializer_range": 0.05,
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        **ids,
    )
    model = Qwen2VLForConditionalGeneration(config)
    attend_to_alike(model)
    model.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=ids["bos_token_id"],
        eos_token_id=[ids["eos_token_id"], ids["bos_token_id"]],
        pad_token_id=ids["bos_token_id"],
    )
    return model


def attend_to_alike(model: Qwen2VLForConditionalGeneration) -> None:
    """Start the text layers with attention to tokens of like content, which it copies.

    Queries start equal to keys, and output projections as the transpose of the values.  Image
    tokens are made similar to the words for what they show (stage 1), so a question about the star
    looks at the star from the first step. From the usual random start, finding that out takes most
    of the training.
    """
    for layer in model.model.language_model.layers:
        attention = layer.self_attn
        groups, width = attention.num_key_value_groups, attention.head_dim

        def spread(weight, groups=groups, width=width):  # of the key/value heads to all heads
            return (
                weight.view(-1, width, weight.shape[1]).repeat_interleave(groups, 0).flatten(0, 1)
            )

        with torch.no_grad():
            attention.k_proj.weight.mul_(1.5)
            attention.q_proj.weight.copy_(spread(attention.k_proj.weight))
            attention.o_proj.weight.copy_(spread(attention.v_proj.weight).T)


def attend(query, key, value, scaling: float, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Attention in plain matrix products: at these lengths several times as fast on a CPU as the
    fused kernel."""
    batch, heads, length, width = query.shape
    query, key, value = (x.reshape(batch * heads, length, width) for x in (query, key, value))
    mask = query.new_zeros(1, 1, 1) if mask is None else mask.to(query.dtype)
    weights = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=scaling).softmax(-1)
    return torch.bmm(weights, value).view(batch, heads, length, width).transpose(1, 2)


def causal_attention(module, query, key, value, attention_mask, scaling, **_):
    """`attend` behind the library's attention interface; causal unless a mask (batch, length,
    length) is given."""
    groups = module.num_key_value_groups
    key, value = (x.repeat_interleave(groups, dim=1).to(query.dtype) for x in (key, value))
    length = query.shape[2]
    if attention_mask is None:
        mask = torch.full((1, length, length), -math.inf).triu(1)
    else:
        mask = attention_mask.to(query.dtype).repeat_interleave(query.shape[1], dim=0)
    return attend(query, key, value.to(query.dtype), scaling, mask), None


def patch_states(tower: torch.nn.Module, pixels: torch.Tensor, rows: int) -> Iterator[torch.Tensor]:
    """The vision tower's hidden state (images, patches, width) after each block, for images of one
    size, so many rows of patches, batched.

    The library's own pass calls attention for one image after the other, and a slow 3d convolution.
    """
    images, patches, _ = pixels.shape
    hidden = F.linear(pixels, tower.patch_embed.proj.weight.flatten(1))
    cos, sin = tower.rotary_pos_emb(
        hidden, get_vision_position_ids(torch.tensor([[1, rows, patches // rows]]), 2)
    )
    half = cos.shape[-1] // 2

    def rotate(x: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    for block in tower.blocks:
        attention = block.attn
        qkv = attention.qkv(block.norm1(hidden)).view(images, patches, 3, attention.num_heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = attend(
            rotate(query).to(value.dtype), rotate(key).to(value.dtype), value, attention.scaling
        )
        hidden = hidden + attention.proj(mixed.flatten(2))
        hidden = hidden + block.mlp(block.norm2(hidden))
        yield hidden


def merged(tower: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Image tokens (images, patches / 4, hidden size) of the last state."""
    return tower.merger(hidden.flatten(0, 1)).view(len(hidden), hidden.shape[1] // 4, -1)


def image_tokens(
    tower: torch.nn.Module, pixels: torch.Tensor, rows: int = 2 * GRID
) -> torch.Tensor:
    """The vision tower's whole pass."""
    *_, hidden = patch_states(tower, pixels, rows)
    return merged(tower, hidden)
