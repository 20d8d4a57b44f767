"""Tiny random models of every architecture that GGUF can hold, with tokenizers, and their
export."""

import json
from pathlib import Path

import torch
import transformers
from nearest import round_to_nearest
from safetensors import safe_open
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from auto_mmround.checkpoint.folder import write_config, write_side_files
from auto_mmround.export import formats
from auto_mmround.export.format import Whole
from auto_mmround.export.gguf import tokens as gguf_tokens
from auto_mmround.export.layout import Layout
from auto_mmround.numerics.grids import Grid
from auto_mmround.recipe.schemes import Scheme

VOCABULARY = 320
TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "initializer_range": 0.1, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
}  # fmt: skip
QWEN_VISION = {
    "depth": 4,
    "num_heads": 2,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "initializer_range": 0.1,
}
PLACES = {
    "vision_start_token_id": 263,
    "vision_end_token_id": 264,
    "image_token_id": 265,
    "video_token_id": 266,
}
MROPE = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [4, 6, 6]}
# Sections like the real [24, 20, 20]: for dimensions that no section reaches llama.cpp takes no
# position at all.
INTERLEAVED = {**MROPE, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 2,
         "initializer_range": 0.1}  # fmt: skip
GEMMA = {
    **TEXT,
    "num_hidden_layers": 7,
    "sliding_window": 16,
    "query_pre_attn_scalar": 32,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}
CONFIGS = {
    "llama": {**TEXT, "tie_word_embeddings": False},
    "llama, llama3 rope, biases": {**TEXT, "rope_parameters": LLAMA3, "attention_bias": True},
    "mistral": {**TEXT, "sliding_window": None},
    "qwen2": TEXT,
    "qwen3": TEXT,
    "gemma3_text": GEMMA,
    "qwen2_vl": {
        **PLACES,
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "embed_dim": 64, "hidden_size": 128, "mlp_ratio": 2},
    },
    "qwen2_5_vl": {
        **PLACES,
        "text_config": {**TEXT, "rope_parameters": MROPE},
        "vision_config": {**QWEN_VISION, "hidden_size": 64, "intermediate_size": 96,
            "out_hidden_size": 128,
                          "fullatt_block_indexes": [1, 3]},
    },
    "qwen3_vl": {
        **PLACES,
        "text_config": {**TEXT, "num_hidden_layers": 4, "rope_parameters": INTERLEAVED},
        "vision_config": {**QWEN_VISION, "patch_size": 16, "hidden_size": 64,
            "intermediate_size": 96,
                          "out_hidden_size": 128, "num_position_embeddings": 64,
                          "deepstack_visual_indexes": [0, 2]},
    },
    "gemma3": {
        "text_config": GEMMA, "mm_tokens_per_image": 4, "boi_token_index": 269,
        "eoi_token_index": 270,
        "image_token_index": 271,
        "vision_config": {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 2,
                          "image_size": 56, "patch_size": 14, "vision_use_head": False},
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"}, "image_token_index": 265,
        "vision_config": {**SMALL, "model_type": "clip_vision_model", "num_hidden_layers": 3,
            "image_size": 56,
                          "patch_size": 14, "hidden_act": "quick_gelu"},
    },
    "llava, Pixtral": {
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None},
        "image_token_index": 265,
        "vision_feature_layer": -1, "vision_feature_select_strategy": "full",
        "vision_config": {**SMALL, "model_type": "pixtral", "head_dim": 32, "image_size": 168,
            "patch_size": 14,
                          "hidden_act": "silu"},
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral", "sliding_window": None,
            "rms_norm_eps": 1e-5},
        "image_token_index": 265, "spatial_merge_size": 2,
        "vision_config": {**SMALL, "model_type": "pixtral", "head_dim": 32, "image_size": 168,
            "patch_size": 14,
                          "hidden_act": "silu"},
    },
    "idefics3": {
        "text_config": {**TEXT, "model_type": "llama"}, "image_token_id": 265, "scale_factor": 2,
        "vision_config": {**SMALL, "image_size": 56, "patch_size": 14,
            "hidden_act": "gelu_pytorch_tanh"},
    },
    "smolvlm": {
        "text_config": {**TEXT, "model_type": "llama"}, "image_token_id": 265, "scale_factor": 2,
        "vision_config": {**SMALL, "image_size": 56, "patch_size": 14,
            "hidden_act": "gelu_pytorch_tanh"},
    },
}  # fmt: skip


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer that splits like Qwen2's."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        token: i
        for i, token in enumerate(["<s>", "</s>", "<pad>", *letters, "th", "the", "Ġthe", "ĊĊ"])
    }
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("Ċ", "Ċ")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    expression = next(key[0] for key, name in gguf_tokens.PRE_TOKENIZERS.items() if name == "qwen2")
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        ["<s>", "</s>", "<pad>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    )
    rows = [f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2)]
    marks = [
        "<|video_pad|>",
        "[IMG_BREAK]",
        "[IMG_END]",
        "<fake_token_around_image>",
        "<global-img>",
        *rows,
    ]
    tokenizer.add_special_tokens(marks)
    return tokenizer


def sentencepiece_like_tokenizer() -> Tokenizer:
    """BPE with byte fallback and ▁ for spaces, like Gemma's."""
    pieces = [
        "<s>",
        "</s>",
        "<pad>",
        "<unk>",
        *(f"<0x{i:02X}>" for i in range(256)),
        *"▁theca",
        "th",
        "the",
        "▁the",
    ]
    merges = [("t", "h"), ("th", "e"), ("▁", "the")]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(
        ["<s>", "</s>", "<pad>", "<unk>", "<start_of_image>", "<end_of_image>", "<image>"]
    )
    return tokenizer


def tiny(case: str, folder: Path) -> Path:
    """A folder with a random model of that kind, its tokenizer and an image processor's
    configuration."""
    torch.manual_seed(0)
    model_type = case.partition(",")[0]
    config = CONFIG_MAPPING[model_type].from_dict(CONFIGS[case])
    classes = (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM)
    model = classes["vision_config" not in CONFIGS[case]].from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # norms and biases are all ones or zeros otherwise
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "embed" in name and "patch" not in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer = sentencepiece_like_tokenizer() if "gemma" in case else byte_level_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"
    )
    special = {
        "chat_template": template,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    if case == "gemma3":
        extra = {
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image>",
        }
        special["extra_special_tokens"] = extra
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    if "vision_config" in CONFIGS[case]:
        means = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
        if "scale_factor" in CONFIGS[case]:
            means["size"] = {"longest_edge": 2 * CONFIGS[case]["vision_config"]["image_size"]}
        (folder / "preprocessor_config.json").write_text(json.dumps(means))
    return folder


def source_tensors(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def export(source: Path, out: Path, quantize: bool, fmt: str = "gguf:q4_0", codes_of=None) -> Path:
    """The model in GGUF: with its text blocks' weights rounded to 4 bits (or as ``codes_of`` does),
    or all as is."""
    tensors = source_tensors(source)
    codes = {}
    codes_of = codes_of or (lambda w_OI: round_to_nearest(w_OI, 32, Grid(4, True)))
    if quantize:
        chosen = [
            key
            for key in tensors
            if "layers." in key and key.endswith("_proj.weight") and "vision" not in key
        ]
        codes = {key.removesuffix(".weight"): codes_of(tensors.pop(key)) for key in chosen}
    out.mkdir()
    write_side_files(source, out)
    config = json.loads((source / "config.json").read_text())
    write = formats.FORMATS[fmt].write
    assert write is not None
    whole = Whole(codes, tensors.items(), config, Layout({}, [], [], str, Scheme(4, 32)), source)
    write_config(out, config, write(out, whole))
    return out
