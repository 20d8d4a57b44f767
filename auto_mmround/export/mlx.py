"""MLX's affine layout, read by mlx-vlm and mlx-lm: ``scales * code + biases``, with ``biases =
-scales * zero``.

Tensors keep the checkpoint's names and shapes: both readers rename and transpose on every load,
whoever wrote the file (seen in mlx-vlm 0.7.10 and mlx-lm 0.32.2). Only ``config.json`` has to speak
their language.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from auto_mmround.export.format import TURNED, Limit, PackedFormat, check_integers, differences
from auto_mmround.export.layout import Layout, both_spellings
from auto_mmround.export.method import Method
from auto_mmround.export.packing import pack_bits, unpack_bits
from auto_mmround.families import family_of
from auto_mmround.numerics.grids import SCALE_DTYPES, Codes
from auto_mmround.recipe.schemes import Scheme

GROUP_SIZES = (32, 64, 128)  # all that MLX's kernels exist for

# How Transformers' module names begin -> how the modules of mlx-vlm are called.
PREFIXES = {
    "model.language_model.": "language_model.model.", "model.text_model.": "language_model.",
    "model.visual.": "vision_tower.", "model.vision_tower.": "vision_tower.",
    "model.vision_model.": "vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.", "model.connector.": "connector.",
    "lm_head": "language_model.lm_head",
}  # fmt: skip


def pack(name: str, codes: Codes) -> dict[str, Tensor]:
    """weight uint32 (out, in*bits/32), a dense stream along in; scales (out, G) as tuned; biases
    (out, G).

    A product scale * zero needs up to ``bits`` binary digits more than the scale. Biases have the
    scales' dtype where every product fits (always if symmetric), else float32: MLX takes both, and
    no value is rounded.
    """
    exact_OG = -codes.scale_OG.float() * codes.zero_OG.float()
    short_OG = exact_OG.to(codes.scale_OG.dtype)
    return {
        f"{name}.weight": pack_bits(codes.q_OI, codes.bits).view(torch.uint32),
        f"{name}.scales": codes.scale_OG.contiguous(),
        f"{name}.biases": (
            (short_OG if torch.equal(short_OG.float(), exact_OG) else exact_OG).contiguous()
        ),
    }


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Codes:
    """The inverse of :func:`pack`. ValueError where shapes contradict the scheme or biases are no
    scale * zero.

    The layout does not say whether a weight is symmetric: it is if all its zero points are the
    middle.
    """
    words, scale_OG, bias_OG = (
        tensors[f"{name}.{part}"] for part in ("weight", "scales", "biases")
    )
    bits, group = scheme.bits, scheme.group_size
    columns = words.shape[1] * 32 // bits
    if scale_OG.shape != (words.shape[0], -(-columns // group)) or bias_OG.shape != scale_OG.shape:
        raise ValueError(
            f"{name}.scales {tuple(scale_OG.shape)} contradicts {bits} bits, group size {group}"
        )
    zero_OG = (-bias_OG.double() / scale_OG.double()).round()
    exact = torch.equal(scale_OG.double() * zero_OG, -bias_OG.double())
    if not exact or zero_OG.min() < 0 or zero_OG.max() >= 2**bits:
        raise ValueError(f"{name}.biases are not scales times whole zero points of {bits} bits")
    q_OI = unpack_bits(words.view(torch.int32), bits, columns)
    return Codes(
        q_OI,
        scale_OG,
        zero_OG.to(torch.uint8),
        bits,
        group,
        bool((zero_OG == 2 ** (bits - 1)).all()),
    )


def config(layout: Layout) -> dict[str, Any]:
    """The default scheme, and by module name what differs from it. Bare, as MLX's readers in Swift
    want it."""
    overrides: dict[str, Any] = {
        spelling: {"group_size": scheme.group_size, "bits": scheme.bits}
        for name, scheme in layout.quantized.items()
        if {"bits", "group_size"} & differences(scheme, layout.default).keys()
        for spelling in (*both_spellings(layout, name), mlx_name(name))
    }
    plain = {
        spelling: False
        for name in layout.carried
        if name not in layout.quantized
        for spelling in both_spellings(layout, name)
    }
    return {
        "group_size": layout.default.group_size,
        "bits": layout.default.bits,
        "mode": "affine",
    } | (overrides | plain)


def mlx_name(name: str) -> str:
    """Transformers' module name -> mlx-vlm's; text models keep theirs."""
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    return PREFIXES.get(prefix, "") + name[len(prefix) :]


def model_config(source: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """``config.json`` for readers that predate Transformers 5: what it nests is repeated flat;
    nothing is removed."""
    text = source.get("text_config")
    vision_type = family_of(str(source.get("model_type"))).mlx_vision
    made = {**_flat_rope(source, vision_type), **source}
    if isinstance(text, Mapping):
        made["text_config"] = {**_flat_rope(text, vision_type), **text}
        made = {**made["text_config"], **made} if vision_type else made
    if vision_type and isinstance(source.get("vision_config"), Mapping):
        made["vision_config"] = {**source["vision_config"], "model_type": vision_type}
    return {**made, "quantization": config(layout)}


# Kinds of rope older than Transformers 5; readers of others know its nested keys.
FLAT_ROPES = ("mrope", "linear", "dynamic", "yarn", "longrope", "llama3", "su")


def _flat_rope(level: Mapping[str, Any], vision_type: str | None) -> dict[str, Any]:
    """rope_theta, rope_local_base_freq, rope_scaling, sliding_window_pattern out of Transformers
    5's keys."""
    rope = level.get("rope_parameters") or {}
    main, local = rope.get("full_attention", rope), rope.get("sliding_attention", {})
    rope_type = "mrope" if "mrope_section" in main else main.get("rope_type", "default")
    # Transformers takes the flat key for the whole, and knows "mrope" as a type in few families
    # only.
    known = (
        {"rope_type": main.get("rope_type", "default")}
        if rope_type == "mrope" and vision_type is None
        else {}
    )
    scaling = {"type": rope_type, **known} | {
        k: v for k, v in main.items() if k not in ("rope_theta", "rope_type")
    }
    flat = {
        "rope_theta": main.get("rope_theta"),
        "rope_local_base_freq": local.get("rope_theta"),
        "rope_scaling": scaling if rope_type in FLAT_ROPES else None,
        "sliding_window_pattern": level.get("_sliding_window_pattern"),
    }
    return {key: value for key, value in flat.items() if value is not None}


FORMAT = PackedFormat(
    name="mlx",
    summary="MLX checkpoint, affine: mlx-vlm, mlx-lm",
    bits=(2, 3, 4, 5, 6, 8),
    # two outputs: mlx-vlm skips weights whose size is no multiple of 64
    check=check_integers((2, 3, 4, 5, 6, 8), (2, 1), SCALE_DTYPES, GROUP_SIZES),
    pack=pack,
    unpack=unpack,
    config=config,
    parts={"scales": "scale", "weight": "q", "biases": "zero"},
    any_float=True,
    model_config=model_config,
    method=Method("affine"),
    engines={"mlx": "mlx"},
    limits=(
        Limit(
            "mlx",
            TURNED,
            "Received .. parameters not in model: model.transformer.h.0.attn.c_attn.weight ..",
            experts=("turned",),
            fatal=True,
        ),
    ),
)
FORMATS = (FORMAT,)
