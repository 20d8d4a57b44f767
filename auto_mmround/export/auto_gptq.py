"""The GPTQ layout: codes along the inputs, one bit stream an output column; zero points stored
minus one."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import takewhile
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
    Limit,
    PackedFormat,
    any_scheme,
    check_integers,
    differences,
    wrong,
)
from auto_mmround.export.layout import (
    Layout,
    carried_names,
    in_patterns,
    kept_groups,
    part_patterns,
    tower_patterns,
)
from auto_mmround.export.method import DEFAULTS, Method, Overrides, Spelling, rule_pattern
from auto_mmround.export.packing import pack_bits, unpack_bits
from auto_mmround.export.patterns import as_pattern, folded, tails, templates
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.schemes import Scheme

GROUP_SIZES = (-1, 16, 32, 64, 128, 256, 512, 1024)  # what GPTQModel's kernels take
# Where optimum looks for the blocks of a checkpoint that does not name them.
BLOCKS = (
    "transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers",
    "model.language_model.layers",
)  # fmt: skip


def pack_gptq(name: str, codes: Codes, *, zero_offset: int, g_idx: bool) -> dict[str, Tensor]:
    """qweight int32 (in*b/32, out), qzeros int32 (G, out*b/32) holding zero - zero_offset, scales
    fp16 (G, out).

    Raises ValueError for a zero point below the offset, and for scales that are not float16: a cast
    would change them.
    """
    if codes.scale_OG.dtype != torch.float16:
        raise ValueError(f"{name}: scales are {codes.scale_OG.dtype}, the layout stores float16")
    if zero_offset and int(codes.zero_OG.min()) < zero_offset:
        raise ValueError(
            f"{name}: a zero point below {zero_offset} cannot be stored in this layout"
        )
    tensors = {
        f"{name}.qweight": pack_bits(codes.q_OI, codes.bits).T.contiguous(),
        f"{name}.qzeros": pack_bits((codes.zero_OG - zero_offset).T.contiguous(), codes.bits),
        f"{name}.scales": codes.scale_OG.T.contiguous(),
    }
    if g_idx:
        columns_I = torch.arange(codes.q_OI.shape[1], dtype=torch.int32, device=codes.q_OI.device)
        tensors[f"{name}.g_idx"] = columns_I // codes.group_size
    return tensors


def unpack_gptq(
    name: str, tensors: Mapping[str, Tensor], scheme: Scheme, *, zero_offset: int
) -> Codes:
    """The inverse of :func:`pack_gptq`. Raises ValueError where shapes or g_idx contradict the
    scheme.

    Other tools' activation order (desc_act) scatters a group's columns; such codes come with a
    scale for each column.
    """
    qweight, qzeros, scale_GO = (
        tensors[f"{name}.{part}"] for part in ("qweight", "qzeros", "scales")
    )
    in_features, out_features = qweight.shape[0] * 32 // scheme.bits, qweight.shape[1]
    group = in_features if scheme.group_size == -1 else scheme.group_size
    if scale_GO.shape != (-(-in_features // group), out_features):
        raise ValueError(
            f"{name}.scales {tuple(scale_GO.shape)} contradicts {scheme.bits} bits, group size"
            f" {group}"
        )
    zero_GO = unpack_bits(qzeros, scheme.bits, out_features) + zero_offset
    q_OI = unpack_bits(qweight.T, scheme.bits, in_features)
    group_I = torch.arange(in_features, device=qweight.device) // group
    g_idx = tensors.get(f"{name}.g_idx", group_I).long()
    if not torch.equal(g_idx, group_I):
        if not torch.equal(g_idx.sort().values, group_I):
            raise ValueError(f"{name}.g_idx does not give every group {group} inputs")
        scale_GO, zero_GO, group = scale_GO[g_idx], zero_GO[g_idx], 1
    return Codes(
        q_OI, scale_GO.T.contiguous(), zero_GO.T.contiguous(), scheme.bits, group, scheme.sym
    )


def config(layout: Layout) -> dict[str, Any]:
    """``quantization_config`` for optimum + GPTQModel, vLLM and AutoGPTQ's heirs. UserError for a
    quantized output head that they do not know by its name."""
    other = [name for name in layout.outside if name.rpartition(".")[2] != "lm_head"]
    if other:
        raise UserError(
            f"auto_gptq: readers know a quantized output head as lm_head, this one is {other[0]}:"
            " leave quant_lm_head out, or use auto_round"
        )
    groups, singles = kept_groups(layout)
    ends = _ends(layout)
    excludes = [p for group in groups for p in tower_patterns(layout, group)] + [
        pattern for single in singles for pattern in _tails(layout, ends, single, [single])
    ]
    excludes += part_patterns(layout)
    dynamic: dict[str, Any] = {f"-:{pattern}": {} for pattern in excludes}
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in layout.quantized.items():
        by_scheme.setdefault(scheme, []).append(name)
    for scheme, names in by_scheme.items():
        if keys := differences(scheme, layout.default):
            dynamic |= {
                f"+:{pattern}": keys
                for template, members in folded(names, layout.quantized).items()
                for pattern in _tails(layout, ends, template, members)
            }
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": layout.default.bits,
        "group_size": layout.default.group_size,
        "sym": layout.default.sym,
        "desc_act": False,
        # a group's scale is there before its columns are solved
        "static_groups": "dampening" in layout.details,
        "true_sequential": layout.details.get("true_sequential", False),
        # readers' bounds
        **({"damp_percent": damp} if 0 < (damp := layout.details.get("dampening", 0)) < 1 else {}),
        "lm_head": bool(layout.outside),
        "block_name_to_quantize": _common_prefix([*layout.blocks, *layout.outside]),
        **_only_modules(layout),
        **({"modules_to_not_convert": names} if (names := carried_names(layout)) else {}),
        "dynamic": dynamic,
        "provider": "auto_mmround",
        "auto_mmround": dict(layout.details),
    }


def _only_modules(layout: Layout) -> dict[str, Any]:
    """``modules_in_block_to_quantize``, only where the block prefix alone does not say it.

    Without the key vLLM looks at the tensors and Transformers takes every Linear below the prefix,
    which is right for most models. vLLM matches the entries by substring in towers too, hence full
    names once a suffix is unsafe.
    """
    prefix = _common_prefix([*layout.blocks, *layout.outside])
    if not any(name.startswith(prefix) for name in layout.kept):
        return {}
    quantized, kept = (
        list(dict.fromkeys(spelling for name in names for spelling in in_patterns(layout, name)))
        for names in (layout.quantized, layout.kept)
    )
    suffixes = sorted({re.sub(r"^.*?\.\d+\.", "", name) for name in quantized})
    unsafe = any(suffix in name for suffix in suffixes for name in kept)
    return {"modules_in_block_to_quantize": [quantized if unsafe else suffixes]}


def _common_prefix(names: list[str]) -> str:
    """The longest dotted prefix; optimum takes one string and compares it with ``startswith``."""
    same = takewhile(lambda parts: len(set(parts)) == 1, zip(*(name.split(".") for name in names)))
    return ".".join(parts[0] for parts in same)


def _ends(layout: Layout) -> Counter[str]:
    """How many modules end in each dotted tail of a name or template."""
    return Counter(
        tail
        for name in (*layout.quantized, *layout.kept)
        for form in (name, *templates(name))
        for tail in tails(form)
    )


def _tails(
    layout: Layout, ends: Counter[str], name: str, members: Sequence[str]
) -> dict[str, None]:
    """Regexes for one module in any spelling, or for a template of ``members``: from its block
    list's own name on ("layers.3.mlp.down_proj"), or as much before that as it takes to meet no
    other; and the spellings that this does not take."""
    block = next((b for b in layout.blocks if name.startswith(b + ".")), "")
    whole = [*tails(name)]
    own = whole[block.count(".") if block else 0]
    end = next(
        tail for tail in reversed(whole) if len(tail) >= len(own) and ends[tail] == ends[name]
    )
    pattern = rf"(.*\.)?{as_pattern(end)}$"
    spelled = (s for member in members for s in in_patterns(layout, member))
    others = [rf"{as_pattern(s)}$" for s in spelled if not re.match(pattern, s)]
    return dict.fromkeys([pattern, *others])


def _transformers(q: Spelling) -> Mapping[str, Overrides]:
    """optimum reads the block prefix and the endings, but not ``dynamic``."""
    prefix = q.config.get("block_name_to_quantize")
    if prefix is None:
        prefix = next(
            (block for block in BLOCKS if any(name.startswith(block) for name in q.names)), "\0"
        )
    prefix = prefix if isinstance(prefix, str) else "\0"  # optimum takes one name, no list
    endings = tuple(q.listed("modules_in_block_to_quantize")) or ("",)
    return dict.fromkeys(
        (n for n in q.names if n.startswith(prefix) and n.endswith(endings)), DEFAULTS
    )


def _vllm(q: Spelling) -> Mapping[str, Overrides] | None:
    if q.config.get("bits") not in (4, 8) or not q.config.get("sym"):
        return None
    # by substring; without a list, whatever is packed in the file
    listed = q.listed("modules_in_block_to_quantize")
    dynamic = q.config.get("dynamic") or {}
    answer = {}
    for name in q.names:
        rule = next((k for k in dynamic if re.match(rule_pattern(k), name)), "")
        inside = any(part in name for part in listed) if listed else name in q.packed
        if inside and not rule.startswith("-:") and (name != q.head or q.config.get("lm_head")):
            answer[name] = dynamic.get(rule, {})
    return answer


FORMAT = PackedFormat(
    name="auto_gptq",
    summary="GPTQ checkpoint: Transformers (gptqmodel), vLLM, SGLang; no zero point 0",
    bits=(2, 3, 4, 8),
    check=check_integers((2, 3, 4, 8), (32, 32), group_sizes=GROUP_SIZES),
    pack=partial(pack_gptq, zero_offset=1, g_idx=True),
    unpack=partial(unpack_gptq, zero_offset=1),
    config=config,
    parts=WORDS,
    min_zero=1,
    method=Method(
        "gptq",
        required=("bits", "group_size", "sym", "desc_act"),
        form={
            "block_name_to_quantize": config_check.names,
            "modules_in_block_to_quantize": config_check.names,
            "dynamic": config_check.maybe(config_check.overrides(rule_pattern)),
        },
        listed=("block_name_to_quantize", "modules_in_block_to_quantize", "dynamic"),
        readers={"Transformers": _transformers, "vLLM": _vllm},
    ),
    # GPTQModel says both, and takes the first alone for an older name of the second
    told={"checkpoint_format": ("gptq", ""), "format": ("gptq", "")},
    engines={"transformers": "gptqmodel", "vllm": "vllm"},
    limits=(
        Limit("transformers", "several schemes", "mismatched sizes", lambda s: len(s) > 1),
        MADE_UP,
        wrong(TURNED, "'_LinearWeightMetadata' object has no attribute 'normal_'", "turned"),
        Limit(
            "vllm",
            "asymmetric weights",
            "Unsupported quantization config: bits=4, sym=False",
            any_scheme(lambda s: not s.sym),
        ),
        Limit(
            "vllm",
            "other than 4 bits",
            "Marlin does not support weight_bits = uint8b128. Only types = [ScalarType.uint4b8] are"
            " supported",
            any_scheme(lambda s: s.bits != 4),
        ),
        NO_EXPERTS,
        STACKS_ALONE,
    ),
)
FORMATS = (FORMAT,)
