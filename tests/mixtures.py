"""Tiny models of every family of Transformers that holds experts, built from its configuration
class: what `tests/test_experts.py` takes through plan, export and reload.

`SMALL` says how large a field of that name is, in any configuration; families whose fields
contradict each other so get a row in `ROWS`.
"""

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

SMALL: dict[str, Any] = dict(
    hidden_size=64, d_model=64, intermediate_size=64, ffn_dim=64, num_hidden_layers=2,
    num_layers=2, n_layers=2, depth=2, num_attention_heads=2, n_heads=2, num_heads=2,
    num_key_value_heads=2, head_dim=32, vocab_size=128, max_position_embeddings=512,
    max_seq_len=512, pad_token_id=0, bos_token_id=1, eos_token_id=2, num_experts=4,
    num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_topk=2,
    moe_k=2, moe_top_k=2, top_k_experts=2, num_experts_per_token=2, n_group=1, topk_group=1,
    num_expert_groups=1, num_expert_group=1, moe_intermediate_size=32, expert_ffn_hidden_size=32,
    moe_ffn_hidden_size=32, shared_expert_intermediate_size=32, shared_intermediate_size=32,
    moe_shared_expert_intermediate_size=32, intermediate_size_mlp=96, n_shared_experts=1,
    num_shared_experts=1, moe_num_shared_experts=1, first_k_dense_replace=1, q_lora_rank=32,
    kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32, qk_head_dim=32,
    image_size=16, patch_size=4, projector_hidden_size=64, projection_hidden_size=64,
    vision_output_dim=64, projector_input_dim=64, projector_output_dim=64, out_hidden_size=64,
    linear_key_head_dim=16, linear_value_head_dim=16, linear_num_key_heads=2,
    linear_num_value_heads=2, conv_L_cache=3, mamba_d_state=8, mamba_expand=2, mamba_n_heads=4,
    mamba_d_head=32, mamba_chunk_size=16, mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=8,
    n_groups=1, chunk_size=16, sliding_window=64, index_n_heads=2, index_head_dim=32,
    index_topk=8, image_token_id=120, video_token_id=121, audio_token_id=122,
    image_token_index=120, video_token_index=121, audio_token_index=122,
    swa_num_attention_heads=2, swa_num_key_value_heads=2, swa_head_dim=32, mlp_dim=64,
    output_channels=16, num_nextn_predict_layers=0, mtp_num_hidden_layers=0,
)  # fmt: skip
HYBRID = dict(layer_types=["linear_attention", "full_attention"])
NARROW = dict(head_dim=16)  # beside multi-head latent attention: the part that is rotated
SPARSE = dict(mlp_layer_types=["dense", "sparse"])
ROWS: dict[str, dict[str, Any]] = {
    "axk1": NARROW,
    "bailing_hybrid": HYBRID | NARROW,
    "beam": dict(
        mlp_layer_types=["dense", "sparse"], layer_types=["sliding_attention", "full_attention"]
    ),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(hidden_size=64, ffn_hidden_size=64, moe_top_k=2),
    ),
    "deepseek_v2": NARROW | dict(num_experts_per_tok=2),
    "deepseek_v3": NARROW,
    "deepseek_ocr2": dict(
        text_config=dict(mlp_layer_types=["dense", "sparse"], num_experts_per_tok=2)
    ),
    "doge": dict(is_moe=True, num_experts=16, num_experts_per_tok=4),
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1),
    "ernie4_5_vl_moe": dict(
        text_config=dict(
            moe_intermediate_size=[64, 32],
            mlp_layer_types=["dense", "sparse"],
            hidden_size=64,
            num_attention_heads=2,
            num_key_value_heads=2,
            rope_parameters=dict(rope_theta=1e4, rope_type="default", mrope_section=[4, 4, 8]),
        )
    ),
    "flint": dict(mlp_only_layers=[0], layer_types=["full_attention", "sliding_attention"]),
    "gemma4": dict(
        text_config=dict(
            enable_moe_block=True,
            num_experts=4,
            top_k_experts=2,
            moe_intermediate_size=32,
            vocab_size_per_layer_input=128,
            hidden_size_per_layer_input=0,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
    "glm4_moe": dict(head_dim=32),  # vLLM reads it, though the class has no such field
    "glm4v_moe": dict(
        text_config=dict(
            rope_parameters=dict(
                rope_theta=1e4,
                rope_type="default",
                partial_rotary_factor=0.5,
                mrope_section=[4, 2, 2],
            )
        )
    ),
    "glm5_next": dict(
        text_config=dict(
            index_topk=16,
            qk_rope_head_dim=0,
            qk_nope_head_dim=32,
            v_head_dim=32,
            qk_head_dim=32,
            head_dim=0,
            linear_head_dim=32,
            linear_num_heads=2,
            mlp_layer_types=["dense", "sparse"],
            layer_types=["linear_attention", "full_attention"],
            indexer_types=["full", "full"],
            hc_mult=2,
        )
    ),
    "granitemoehybrid": HYBRID,
    "hunyuan_v1_moe": dict(head_dim=32, num_experts=4, moe_topk=2),
    "jamba": dict(
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_dt_rank=8,
        use_mamba_kernels=False,
    ),
    "kimi_linear": HYBRID
    | NARROW
    | dict(linear_head_dim=32, linear_num_heads=2, mlp_layer_types=["dense", "sparse"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
    "llama4": dict(text_config=dict(num_experts_per_tok=1)),
    "llama4_text": dict(num_experts_per_tok=1),
    "longcat_flash": NARROW | dict(zero_expert_num=2, ffn_hidden_size=64),
    "mimo_v2_flash": dict(
        sliding_window=64,
        v_head_dim=32,
        num_key_value_heads=1,
        layer_types=["full_attention", "sliding_attention"],
        mlp_layer_types=["dense", "sparse"],
    ),
    "muse_spark": dict(
        text_config=dict(
            moe_hidden_size=32,
            mlp_layer_types=["sparse", "dense"],
            layer_types=["sliding_attention", "full_attention"],
            layer_rope_theta=[1e4, 0],
        ),
        audio_config=dict(
            patch_sizes=(4, 2),
            hidden_sizes=(16, 32),
            depths=(1, 1),
            num_hidden_layers=2,
            out_hidden_size=64,
        ),
        vision_config=dict(
            layer_types=["window_attention", "full_attention"], pos_emb_height=4, pos_emb_width=4
        ),
    ),
    "qwen3_5_moe": dict(text_config=HYBRID),
    "qwen3_5_moe_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp": dict(text_config=dict(layer_types=["linear_attention", "linear_attention"])),
    "qwen3_omni_moe_thinker": dict(
        audio_config=dict(
            encoder_layers=2,
            encoder_attention_heads=2,
            encoder_ffn_dim=64,
            downsample_hidden_size=32,
            output_dim=64,
            num_mel_bins=8,
        ),
        text_config=dict(
            rope_parameters=dict(rope_theta=1e4, rope_type="default", mrope_section=[6, 5, 5])
        ),
    ),
    "step3p7": dict(
        text_config=dict(
            mlp_layer_types=["dense", "sparse"],
            layer_types=["full_attention", "sliding_attention"],
            sliding_window=64,
            share_expert_dim=32,
            num_sliding_attention_heads=2,
        )
    ),
    "zaya": dict(num_experts_per_tok=1, router_hidden_size=32, layer_types=["hybrid", "hybrid"]),
}


def families() -> list[str]:
    """Model types in the mappings of causal and image-text models."""
    tables = (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )
    return sorted({kind for table in tables for kind in table})


def class_of(kind: str) -> Any:
    """The model's class."""
    for table in (
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    ):
        if kind in table:
            name = table[kind]
            return getattr(transformers, name if isinstance(name, str) else name[-1])
    raise KeyError(kind)


def shrunk(config: Any) -> dict[str, Any]:
    """The fields of a configuration with the values of SMALL, those of its parts too."""
    made: dict[str, Any] = {}
    parts = set(getattr(config, "sub_configs", {}))
    for key, value in vars(config).items():
        if key in parts or isinstance(value, transformers.PreTrainedConfig):
            if value is not None:
                made[key] = shrunk(value)
        elif key in SMALL and value is not None and not isinstance(value, (list, tuple, dict)):
            made[key] = SMALL[key]
    return made | ({"model_type": config.model_type} if made and config.model_type else {})


def _merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **one,
        **{
            k: _merged(one[k], v) if isinstance(v, dict) and isinstance(one.get(k), dict) else v
            for k, v in other.items()
        },
    }


def config_of(kind: str) -> Any:
    fields = shrunk(AutoConfig.for_model(kind))
    fields.pop("model_type", None)
    return AutoConfig.for_model(kind, **_merged(fields, ROWS.get(kind, {})))


def build(kind: str) -> PreTrainedModel:
    """A random model of the family, the same each time, with weights as large as trained ones."""
    torch.manual_seed(0)
    model = class_of(kind)(config_of(kind))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval().requires_grad_(False)
