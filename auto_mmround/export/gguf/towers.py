"""Vision towers as llama.cpp's `mmproj` files see them: tensor names, steps and metadata, a table
entry a family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from auto_mmround.errors import UserError
from auto_mmround.export.gguf.models import FRAMES, PLUS_ONE, THIRDS, Part, Step, rotary, rules

_QWEN = {
    "patch_embed.proj.weight": "v.patch_embd.weight v.patch_embd.weight.1",
    "blocks.{}.norm1": "v.blk.{}.ln1",
    "blocks.{}.norm2": "v.blk.{}.ln2",
    "blocks.{}.attn.proj": "v.blk.{}.attn_out",
    "merger.ln_q": "v.post_ln",
    "merger.mlp.0": "mm.0",
    "merger.mlp.2": "mm.2",
}
_QWEN_SPLIT = {"blocks.{}.attn.qkv": "v.blk.{}.attn_q v.blk.{}.attn_k v.blk.{}.attn_v"}
_QWEN_STEPS = {"patch_embed.proj.weight": FRAMES, "blocks.{}.attn.qkv": THIRDS}
_SIGLIP = {
    "vision.embeddings.patch_embedding": "v.patch_embd",
    "vision.embeddings.position_embedding": "v.position_embd",
    "vision.encoder.layers.{}.layer_norm1": "v.blk.{}.ln1",
    "vision.encoder.layers.{}.layer_norm2": "v.blk.{}.ln2",
    "vision.encoder.layers.{}.self_attn.q_proj": "v.blk.{}.attn_q",
    "vision.encoder.layers.{}.self_attn.k_proj": "v.blk.{}.attn_k",
    "vision.encoder.layers.{}.self_attn.v_proj": "v.blk.{}.attn_v",
    "vision.encoder.layers.{}.self_attn.out_proj": "v.blk.{}.attn_out",
    "vision.encoder.layers.{}.mlp.fc1": "v.blk.{}.ffn_up",
    "vision.encoder.layers.{}.mlp.fc2": "v.blk.{}.ffn_down",
    "vision.post_layernorm": "v.post_ln",
}
_CLIP = {
    **_SIGLIP,
    "vision.embeddings.class_embedding": "v.class_embd",
    "vision.pre_layrnorm": "v.pre_ln",
    # LLaVA never reaches it, but llama.cpp would apply what bears its usual name; under this one it
    # does nothing.
    "vision.post_layernorm": "v.unused.post_ln",
    "projector.linear_1": "mm.0",
    "projector.linear_2": "mm.2",
}
_IDEFICS = {**_SIGLIP, "connector.modality_projection.proj": "mm.model.fc"}
_PIXTRAL = {
    "vision.patch_conv": "v.patch_embd",
    "vision.ln_pre": "v.pre_ln",
    "vision.transformer.layers.{}.attention_norm": "v.blk.{}.ln1",
    "vision.transformer.layers.{}.ffn_norm": "v.blk.{}.ln2",
    "vision.transformer.layers.{}.attention.q_proj": "v.blk.{}.attn_q",
    "vision.transformer.layers.{}.attention.k_proj": "v.blk.{}.attn_k",
    "vision.transformer.layers.{}.attention.v_proj": "v.blk.{}.attn_v",
    "vision.transformer.layers.{}.attention.o_proj": "v.blk.{}.attn_out",
    "vision.transformer.layers.{}.feed_forward.gate_proj": "v.blk.{}.ffn_gate",
    "vision.transformer.layers.{}.feed_forward.up_proj": "v.blk.{}.ffn_up",
    "vision.transformer.layers.{}.feed_forward.down_proj": "v.blk.{}.ffn_down",
    "projector.norm": "mm.input_norm",
    "projector.patch_merger.merging_layer": "mm.patch_merger",
    "projector.linear_1": "mm.1",
    "projector.linear_2": "mm.2",
}
_CONNECTED = {
    f"{outer}{inner}": begin
    for outer in ("", "model.")
    for inner, begin in {"vision_model.": "vision.", "connector.": "connector."}.items()
}
_VISUAL = {"model.visual.": "", "visual.": ""}
_VISION_TOWER = {
    f"{outer}{inner}": begin
    for outer in ("model.", "")
    for inner, begin in {
        "vision_tower.vision_model.": "vision.",
        "vision_tower.": "vision.",
        "multi_modal_projector.": "projector.",
    }.items()
}


def _qwen(config: Any) -> dict[str, Any]:
    vision = config.vision_config
    return {
        "embedding_length": getattr(vision, "embed_dim", None) or vision.hidden_size,
        "feed_forward_length": (
            getattr(vision, "intermediate_size", None) or vision.embed_dim * vision.mlp_ratio
        ),
        "block_count": vision.depth,
        "attention.head_count": vision.num_heads,
        "attention.layer_norm_epsilon": 1e-6,  # fixed in the model's code
        "patch_size": vision.patch_size,
        "spatial_merge_size": vision.spatial_merge_size,
        "projection_dim": config.get_text_config().hidden_size,
        "image_size": 560,  # only the size of a warm-up
    }


def _qwen2_5(config: Any) -> dict[str, Any]:
    whole = config.vision_config.fullatt_block_indexes
    period = whole[0] + 1
    if list(whole) != list(range(period - 1, config.vision_config.depth, period)):
        raise UserError(
            f"GGUF export: llama.cpp takes a period of full attention blocks, not {list(whole)}"
        )
    return _qwen(config) | {"n_wa_pattern": period}


def _qwen3(config: Any) -> dict[str, Any]:
    vision = config.vision_config
    deep = [i in vision.deepstack_visual_indexes for i in range(vision.depth)]
    side = int(vision.num_position_embeddings**0.5)
    return _qwen(config) | {"image_size": side * vision.patch_size, "is_deepstack_layers": deep}


def _siglip(config: Any) -> dict[str, Any]:
    vision = config.vision_config
    return {
        "embedding_length": vision.hidden_size,
        "feed_forward_length": vision.intermediate_size,
        "block_count": vision.num_hidden_layers,
        "attention.head_count": vision.num_attention_heads,
        "attention.layer_norm_epsilon": float(getattr(vision, "layer_norm_eps", 1e-5)),
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "projection_dim": config.get_text_config().hidden_size,
    }


def _gemma3(config: Any) -> dict[str, Any]:
    side = config.vision_config.image_size // config.vision_config.patch_size
    return _siglip(config) | {
        "projector.scale_factor": side // int(config.mm_tokens_per_image**0.5)
    }


def _refuse(*rules: tuple[bool, str]) -> None:
    """UserError with the first reason whose condition holds: what llama.cpp's code does not do."""
    problem = next((reason for broken, reason in rules if broken), None)
    if problem:
        raise UserError(f"GGUF export: llama.cpp's tower {problem}")


def _llava(config: Any) -> dict[str, Any]:
    layer, tower_type = config.vision_feature_layer, config.vision_config.model_type
    _refuse(
        (tower_type != "clip_vision_model", f"is CLIP's or Pixtral's, not {tower_type}"),
        (
            layer not in (-2, config.vision_config.num_hidden_layers - 1),
            f"ends before the last block, not at {layer}",
        ),
        (config.vision_feature_select_strategy != "default", "leaves the class token out"),
    )
    return _siglip(config)


def _idefics(config: Any) -> dict[str, Any]:
    return _siglip(config) | {"projector.scale_factor": config.scale_factor}


def _pixtral(config: Any) -> dict[str, Any]:
    vision = config.vision_config
    merges = getattr(config, "spatial_merge_size", None)
    eps = 1e-5  # fixed in the model's code
    _refuse(
        (vision.rope_parameters["rope_theta"] != 10000, "turns with base 10000 only"),
        (
            vision.head_dim * vision.num_attention_heads != vision.hidden_size,
            "has heads that share the hidden size",
        ),
        (config.vision_feature_layer != -1, "gives the last block's output"),
        (
            bool(merges) and config.get_text_config().rms_norm_eps != eps,
            f"normalizes before merging with {eps}",
        ),
    )
    facts = _siglip(config) | {"attention.layer_norm_epsilon": eps}
    return facts | ({"spatial_merge_size": merges} if merges else {})


@dataclass(frozen=True)
class Tower:
    """One family's tower.

    seen: pattern of what an image is in a prompt, IMAGE for its placeholders; llama.cpp puts the
    other words there by itself. turned: layers whose rows are reordered for rotary positions.
    longest_edge: llama.cpp cuts images of that size into tiles. row_end: the token of text whose
    embedding the tower puts behind each row. caution: what llama.cpp gets wrong with a file that is
    right.
    """

    projector: str
    prefixes: Mapping[str, str]
    names: Mapping[str, str]
    facts: Callable[[Any], dict[str, Any]]
    seen: str
    steps: Mapping[str, Step] = field(default_factory=dict)
    turned: tuple[str, ...] = ()
    longest_edge: bool = False
    row_end: str | None = None
    caution: str | None = None


_QWEN_SEEN = r"<\|vision_start\|>IMAGE<\|vision_end\|>"
_FAKE = "<fake_token_around_image>"
_TILES = rf"(?:{_FAKE}<row_\d+_col_\d+>IMAGE\n?)*\n?{_FAKE}<global-img>IMAGE{_FAKE}"
_CLASS_LAST = (
    "llama.cpp, up to build 11549 at least, puts CLIP's class token behind the patches (its issue"
    " 25814): answers about images are wrong until that is mended"
)
# By the model's model_type. "gelu" is what llama.cpp calls the tanh approximation.
_ACTIVATIONS: Mapping[str, str | None] = {
    "quick_gelu": None,
    "silu": "clip.use_silu",
    "gelu_pytorch_tanh": "clip.use_gelu",
}
TOWERS: Mapping[str, Tower] = {
    "qwen2_vl": Tower(
        "qwen2vl_merger",
        _VISUAL,
        {
            **_QWEN,
            **_QWEN_SPLIT,
            "blocks.{}.mlp.fc1": "v.blk.{}.ffn_up",
            "blocks.{}.mlp.fc2": "v.blk.{}.ffn_down",
        },
        _qwen,
        _QWEN_SEEN,
        _QWEN_STEPS,
    ),
    "qwen2_5_vl": Tower(
        "qwen2.5vl_merger",
        _VISUAL,
        {
            **_QWEN,
            **_QWEN_SPLIT,
            **{f"blocks.{{}}.mlp.{n}_proj": f"v.blk.{{}}.ffn_{n}" for n in ("gate", "up", "down")},
        },
        _qwen2_5,
        _QWEN_SEEN,
        _QWEN_STEPS,
    ),
    "qwen3_vl": Tower(
        "qwen3vl_merger",
        {"visual.": "", "model.visual.": ""},
        {
            **{key: value for key, value in _QWEN.items() if not key.startswith("merger.")},
            "patch_embed.proj.bias": "v.patch_embd.bias",
            "pos_embed": "v.position_embd",
            "blocks.{}.attn.qkv": "v.blk.{}.attn_qkv",
            "blocks.{}.mlp.linear_fc1": "v.blk.{}.ffn_up",
            "blocks.{}.mlp.linear_fc2": "v.blk.{}.ffn_down",
            "merger.norm": "v.post_ln",
            "merger.linear_fc1": "mm.0",
            "merger.linear_fc2": "mm.2",
        },
        _qwen3,
        _QWEN_SEEN,
        {"patch_embed.proj.weight": FRAMES},
    ),
    "gemma3": Tower(
        "gemma3",
        _VISION_TOWER,
        {
            **_SIGLIP,
            "projector.mm_input_projection_weight": "mm.input_projection.weight",
            "projector.mm_soft_emb_norm": "mm.soft_emb_norm",
        },
        _gemma3,
        "<start_of_image>IMAGE<end_of_image>",
        {"projector.mm_soft_emb_norm": PLUS_ONE},
    ),
    "llava": Tower("mlp", _VISION_TOWER, _CLIP, _llava, "IMAGE", caution=_CLASS_LAST),
    **dict.fromkeys(
        ("idefics3", "smolvlm"),
        Tower("idefics3", _CONNECTED, _IDEFICS, _idefics, _TILES, longest_edge=True),
    ),
    **dict.fromkeys(
        ("pixtral", "mistral3"),
        Tower(
            "pixtral",
            _VISION_TOWER,
            _PIXTRAL,
            _pixtral,
            r"(?:IMAGE(?:\[IMG_BREAK\])?)+\[IMG_END\]",
            turned=tuple(f"vision.transformer.layers.{{}}.attention.{name}_proj" for name in "qk"),
            row_end="[IMG_BREAK]",
        ),
    ),
}
ROW_END = "v.token_embd.img_break"


def tower_of(model_type: str, config: Any) -> Tower | None:
    """The tower's table; None for a model without one. UserError for an unknown one."""
    vision = getattr(config, "vision_config", None)
    if vision is None and getattr(config, "audio_config", None) is None:
        return None
    # Pixtral's checkpoints call themselves LLaVA.
    name = (
        "pixtral"
        if model_type == "llava" and getattr(vision, "model_type", "") == "pixtral"
        else model_type
    )
    if name not in TOWERS:
        raise UserError(
            f"GGUF export: no table for the tower of {name}; there are {', '.join(TOWERS)}"
        )
    return TOWERS[name]


def tower_part(model_type: str, config: Any) -> Part | None:
    """Names and steps of the tower's tensors; None for a model without one. UserError for an
    unknown tower."""
    tower = tower_of(model_type, config)
    if tower is None:
        return None
    turned = {name: rotary(config.vision_config.num_attention_heads) for name in tower.turned}
    table = rules(tower.names, {**tower.steps, **turned})
    if model_type == "qwen3_vl":  # stored by the layer they read from, counted in the checkpoint
        for i, layer in enumerate(config.vision_config.deepstack_visual_indexes):
            pairs = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}
            table |= rules(
                {
                    f"deepstack_merger_list.{i}.{k}": f"v.deepstack.{layer}.{v}"
                    for k, v in pairs.items()
                }
            )
    return Part(tower.prefixes, table)


def tower_metadata(model_type: str, config: Any, preprocessor: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of the tower, with full keys. preprocessor: the image processor's
    configuration."""
    tower = tower_of(model_type, config)
    assert tower is not None  # it has a part
    facts = {f"clip.vision.{key}": value for key, value in tower.facts(config).items()}
    act = config.vision_config.hidden_act
    if act not in _ACTIVATIONS:
        raise UserError(
            f"GGUF export: llama.cpp's towers compute {', '.join(_ACTIVATIONS)}, not {act}"
        )
    flag = _ACTIVATIONS[act]
    if tower.longest_edge:
        size = preprocessor.get("size", {}).get("longest_edge", config.vision_config.image_size)
        facts["clip.vision.preproc_image_size"] = size
    return {
        "clip.has_vision_encoder": True,
        "clip.projector_type": tower.projector,
        **facts,
        **({flag: True} if flag else {}),
        "clip.vision.image_mean": [
            float(x) for x in preprocessor.get("image_mean", (0.5, 0.5, 0.5))
        ],
        "clip.vision.image_std": [float(x) for x in preprocessor.get("image_std", (0.5, 0.5, 0.5))],
    }
