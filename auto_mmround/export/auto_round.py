"""AutoRound's own checkpoints: three packings under one configuration.

``auto_round:auto_gptq`` is GPTQ's layout (zero points minus one), ``auto_round:auto_awq`` is AWQ's,
plain ``auto_round`` is GPTQ's with zero points as they are.
"""

from functools import partial
from typing import Any

from auto_mmround.export import auto_awq
from auto_mmround.export.auto_gptq import pack_gptq, unpack_gptq
from auto_mmround.export.format import (
    Format,
    Layout,
    both_spellings,
    check_int,
    differences,
    kept_groups,
    part_patterns,
    tower_patterns,
)
from auto_mmround.recipe.schemes import Scheme

KEPT = {"bits": 16, "data_type": "float"}


def _check(
    bits: tuple[int, ...], sym_only: bool, scheme: Scheme, out_features: int, in_features: int
) -> str | None:
    if sym_only and not scheme.sym:
        return "auto-round reads this packing as symmetric only; use plain auto_round"
    return check_int(scheme, out_features, in_features, bits, (32, 32))


def _config(packing: str, layout: Layout) -> dict[str, Any]:
    """``quantization_config``; names both as Transformers and as the checkpoint (and so vLLM)
    spells them."""
    groups, singles = kept_groups(layout)
    extra: dict[str, Any] = {}
    for name, scheme in layout.quantized.items():
        outside = not any(name.startswith(block + ".") for block in layout.blocks)
        keys = {"bits": scheme.bits, "data_type": scheme.data_type} if outside else {}
        keys |= differences(scheme, layout.default)
        extra |= {spelling: keys for spelling in both_spellings(layout, name) if keys}
    extra |= {pattern: KEPT for group in groups for pattern in tower_patterns(layout, group)}
    extra |= {spelling: KEPT for single in singles for spelling in both_spellings(layout, single)}
    extra |= dict.fromkeys(part_patterns(layout), KEPT)
    blocks = dict.fromkeys(
        spelling for block in layout.blocks for spelling in both_spellings(layout, block)
    )
    return {
        "quant_method": "auto-round",
        "packing_format": packing,
        "bits": layout.default.bits,
        "group_size": layout.default.group_size,
        "sym": layout.default.sym,
        "data_type": layout.default.data_type,
        "block_name_to_quantize": ",".join(blocks),
        "extra_config": extra,
        "provider": "auto_mmround",
        "auto_mmround": dict(layout.details),
    }


PLAIN = Format(
    name="auto_round",
    summary="AutoRound checkpoint, zero points as they are: Transformers (auto-round)",
    bits=(2, 3, 4, 5, 6, 7, 8),
    check=partial(_check, (2, 3, 4, 5, 6, 7, 8), False),
    pack=partial(pack_gptq, zero_offset=0, g_idx=False),
    unpack=partial(unpack_gptq, zero_offset=0),
    config=partial(_config, "auto_round"),
)
GPTQ = Format(
    name="auto_round:auto_gptq",
    summary=(
        "AutoRound checkpoint in GPTQ's packing, symmetric: Transformers (auto-round), vLLM, SGLang"
    ),
    bits=(2, 3, 4, 5, 6, 7, 8),
    check=partial(_check, (2, 3, 4, 5, 6, 7, 8), True),
    pack=partial(pack_gptq, zero_offset=1, g_idx=False),
    unpack=partial(unpack_gptq, zero_offset=1),
    config=partial(_config, "auto_round:auto_gptq"),
    min_zero=1,
)
AWQ = Format(
    name="auto_round:auto_awq",
    summary=(
        "AutoRound checkpoint in AWQ's packing, 4 bits: Transformers (auto-round + gptqmodel), vLLM"
    ),
    bits=(4,),
    check=auto_awq.check,
    pack=auto_awq.pack,
    unpack=auto_awq.unpack,
    config=partial(_config, "auto_round:auto_awq"),
)
