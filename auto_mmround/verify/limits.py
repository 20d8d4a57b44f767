"""What engines refuse of the formats that they read, in their own messages.

A table for `plan`, `verify` and `formats`. Measured with the versions in docs/formats.md; vLLM in
its build for processors.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from auto_mmround.model.experts import HALVES, separable
from auto_mmround.model.structure import find_experts
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run.plan import Plan
from auto_mmround.verify.engines import ENGINES


@dataclass(frozen=True)
class Limit:
    """``engine`` refuses ``what`` of these formats: checkpoints whose schemes pass ``test``.

    message: in its words. experts: words of `experts_of` that must all be true of the model.
    families: model types, without the ``spared`` ones.
    """

    engine: str
    formats: tuple[str, ...]
    what: str
    test: Callable[[Collection[Scheme]], bool]
    message: str
    experts: frozenset[str] = frozenset()
    families: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()

    def hits(self, schemes: Collection[Scheme], experts: Collection[str], family: str) -> bool:
        """Whether a checkpoint is refused."""
        here = family not in self.spared and (not self.families or family in self.families)
        return here and self.experts <= set(experts) and self.test(schemes)


def _any(test: Callable[[Scheme], bool]) -> Callable[[Collection[Scheme]], bool]:
    return lambda schemes: any(map(test, schemes))


def _mixture(
    engine: str, formats: tuple[str, ...], what: str, words: set[str], message: str, **of: Any
) -> Limit:
    return Limit(engine, formats, what, lambda schemes: True, message, frozenset(words), **of)


_AUTO_ROUND = ("auto_round", "auto_round:auto_gptq", "auto_round:auto_awq")
_COMPRESSED = ("compressed_tensors", "compressed_tensors:int8", "compressed_tensors:float")
_MADE_UP = "parameters were made up: [.. experts.gate_up_proj ..]"
_KERNEL = "Failed to find a kernel that can implement the"
LIMITS = (
    Limit(
        "transformers", ("auto_gptq",), "several schemes", lambda s: len(s) > 1, "mismatched sizes"
    ),
    Limit(
        "transformers",
        ("compressed_tensors",),
        "several schemes, one of them asymmetric",
        lambda s: len(s) > 1 and not all(scheme.sym for scheme in s),
        "mismatched sizes",
    ),
    Limit(
        "vllm",
        ("auto_gptq",),
        "asymmetric weights",
        _any(lambda s: not s.sym),
        "Unsupported quantization config: bits=4, sym=False",
    ),
    Limit(
        "vllm",
        ("auto_gptq",),
        "other than 4 bits",
        _any(lambda s: s.bits != 4),
        "Marlin does not support weight_bits = uint8b128. Only types = [ScalarType.uint4b8] are"
        " supported",
    ),
    Limit(
        "vllm",
        ("auto_round:auto_gptq",),
        "other than 4 bits",
        _any(lambda s: s.bits != 4),
        "INC on CPU: unsupported config INCLayerConfig(bits=8, ..)",
    ),
    Limit(
        "vllm",
        ("compressed_tensors",),
        "other than 4 bits",
        _any(lambda s: s.bits != 4 and s.act_bits == 16 and s.data_type == "int"),
        f"{_KERNEL} WNA16 linear layer. Quant type (uint3b4) not supported by CPUWNA16",
    ),
    Limit(
        "vllm",
        ("compressed_tensors:float",),
        "FP8 in blocks",
        _any(lambda s: s.data_type == "fp8" and s.group_size > 0),
        "CPUFp8W8A8BlockScaledMMKernel requires AMX tile support (Sapphire Rapids or newer)",
    ),
    Limit(
        "vllm",
        ("compressed_tensors:float",),
        "NVFP4",
        _any(lambda s: s.data_type == "nvfp4"),
        "Forced NVFP4 kernel MarlinNvFp4LinearKernel is not supported: Marlin FP4 not available",
    ),
    Limit(
        "vllm",
        ("compressed_tensors:float",),
        "MXFP4",
        _any(lambda s: s.data_type == "mxfp4"),
        f"{_KERNEL} MXFP4 linear layer",
    ),
    _mixture(
        "transformers", ("auto_gptq", "auto_awq"), "quantized experts", {"quantized"}, _MADE_UP
    ),
    _mixture(
        "transformers",
        _AUTO_ROUND,
        "experts that the checkpoint names w1, w2, w3",
        {"quantized", "renamed"},
        "parameters were made up: [.. experts.0.down_proj.qweight ..]",
    ),
    _mixture(
        "transformers",
        _AUTO_ROUND,
        "experts that stay",
        {"kept"},
        "parameters were made up: [.. experts.0.down_proj.weight ..]",
    ),
    _mixture(
        "transformers",
        _AUTO_ROUND,
        "Qwen3-Omni's experts",
        {"quantized"},
        "'Qwen3OmniMoeThinkerTextExperts' object has no attribute 'gate_up_proj'",
        families=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    ),
    _mixture(
        "transformers",
        _AUTO_ROUND,
        "a tower whose q, k, v are one tensor",
        set(),
        "tensors were not used: ['model.vision_tower.layers.0.wqkv.bias', ..]",
        families=("kimi_k25",),
    ),
    _mixture(
        "transformers",
        _COMPRESSED,
        "Nemotron-H's experts",
        set(),
        "parameters were made up: ['model.layers.1.mixer.experts.down_proj', ..]",
        families=("nemotron_h",),
    ),
    _mixture(
        "transformers",
        _COMPRESSED,
        "experts that the source stacks",
        {"quantized", "stacked"},
        _MADE_UP,
        spared=("llama4",),
    ),
    _mixture(
        "vllm",
        (*_AUTO_ROUND[1:], "auto_gptq", "auto_awq", *_COMPRESSED),
        "quantized experts",
        {"quantized"},
        "its source has no kernels for them there",
    ),
)
# The build of an engine that was measured.
BUILDS = {"vllm": "vllm on processors"}


def experts_of(model: PreTrainedModel, plan: Plan) -> frozenset[str]:
    """Words that are true of a model's experts.

    "quantized"; "stacked" in the checkpoint; "renamed": not called gate_proj, up_proj, down_proj
    there; "kept": they stay as one parameter for each layer.
    """
    experts = separable(model)
    chosen = [expert for name, expert in experts.items() if name in plan.quantized]
    usual = {*HALVES, "down_proj"}
    apart = {expert.parameter for expert in experts.values()}
    words = {
        "quantized": bool(chosen),
        "stacked": any(expert.stacked for expert in chosen),
        "renamed": any(expert.tail.split(".")[1] not in usual for expert in chosen),
        "kept": any(name not in apart for name in find_experts(model).fused),
    }
    return frozenset(word for word, true in words.items() if true)


def refusals(model: PreTrainedModel, plan: Plan) -> list[str]:
    """A line for each engine that reads a format of the plan, but is known not to load this
    checkpoint."""
    # no configuration names it
    schemes = {replace(scheme, scale_dtype="fp16") for scheme in plan.quantized.values()}
    experts = experts_of(model, plan)
    lines = [
        refusal(engine, fmt.name, schemes, experts, model.config.model_type)
        for fmt in plan.formats
        for engine in ENGINES
    ]
    return [line for line in lines if line is not None]


def refusal(
    engine: str,
    format_name: str,
    schemes: Collection[Scheme],
    experts: Collection[str] = (),
    family: str = "",
) -> str | None:
    """Why an engine that reads the format refuses these schemes; None if it does not.

    experts: words of `experts_of`. family: the model type.
    """
    for limit in LIMITS:
        if (
            limit.engine == engine
            and format_name in limit.formats
            and limit.hits(schemes, experts, family)
        ):
            return (
                f"{BUILDS.get(engine, engine)} takes no {format_name} with {limit.what}:"
                f" {limit.message}"
            )
    return None


def support(format_name: str) -> dict[str, str]:
    """Engine -> "-" if it does not read the format, else "yes" with the numbers of its limits, from
    1."""
    root = format_name.partition(":")[0]
    found = {}
    for engine, row in ENGINES.items():
        notes = [
            str(i)
            for i, limit in enumerate(LIMITS, 1)
            if limit.engine == engine and format_name in limit.formats
        ]
        reads = format_name in row.formats or root in row.formats
        found[engine] = (
            " ".join(["yes", *([f"({', '.join(notes)})"] if notes else [])]) if reads else "-"
        )
    return found
