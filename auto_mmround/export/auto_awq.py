"""The AWQ layout ("gemm"): 4 bits, eight output columns a word in a fixed order; zero points as
they are."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.export import config_check
from auto_mmround.export.format import (
    MADE_UP,
    NO_EXPERTS,
    STACKS_ALONE,
    TURNED,
    WORDS,
    PackedFormat,
    check_integers,
    differences,
    wrong,
)
from auto_mmround.export.layout import Layout, both_spellings, kept_groups, tower_substrings
from auto_mmround.export.method import DEFAULTS, Method, Overrides, Spelling
from auto_mmround.export.packing import pack_awq, unpack_awq
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.schemes import Scheme

GROUP_SIZES = (-1, 16, 32, 64, 128)  # what GPTQModel's AWQ kernels take


def pack(name: str, codes: Codes) -> dict[str, Tensor]:
    """qweight int32 (in, out/8), qzeros int32 (G, out/8), scales fp16 (G, out). ValueError as
    GPTQ's packer."""
    if codes.bits != 4:
        raise ValueError(f"{name}: AWQ holds 4 bits, not {codes.bits}")
    if codes.scale_OG.dtype != torch.float16:
        raise ValueError(f"{name}: scales are {codes.scale_OG.dtype}, the layout stores float16")
    return {
        f"{name}.qweight": pack_awq(codes.q_OI.T),
        f"{name}.qzeros": pack_awq(codes.zero_OG.T),
        f"{name}.scales": codes.scale_OG.T.contiguous(),
    }


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Codes:
    """The inverse of :func:`pack`. Raises ValueError where the shapes contradict the scheme."""
    q_IO = unpack_awq(tensors[f"{name}.qweight"])
    scale_GO = tensors[f"{name}.scales"]
    group = q_IO.shape[0] if scheme.group_size == -1 else scheme.group_size
    if scheme.bits != 4 or scale_GO.shape != (-(-q_IO.shape[0] // group), q_IO.shape[1]):
        raise ValueError(
            f"{name}.scales {tuple(scale_GO.shape)} contradicts {scheme.bits} bits, group size"
            f" {group}"
        )
    zero_OG = unpack_awq(tensors[f"{name}.qzeros"]).T.contiguous()
    return Codes(q_IO.T.contiguous(), scale_GO.T.contiguous(), zero_OG, 4, group, scheme.sym)


def config(layout: Layout) -> dict[str, Any]:
    """``quantization_config``. AWQ states one scheme for all: UserError if the layout has
    several, or a quantized output head, which no reader takes."""
    if layout.outside:
        raise UserError(
            f"auto_awq has no place for a quantized output head ({layout.outside[0]}): leave"
            " quant_lm_head out, or use auto_round"
        )
    mixed = [
        name for name, scheme in layout.quantized.items() if differences(scheme, layout.default)
    ]
    if mixed:
        raise UserError(
            f"auto_awq cannot state mixed schemes ({mixed[0]} differs): give it the same, or use"
            " auto_round"
        )
    groups, singles = kept_groups(layout)
    names = [s for group in groups for s in tower_substrings(layout, group)]
    names += layout.parts
    names += [spelling for single in singles for spelling in both_spellings(layout, single)]
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": layout.default.bits,
        "group_size": layout.default.group_size,
        "zero_point": not layout.default.sym,
        "modules_to_not_convert": names,
        "provider": "auto_mmround",
        "auto_mmround": dict(layout.details),
    }


def _transformers(q: Spelling) -> Mapping[str, Overrides]:
    keep = q.listed("modules_to_not_convert")
    matches = [re.compile(rf"(?:{key})(?:(?<=\.)|(?=\.|$))") for key in keep]
    kept = {n for n in q.names if n.endswith(tuple(keep)) or any(m.match(n) for m in matches)}
    return dict.fromkeys((n for n in q.names if n not in kept and n != q.head), DEFAULTS)


def _vllm(q: Spelling) -> Mapping[str, Overrides] | None:
    if q.config.get("bits") != 4:
        return None
    keep = q.listed("modules_to_not_convert")
    skipped = {
        n for n in q.names if (any(part in n for part in keep) if keep else n not in q.packed)
    }
    head = q.head if not q.config.get("lm_head") else None
    return dict.fromkeys((n for n in q.names if n not in skipped and n != head), DEFAULTS)


FORMAT = PackedFormat(
    name="auto_awq",
    summary="AWQ checkpoint, 4 bits: Transformers (gptqmodel), vLLM, SGLang",
    bits=(4,),
    check=check_integers((4,), (8, 1), group_sizes=GROUP_SIZES),
    pack=pack,
    unpack=unpack,
    config=config,
    parts=WORDS,
    method=Method(
        "awq",
        required=("bits", "group_size", "zero_point"),
        form={"modules_to_not_convert": config_check.names},
        listed=("modules_to_not_convert",),
        readers={"Transformers": _transformers, "vLLM": _vllm},
    ),
    # AutoAWQ says version, GPTQModel all
    told={"checkpoint_format": ("gemm", ""), "version": ("gemm", ""), "format": ("gemm", "")},
    engines={"transformers": "gptqmodel", "vllm": "vllm"},
    limits=(
        MADE_UP,
        wrong(TURNED, "cannot access local variable 'has_been_replaced'", "turned"),
        NO_EXPERTS,
        STACKS_ALONE,
    ),
)
FORMATS = (FORMAT,)
