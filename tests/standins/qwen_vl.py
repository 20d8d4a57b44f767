"""Stands for Qwen-VL, whose code came with its checkpoint: fused and oddly named layers, an older
way to write a model, a tower inside of the text model with a resampler behind it."""

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

BEGIN, END = 91, 92  # around the places of a picture


class QWenConfig(PreTrainedConfig):
    model_type = "qwen_vl_old"

    def __init__(
        self, vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=192, seq_length=256, visual=None, use_flash_attn="auto", **kwargs,
    ):  # fmt: skip
        self.vocab_size, self.hidden_size = vocab_size, hidden_size
        self.num_hidden_layers, self.num_attention_heads = num_hidden_layers, num_attention_heads
        self.intermediate_size, self.seq_length = intermediate_size, seq_length
        self.visual = visual or {"width": 64, "layers": 2, "heads": 2, "queries": 4, "patch": 4}
        self.use_flash_attn = use_flash_attn
        super().__init__(**{"tie_word_embeddings": False} | kwargs)


def attend(qkv_BTD, heads, causal):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in qkv_BTD.chunk(3, -1))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return mixed.transpose(1, 2).flatten(2)


class VisualAttention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj, self.out_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        return self.out_proj(attend(self.in_proj(x), self.heads, False))


class VisualAttentionBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = VisualAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width))

    def forward(self, x):
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class TransformerBlock(nn.Module):
    def __init__(self, visual):
        super().__init__()
        self.resblocks = nn.ModuleList(
            [
                VisualAttentionBlock(visual["width"], visual["heads"])
                for _ in range(visual["layers"])
            ]
        )

    def forward(self, x):
        for block in self.resblocks:
            x = block(x)
        return x


class VisionTransformer(nn.Module):
    def __init__(self, visual, width):
        super().__init__()
        size = visual["width"]
        self.conv1 = nn.Conv2d(3, size, visual["patch"], visual["patch"], bias=False)
        self.ln_pre, self.ln_post = nn.LayerNorm(size), nn.LayerNorm(width)
        self.transformer = TransformerBlock(visual)
        self.query = nn.Parameter(torch.zeros(visual["queries"], width))
        self.kv_proj = nn.Linear(size, width, bias=False)
        self.proj = nn.Parameter(torch.zeros(width, width))

    def forward(self, images):
        x = self.transformer(self.ln_pre(self.conv1(images).flatten(2).transpose(1, 2)))
        kv = self.kv_proj(x)
        share = (self.query @ kv.transpose(1, 2)).softmax(-1)
        return self.ln_post(share @ kv) @ self.proj


class QWenAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.heads = config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.c_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(attend(self.c_attn(x), self.heads, True))


class QWenMLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        half = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, half, bias=False)
        self.w2 = nn.Linear(config.hidden_size, half, bias=False)
        self.c_proj = nn.Linear(half, config.hidden_size, bias=False)

    def forward(self, x):
        return self.c_proj(self.w1(x) * nn.functional.silu(self.w2(x)))


class QWenBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1, self.ln_2 = nn.RMSNorm(config.hidden_size), nn.RMSNorm(config.hidden_size)
        self.attn, self.mlp = QWenAttention(config), QWenMLP(config)

    def forward(self, hidden_states, layer_past=None, attention_mask=None):
        x = hidden_states + self.attn(self.ln_1(hidden_states))
        return (x + self.mlp(self.ln_2(x)),)


class QWenPreTrainedModel(PreTrainedModel):
    config_class = QWenConfig
    base_model_prefix = "transformer"


class QWenModel(QWenPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList([QWenBlock(config) for _ in range(config.num_hidden_layers)])
        self.ln_f = nn.RMSNorm(config.hidden_size)
        self.visual = VisionTransformer(config.visual, config.hidden_size)
        self.post_init()

    def forward(self, input_ids, images=None, attention_mask=None, use_cache=None):
        x = self.wte(input_ids)
        if images is not None:
            features = self.visual(images).to(x)
            x = x.clone()
            starts = (input_ids[0] == BEGIN).nonzero()[:, 0].tolist()
            for start, one in zip(starts, features, strict=True):
                x[0, start + 1 : start + 1 + len(one)] = one
        for block in self.h:
            x = block(x, layer_past=None, attention_mask=attention_mask)[0]
        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(x))


class QWenLMHeadModel(QWenPreTrainedModel, GenerationMixin):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.wte

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new):
        self.lm_head = new

    def forward(self, input_ids=None, images=None, attention_mask=None, use_cache=None, **kwargs):
        out = self.transformer(input_ids, images, attention_mask)
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state))
