"""compressed-tensors checkpoints, as llm-compressor writes them: packed integers, or int8 with int8
activations.

Integers are signed there, ``q - 2**(bits-1)``; packed, that offset is added back, so words hold our
codes as they are. A row is one dense bit stream (``export/packing.py``); zero points are packed
along the outputs, absent when symmetric.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.export.compressed_tensors import floats as compressed_floats
from auto_mmround.export.format import (
    Format,
    Layout,
    both_spellings,
    check_int,
    kept_groups,
    part_patterns,
    tower_patterns,
)
from auto_mmround.export.packing import pack_bits, unpack_bits
from auto_mmround.export.patterns import Lookup, as_pattern, folded, tails, templates
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.schemes import Scheme

SCALE_DTYPES = ("fp16", "bf16", "fp32")
Ends = dict[str, set[Scheme]]
# weight_scale first: the part that every quantized module has and no other.
PARTS = (
    "weight_scale", "weight_packed", "weight", "weight_shape", "weight_zero_point",
    "weight_global_scale",
    "weight_g_idx", "input_scale", "input_zero_point", "input_global_scale",
)  # fmt: skip


def pack_words(name: str, codes: Codes) -> dict[str, Tensor]:
    """weight_packed int32 (out, ceil(in*b/32)), weight_scale (out, G), weight_shape,
    weight_zero_point if asymmetric.

    weight_zero_point is int32 (ceil(out*b/32), G).
    """
    tensors = {
        f"{name}.weight_packed": pack_bits(codes.q_OI, codes.bits),
        f"{name}.weight_scale": codes.scale_OG.contiguous(),
        f"{name}.weight_shape": torch.tensor(codes.q_OI.shape, dtype=torch.int64),
    }
    if not codes.sym:
        tensors[f"{name}.weight_zero_point"] = pack_bits(
            codes.zero_OG.T.contiguous(), codes.bits
        ).T.contiguous()
    return tensors


def pack_int8(name: str, codes: Codes) -> dict[str, Tensor]:
    """weight int8 (out, in), weight_scale (out, G). ValueError for an asymmetric weight: no kernel
    reads one."""
    if not codes.sym:
        raise ValueError(f"{name}: int-quantized weights are symmetric")
    signed_OI = codes.q_OI.to(torch.int16) - 2 ** (codes.bits - 1)
    return {
        f"{name}.weight": signed_OI.to(torch.int8),
        f"{name}.weight_scale": codes.scale_OG.contiguous(),
    }


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> Codes:
    """The inverse of both packers. Raises ValueError where the tensors contradict the scheme."""
    parts = {key.rpartition(".")[2]: tensor for key, tensor in tensors.items()}
    if scheme.data_type != "int":
        return compressed_floats.unpack(name, parts, scheme)
    bits, scale_OG = scheme.bits, parts["weight_scale"]
    if "weight_packed" in parts:
        out_features, in_features = parts["weight_shape"].tolist()
        q_OI = unpack_bits(parts["weight_packed"], bits, in_features)
    elif parts["weight"].dtype == torch.int8:
        out_features, in_features = parts["weight"].shape
        q_OI = (parts["weight"].to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    else:
        raise ValueError(
            f"{name}.weight is {parts['weight'].dtype}, but quantization_config says integers"
        )
    group = in_features if scheme.group_size == -1 else scheme.group_size
    if q_OI.shape[0] != out_features or scale_OG.shape != (out_features, -(-in_features // group)):
        raise ValueError(
            f"{name}.weight_scale {tuple(scale_OG.shape)} contradicts {bits} bits, group size"
            f" {group}"
        )
    g_idx = parts.get("weight_g_idx")
    if g_idx is not None and not torch.equal(
        g_idx.long(), torch.arange(in_features, device=g_idx.device) // group
    ):
        raise ValueError(f"{name}.weight_g_idx reorders the inputs, which is not supported")
    return Codes(q_OI, scale_OG, _zeros(parts, scheme, scale_OG), bits, group, scheme.sym)


def _zeros(parts: Mapping[str, Tensor], scheme: Scheme, scale_OG: Tensor) -> Tensor:
    middle = 2 ** (scheme.bits - 1)
    if scheme.sym:
        if "weight_packed" in parts and "weight_zero_point" in parts:
            raise ValueError("a zero point is stored, but quantization_config says symmetric")
        return torch.full(scale_OG.shape, middle, dtype=torch.uint8, device=scale_OG.device)
    zero = parts["weight_zero_point"]
    if zero.dtype == torch.int8:
        return (zero.to(torch.int16) + middle).to(torch.uint8)
    return unpack_bits(zero.T.contiguous(), scheme.bits, scale_OG.shape[0]).T.contiguous()


def check_words(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why pack-quantized could not hold this weight, or None."""
    return check_int(scheme, out_features, in_features, WORDS.bits, (1, 1), SCALE_DTYPES)


def check_int8(scheme: Scheme, out_features: int, in_features: int) -> str | None:
    """Why int-quantized could not hold this weight for 8-bit activations, or None."""
    if not scheme.sym:
        return "holds symmetric weights beside 8-bit activations"
    if scheme.bits == 8 and scheme.group_size != -1:
        return "holds one scale per output channel beside 8-bit activations: group size -1"
    weight_only = replace(scheme, act_bits=16)
    return check_int(weight_only, out_features, in_features, INT8.bits, (1, 1), SCALE_DTYPES)


def config(layout: Layout) -> dict[str, Any]:
    """``quantization_config``: a group a scheme, the one of most modules first and by class, others
    by name."""
    by_scheme: dict[Scheme, list[str]] = {}
    for name, scheme in layout.quantized.items():
        by_scheme.setdefault(replace(scheme, min_zero=0, scale_dtype="fp16"), []).append(name)
    largest = max(by_scheme, key=lambda scheme: len(by_scheme[scheme]))
    groups, singles = kept_groups(layout)
    ignore = [f"re:{pattern}" for group in groups for pattern in tower_patterns(layout, group)]
    ignore += [f"re:{pattern}" for pattern in part_patterns(layout)]
    ignore += [spelling for single in singles for spelling in both_spellings(layout, single)]
    # vLLM puts a prefix before the output head of some models, but not before its name here.
    ignore += [f"re:.*{single}$" for single in singles if "." not in single]
    kind, ends = _kind(largest), _ends(layout, by_scheme)
    # compressed-tensors 0.20 forgets to pack the zero points of the layers it prepares for
    # Transformers, which then refuses ours; asked to dequantize at once Transformers reads them,
    # but with one scheme for all layers.
    dequantize = {"dequantize": True} if len(by_scheme) == 1 and not largest.sym else {}
    return {
        "quant_method": "compressed-tensors",
        "format": kind,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {
            f"group_{i}": _group(
                scheme, _targets(layout, by_scheme, scheme, ends, scheme == largest), kind
            )
            for i, scheme in enumerate(sorted(by_scheme, key=lambda scheme: scheme != largest))
        },
        **dequantize,
        "provider": "auto_mmround",
        "auto_mmround": dict(layout.details),
    }


def _kind(scheme: Scheme) -> str:
    integers = "int-quantized" if scheme.act_bits < 16 else "pack-quantized"
    return compressed_floats.KINDS.get(scheme.data_type, integers)


def _group(scheme: Scheme, targets: list[str], kind: str) -> dict[str, Any]:
    weights = {"num_bits": scheme.bits, "type": "int", "symmetric": scheme.sym, "dynamic": False}
    channel = scheme.group_size == -1
    weights |= (
        {"strategy": "channel"}
        if channel
        else {"strategy": "group", "group_size": scheme.group_size}
    )
    activations = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    if scheme.data_type != "int":
        weights, activations = (
            compressed_floats.weight_args(scheme),
            compressed_floats.input_args(scheme),
        )
    return {
        "targets": targets,
        "format": kind,
        "weights": weights,
        "input_activations": activations if scheme.act_bits < 16 else None,
        "output_activations": None,
    }


def _targets(
    layout: Layout,
    by_scheme: Mapping[Scheme, list[str]],
    scheme: Scheme,
    ends: Ends,
    everything: bool,
) -> list[str]:
    """How readers find these modules: all by their class, a whole block list by a pattern, else one
    by one, those that differ in numbers only by one pattern.

    Both Transformers and vLLM try names before classes, and vLLM tries the members of a matrix that
    it fuses.
    """
    names, blocks = by_scheme[scheme], {name: _block(layout, name) for name in layout.quantized}
    outside = [name for name in names if blocks[name] is None]
    if everything:  # vLLM's output head is no Linear: it goes by name
        return [
            "Linear",
            *(target for name in outside for target in _by_name(layout, name, name, scheme, ends)),
        ]
    sizes, mine = Counter(blocks.values()), Counter(blocks[name] for name in names)
    whole = {
        block: pattern
        for block in layout.blocks
        if mine[block] == sizes[block] > 0
        and (pattern := _block_pattern(layout, block, by_scheme, scheme))
    }
    targets = dict.fromkeys(whole.values())
    single = [name for name in names if blocks[name] not in whole]
    for template, members in folded(single, layout.quantized).items():
        found = _by_name(layout, template, members[0], scheme, ends)
        if "#" in template and not found[0].startswith("re:"):
            found = [
                target
                for member in members
                for target in _by_name(layout, member, member, scheme, ends)
            ]
        targets |= dict.fromkeys(found)
    return list(targets)


def _block(layout: Layout, name: str) -> str | None:
    return next((block for block in layout.blocks if name.startswith(block + ".")), None)


def _ends(layout: Layout, by_scheme: Mapping[Scheme, list[str]]) -> Ends:
    """What spellings of the modules end in, numbers also as ``#`` -> the schemes of those that
    do."""
    found: Ends = {}
    for scheme, names in by_scheme.items():
        for name in names:
            for spelling in both_spellings(layout, name):
                for form in (spelling, *templates(spelling)):
                    for tail in tails(form):
                        found.setdefault(tail, set()).add(scheme)
    return found


def _by_name(layout: Layout, template: str, name: str, scheme: Scheme, ends: Ends) -> list[str]:
    """A pattern of what all spellings end in, or where it takes modules of other schemes, the
    spellings of ``name``."""
    shared = _shared_end(layout, name)
    end = ".".join(template.split(".")[-len(shared) :]) if shared else ""
    if not shared or _differs(template, name, shared) or ends[end] != {scheme}:
        return both_spellings(layout, name)
    return [rf"re:(.*\.)?{as_pattern(end)}$"]


def _differs(template: str, name: str, shared: list[str]) -> bool:
    """Whether a template has numbers in front of the end that all spellings share: the pattern
    would be too wide."""
    front = len(name.split(".")) - len(shared)
    return "#" in template.split(".")[:front]


def _shared_end(layout: Layout, name: str) -> list[str]:
    spellings = [reversed(spelling.split(".")) for spelling in both_spellings(layout, name)]
    common = [parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*spellings))]
    return common[::-1]


def _block_pattern(
    layout: Layout, block: str, by_scheme: Mapping[Scheme, list[str]], scheme: Scheme
) -> str | None:
    """``re:`` pattern of everything below a block list in all spellings; None if it takes modules
    of other schemes."""
    shared = _shared_end(layout, block)
    pattern = re.compile(rf"(.*\.)?{re.escape('.'.join(shared))}\.")
    others = (name for other, names in by_scheme.items() if other != scheme for name in names)
    taken = any(
        pattern.match(spelling) for name in others for spelling in both_spellings(layout, name)
    )
    return f"re:{pattern.pattern}" if shared and not taken else None


def reader(quantization_config: Mapping[str, Any]) -> Callable[[str], Scheme]:
    """`scheme_of` of one configuration, for many names."""
    targets = {
        t: group
        for group in quantization_config["config_groups"].values()
        for t in group["targets"]
    }
    order = _in_order(targets)
    names = [t for t in order if t != "Linear" and not t.startswith("re:")]
    places = Lookup(names, [t[3:] for t in order if t.startswith("re:")])

    def scheme(name: str) -> Scheme:
        place = places.first(name)
        target = "Linear" if place is None else order[place]
        if target not in targets:
            raise UserError(
                f"quantization_config: {name} is quantized, but no config group is for it"
            )
        return _scheme_of_group(targets[target], name)

    return scheme


def _scheme_of_group(group: Mapping[str, Any], name: str) -> Scheme:
    """Raises UserError for weights other than integers with a scale a channel or a group, and
    floats that are read."""
    weights, inputs = group["weights"], group.get("input_activations") or {}
    found = compressed_floats.scheme_of(weights, inputs) if weights.get("type") == "float" else None
    if found is None and (
        weights.get("type") == "float" or weights.get("strategy") not in ("group", "channel")
    ):
        kind = (
            f"{weights.get('num_bits')} bit {weights.get('type')} weights with strategy"
            f" {weights.get('strategy')}"
        )
        raise UserError(
            f"cannot read {name}: {kind}; read are integers by group or channel, FP8, NVFP4 and MX"
        )
    if found is not None:
        return found
    size = weights["group_size"] if weights["strategy"] == "group" else -1
    return Scheme(
        weights["num_bits"],
        size,
        weights.get("symmetric", True),
        act_bits=inputs.get("num_bits", 16),
    )


def _in_order(targets: Iterable[str]) -> list[str]:
    return sorted(
        targets, key=lambda target: (target == "Linear", target.startswith("re:"), target)
    )


def _fits(target: str, name: str) -> bool:
    return (
        re.match(target[3:], name) is not None
        if target.startswith("re:")
        else target in (name, "Linear")
    )


WORDS = Format(
    name="compressed_tensors",
    summary=(
        "compressed-tensors checkpoint, packed: Transformers (compressed-tensors), vLLM, SGLang"
    ),
    bits=(2, 3, 4, 5, 6, 7, 8),
    check=check_words,
    pack=pack_words,
    unpack=unpack,
    config=config,
    parts=PARTS,
    any_float=True,
)
INT8 = Format(
    name="compressed_tensors:int8",
    summary=(
        "compressed-tensors checkpoint for 8-bit activations (act_bits 8), W8A8 and W4A8, symmetric"
    ),
    bits=(4, 8),
    check=check_int8,
    pack=pack_int8,
    unpack=unpack,
    config=config,
    parts=PARTS,
    any_float=True,
)
FLOAT = Format(
    name="compressed_tensors:float",
    summary=(
        "compressed-tensors checkpoint with FP8, NVFP4, MXFP4 or MXFP8 weights (data_type), rounded"
        " to nearest"
    ),
    bits=(4, 8),
    check=compressed_floats.check,
    pack=compressed_floats.pack,
    unpack=unpack,
    config=config,
    parts=PARTS,
)
