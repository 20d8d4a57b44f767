"""A stand-in for CogVLM2, whose code comes with its checkpoint: same module tree, names and
inputs."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

VISION = 1


class CogVLMConfig(PreTrainedConfig):
    model_type = "cogvlm2"

    def __init__(
        self, vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2,
        num_multi_query_heads=1, vision_config=None, template_version="chat", **kwargs,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size, self.intermediate_size = (
            vocab_size,
            hidden_size,
            intermediate_size,
        )
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.num_multi_query_heads, self.template_version = num_multi_query_heads, template_version
        self.vision_config = vision_config or dict(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_heads=2,
            image_size=16,
            patch_size=4,
            in_channels=3,
        )
        super().__init__(**{"tie_word_embeddings": False} | kwargs)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class VisionExpertMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.language_mlp, self.vision_mlp = MLP(config), MLP(config)

    def forward(self, hidden_states, token_type_ids):
        output = torch.empty_like(hidden_states)
        vision = token_type_ids == VISION
        output[vision] = self.vision_mlp(hidden_states[vision])
        output[~vision] = self.language_mlp(hidden_states[~vision])
        return output


class VisionExpertAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        width = config.hidden_size
        self.heads, self.shared = config.num_attention_heads, config.num_multi_query_heads
        both = width + 2 * self.shared * width // self.heads
        self.vision_expert_query_key_value = nn.Linear(width, both)
        self.vision_expert_dense = nn.Linear(width, width, bias=False)
        self.language_expert_query_key_value = nn.Linear(width, both, bias=False)
        self.language_expert_dense = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states, token_type_ids, position_ids, attention_mask):
        batch, length, width = hidden_states.shape
        vision = token_type_ids == VISION
        size = self.shared * width // self.heads
        qkv = hidden_states.new_empty(batch, length, width + 2 * size)
        qkv[vision] = self.vision_expert_query_key_value(hidden_states[vision])
        qkv[~vision] = self.language_expert_query_key_value(hidden_states[~vision])
        query, key, value = (
            part.view(batch, length, -1, width // self.heads).transpose(1, 2)
            for part in qkv.split([width, size, size], -1)
        )
        mixed = nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, enable_gqa=True
        )
        mixed = mixed.transpose(1, 2).reshape(batch, length, width)
        output = torch.empty_like(mixed)
        output[vision] = self.vision_expert_dense(mixed[vision])
        output[~vision] = self.language_expert_dense(mixed[~vision])
        return output


class CogVLMDecoderLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.self_attn, self.mlp = VisionExpertAttention(config), VisionExpertMLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size)

    def forward(
        self, hidden_states, token_type_ids, position_ids, attention_mask=None, past_key_value=None
    ):
        normed = self.input_layernorm(hidden_states)
        hidden_states = hidden_states + self.self_attn(
            normed, token_type_ids, position_ids, attention_mask
        )
        return (
            hidden_states + self.mlp(self.post_attention_layernorm(hidden_states), token_type_ids),
        )


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.query_key_value, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        batch, length, width = x.shape
        qkv = self.query_key_value(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(*qkv)
        return self.dense(mixed.transpose(1, 2).reshape(batch, length, width))


class VisionMLP(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x):
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class TransformerLayer(nn.Module):
    def __init__(self, vision):
        super().__init__()
        width = vision["hidden_size"]
        self.input_layernorm = nn.LayerNorm(width)
        self.attention = Attention(width, vision["num_heads"])
        self.mlp = VisionMLP(width, vision["intermediate_size"])
        self.post_attention_layernorm = nn.LayerNorm(width)

    def forward(self, hidden_states):
        hidden_states = hidden_states + self.input_layernorm(self.attention(hidden_states))
        return hidden_states + self.post_attention_layernorm(self.mlp(hidden_states))


class Transformer(nn.Module):
    def __init__(self, vision):
        super().__init__()
        self.layers = nn.ModuleList(
            [TransformerLayer(vision) for _ in range(vision["num_hidden_layers"])]
        )

    def forward(self, hidden_states):
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class GLU(nn.Module):
    def __init__(self, config):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.linear_proj = nn.Linear(config.vision_config["hidden_size"], width, bias=False)
        self.norm1 = nn.LayerNorm(width)
        self.dense_h_to_4h, self.gate_proj = (
            nn.Linear(width, inner, bias=False),
            nn.Linear(width, inner, bias=False),
        )
        self.dense_4h_to_h = nn.Linear(inner, width, bias=False)

    def forward(self, x):
        x = nn.functional.gelu(self.norm1(self.linear_proj(x)))
        return self.dense_4h_to_h(nn.functional.silu(self.gate_proj(x)) * self.dense_h_to_4h(x))


class EVA2CLIPModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        vision = config.vision_config
        width = vision["hidden_size"]
        self.patch_embedding = nn.Conv2d(3, width, vision["patch_size"], vision["patch_size"])
        self.transformer = Transformer(vision)
        self.linear_proj = GLU(config)
        self.conv = nn.Conv2d(width, width, 2, 2)
        self.boi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.eoi = nn.Parameter(torch.zeros(1, 1, config.hidden_size))

    def forward(self, images):
        x = self.patch_embedding(images)
        side = x.shape[-1]
        x = self.transformer(x.flatten(2).transpose(1, 2))
        x = self.conv(x.transpose(1, 2).unflatten(2, (side, side))).flatten(2).transpose(1, 2)
        x = self.linear_proj(x)
        return torch.cat([self.boi.expand(len(x), -1, -1), x, self.eoi.expand(len(x), -1, -1)], 1)


class CogVLMModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            [CogVLMDecoderLayer(config) for _ in range(config.num_hidden_layers)]
        )
        self.norm = nn.RMSNorm(config.hidden_size)
        self.vision = EVA2CLIPModel(config)


class CogVLMForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = CogVLMConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = CogVLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embed_tokens

    def forward(
        self, input_ids=None, images=None, token_type_ids=None, attention_mask=None,
        position_ids=None,
        past_key_values=None, inputs_embeds=None, use_cache=None, labels=None, **kwargs,
    ):  # fmt: skip
        hidden_states = self.model.embed_tokens(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if images is not None:
            pixels = torch.stack([image for row in images for image in row])
            features = self.model.vision(pixels.to(hidden_states)).flatten(0, 1)
            hidden_states = hidden_states.index_put([token_type_ids == VISION], features)
        length = input_ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).tril()[
            None, None
        ]
        position_ids = torch.arange(length, device=input_ids.device)[None]
        for layer in self.model.layers:
            hidden_states = layer(hidden_states, token_type_ids, position_ids, attention_mask=mask)[
                0
            ]
        return CausalLMOutputWithPast(logits=self.lm_head(self.model.norm(hidden_states)))
