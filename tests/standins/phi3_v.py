"""A stand-in for Phi-3.5-vision, whose code comes with its checkpoint: same module tree, names,
processor protocol."""

import re

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.generation import GenerationMixin
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.modeling_outputs import CausalLMOutputWithPast


class Phi3VConfig(PreTrainedConfig):
    model_type = "phi3_v"

    def __init__(
        self,
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        **kwargs,
    ):
        self.vocab_size, self.hidden_size, self.intermediate_size = (
            vocab_size,
            hidden_size,
            intermediate_size,
        )
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        super().__init__(**{"tie_word_embeddings": False} | kwargs)


class Phi3Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)

    def forward(self, hidden_states, attention_mask, position_ids):
        batch, length, width = hidden_states.shape
        qkv = (
            self.qkv_proj(hidden_states)
            .view(batch, length, 3, self.heads, -1)
            .permute(2, 0, 3, 1, 4)
        )
        mixed = nn.functional.scaled_dot_product_attention(*qkv, attn_mask=attention_mask)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, length, width))


class Phi3MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up * nn.functional.silu(gate))


class Phi3DecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = Phi3Attention(config), Phi3MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size)

    def forward(self, hidden_states, attention_mask=None, position_ids=None, past_key_value=None):
        hidden_states = hidden_states + self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, position_ids
        )
        return (hidden_states + self.mlp(self.post_attention_layernorm(hidden_states)),)


class Phi3ImageEmbedding(nn.Module):
    def __init__(self, config):
        super().__init__()
        vision = CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        self.img_processor = CLIPVisionModel(vision)
        self.glb_GN = nn.Parameter(torch.zeros(1, 1, 256))
        self.sub_GN = nn.Parameter(torch.zeros(1, 1, 1, 256))
        width = config.hidden_size
        self.img_projection = nn.Sequential(
            nn.Linear(256, width), nn.GELU(), nn.Linear(width, width)
        )

    def forward(self, embeds, input_ids, pixel_values):
        """pixel_values: (images, crops, 3, 16, 16); four merged patches a crop, one separator an
        image."""
        features = self.img_processor(
            pixel_values.flatten(0, 1), output_hidden_states=True
        ).hidden_states[-2][:, 1:]
        features = features.reshape(len(pixel_values), -1, 256)
        features = torch.cat([features, self.glb_GN.expand(len(features), -1, -1)], 1)
        embeds[input_ids < 0] = self.img_projection(features).flatten(0, 1).to(embeds)
        return embeds


class Phi3VModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.vision_embed_tokens = Phi3ImageEmbedding(config)
        self.layers = nn.ModuleList(
            [Phi3DecoderLayer(config) for _ in range(config.num_hidden_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size)


class Phi3VForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = Phi3VConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = Phi3VModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
        inputs_embeds=None,
        pixel_values=None, image_sizes=None, labels=None, use_cache=None, **kwargs,
    ):  # fmt: skip
        hidden_states = self.model.embed_tokens(input_ids.clamp(min=0))
        if pixel_values is not None:
            hidden_states = self.model.vision_embed_tokens(hidden_states, input_ids, pixel_values)
        length = input_ids.shape[1]
        position_ids = torch.arange(length, device=input_ids.device)[None]
        mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[
            None, None
        ]
        for layer in self.model.layers:
            hidden_states = layer(hidden_states, attention_mask=mask, position_ids=position_ids)[0]
        return CausalLMOutputWithPast(logits=self.lm_head(self.model.norm(hidden_states)))


class Phi3VImageProcessor(BaseImageProcessor):
    model_input_names = ("pixel_values", "image_sizes")


class Phi3VProcessor(ProcessorMixin):
    """`processor(text: str, images)`: text with <|image_1|> .. becomes ids with -1 .. in the places
    of the features."""

    attributes = ("image_processor", "tokenizer")
    image_processor_class = "AutoImageProcessor"
    tokenizer_class = "AutoTokenizer"

    def __call__(
        self,
        text,
        images=None,
        padding=False,
        truncation=None,
        max_length=None,
        return_tensors="pt",
    ):
        import numpy as np

        if not images:
            return BatchFeature(self.tokenizer(text, return_tensors=return_tensors))
        if not isinstance(text, str):
            raise TypeError("expected string or bytes-like object, got 'list'")
        tag = r"<\|image_(\d+)\|>"
        words = [self.tokenizer(part).input_ids for part in re.split(r"<\|image_\d+\|>", text)]
        numbers = [int(number) for number in re.findall(tag, text)]
        assert sorted(set(numbers)) == list(range(1, len(images) + 1)), "tags and images differ"
        row = list(words[0])
        for number, part in zip(numbers, words[1:]):
            row += [-number] * 9 + part
        pixels = [
            np.asarray(image.resize((16, 16)), np.float32).transpose(2, 0, 1) / 255
            for image in images
        ]
        ids = torch.tensor([row])
        return BatchFeature(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": torch.stack(
                    [torch.from_numpy(p)[None].repeat(2, 1, 1, 1) for p in pixels]
                ),
                "image_sizes": torch.tensor([[16, 16]] * len(images)),
            }
        )
