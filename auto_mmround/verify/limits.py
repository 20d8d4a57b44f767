"""What engines refuse of the formats they read, with their own messages: data for `plan`, `verify`
and the support matrix.

Measured with the versions in docs/formats.md, vLLM in its build for processors.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from auto_mmround.errors import UserError
from auto_mmround.model.experts import HALVES, separable
from auto_mmround.model.merging import merged_parameters, own_merges
from auto_mmround.model.structure import find_experts
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run.plan import Plan
from auto_mmround.verify.engines import ENGINES


@dataclass(frozen=True)
class Limit:
    """``engine`` refuses ``what`` of these formats: checkpoints whose schemes pass ``test``.
    message: in its words.

    experts: words of `experts_of` that must all be true of the model. families: model types, but
      for ``spared``. fatal: a recipe whose `engines` name the engine is refused, for what it would
      load is not what was tuned.
    """

    engine: str
    formats: tuple[str, ...]
    what: str
    test: Callable[[Collection[Scheme]], bool]
    message: str
    experts: frozenset[str] = frozenset()
    families: tuple[str, ...] = ()
    spared: tuple[str, ...] = ()
    fatal: bool = False

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


def _wrong(formats: tuple[str, ...], what: str, words: set[str], message: str, **of: Any) -> Limit:
    """What Transformers would load otherwise than it was tuned, or not at all."""
    return _mixture("transformers", formats, what, words, message, fatal=True, **of)


_AUTO_ROUND = ("auto_round", "auto_round:auto_gptq", "auto_round:auto_awq")
_COMPRESSED = ("compressed_tensors", "compressed_tensors:int8", "compressed_tensors:float")
_MADE_UP = "parameters were made up: [.. experts.gate_up_proj ..]"
_DROPPED = "the tensors of these experts are dropped while it merges them"
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
    _wrong(("auto_gptq", "auto_awq"), "quantized experts", {"quantized"}, _MADE_UP),
    _wrong(
        _AUTO_ROUND,
        "experts that the checkpoint names w1, w2, w3",
        {"quantized", "renamed"},
        "parameters were made up: [.. experts.0.down_proj.qweight ..]",
    ),
    _wrong(
        _AUTO_ROUND,
        "experts that stay",
        {"kept"},
        "parameters were made up: [.. experts.0.down_proj.weight ..]",
    ),
    _wrong(
        _AUTO_ROUND,
        "Llama 4's experts",
        {"quantized"},
        "auto-round weighs what they give where the model weighs what they are given",
        families=("llama4", "llama4_text"),
    ),
    _wrong(
        _AUTO_ROUND,
        "Qwen3-Omni's experts",
        {"quantized"},
        "'Qwen3OmniMoeThinkerTextExperts' object has no attribute 'gate_up_proj'",
        families=("qwen3_omni_moe", "qwen3_omni_moe_thinker"),
    ),
    _wrong(
        _AUTO_ROUND,
        "a tower whose q, k, v are one tensor",
        set(),
        "tensors were not used: ['model.vision_tower.layers.0.wqkv.bias', ..]",
        families=("kimi_k25",),
    ),
    _wrong(
        _AUTO_ROUND,
        "tensors that it merges while loading",
        {"merged"},
        "parameters were made up: auto-round switches the merging off",
    ),
    _wrong(
        _COMPRESSED,
        "experts that the source stacks",
        {"quantized", "stacked"},
        _MADE_UP,
        spared=("llama4", "llama4_text"),
    ),
    _wrong(
        _COMPRESSED[:2],
        "tensors that stay and that it merges while loading",
        {"left"},
        "RuntimeError: CONVERSION entries, for what is not packed is dropped there",
    ),
    _wrong(_COMPRESSED, "experts of several schemes", {"several"}, "it takes one for all"),
    _wrong(_COMPRESSED, "experts of another scheme than most layers", {"other"}, "it takes one"),
    _wrong(_COMPRESSED, "asymmetric experts", {"asymmetric"}, "zero points are dropped"),
    _wrong(_COMPRESSED[1:2], "experts beside 8-bit activations", {"quantized"}, _DROPPED),
    _wrong(_COMPRESSED[2:], "experts in blocks or MXFP8", {"blocks"}, "CONVERSION entries"),
    _wrong(
        _COMPRESSED[2:], "tensors of 4 bits beside some it merges", {"left", "4 bits"}, _DROPPED
    ),
    _mixture(
        "vllm",
        (*_AUTO_ROUND[1:], "auto_gptq", "auto_awq", *_COMPRESSED),
        "quantized experts",
        {"quantized"},
        "its source has no kernels for them there",
    ),
)
# Of which build the limits of an engine are.
BUILDS = {"vllm": "vllm on processors"}


def experts_of(model: PreTrainedModel, plan: Plan) -> frozenset[str]:
    """What is true of a model's experts: "quantized"; "stacked" in the checkpoint, or "renamed",
    where it does not say gate_proj, up_proj, down_proj; "kept", where those that auto-round takes
    apart stay as one parameter a layer; "asymmetric"; of "several" schemes; "other", where what
    they share with all tokens has another one; in 8-bit floats by "blocks".

    And of all weights: "merged", where Transformers merges or splits some that auto-round expects
    as they are stored; "left", where it merges some that stay beside packed ones; "4 bits", where
    floats of 4 bits are packed.
    """
    experts = separable(model)
    chosen = {name: expert for name, expert in experts.items() if name in plan.quantized}
    schemes = {replace(plan.quantized[name], scale_dtype="fp16") for name in chosen}
    others = {  # Transformers looks for the word in names
        replace(scheme, scale_dtype="fp16")
        for name, scheme in plan.quantized.items()
        if name not in chosen and "experts" in name
    }
    usual = {*HALVES, "down_proj"}
    apart = {e.parameter for e in experts.values() if not e.stacked or e.alone}
    whole = {e.parameter for n, e in experts.items() if not e.stacked and n not in chosen}
    fused = [name for name in find_experts(model).fused if name not in apart]
    merged = merged_parameters(model)
    single = {e.parameter for e in experts.values() if not e.stacked}
    packed = single - whole
    words = {
        "quantized": bool(chosen),
        "stacked": any(expert.stacked for expert in chosen.values()),
        "renamed": any(expert.key.split(".")[-2] not in usual for expert in chosen.values()),
        "kept": any(_taken_apart(model, name) for name in fused),
        "asymmetric": any(not scheme.sym for scheme in schemes),
        "several": len(schemes) > 1,
        "blocks": any(s.data_type in ("fp8", "mxfp8") and s.group_size > 0 for s in schemes),
        "4 bits": any(s.data_type in ("nvfp4", "mxfp4") for s in plan.quantized.values()),
        "other": bool(schemes) and not others <= schemes,
        "merged": bool(own_merges(model) - apart),
        "left": any(
            name not in packed and all(source.endswith(".weight") for source in sources)
            for name, sources in merged.items()
        ),
    }
    return frozenset(word for word, true in words.items() if true)


def _taken_apart(model: PreTrainedModel, parameter: str) -> bool:
    """Whether auto-round makes linear layers of it: its module is one whose kernel Transformers
    can exchange."""
    module = model.get_submodule(parameter.rpartition(".")[0])
    return hasattr(module, "is_concatenated") and model.get_parameter(parameter).ndim == 3


def refusals(model: PreTrainedModel, plan: Plan, engines: Collection[str] = ()) -> list[str]:
    """A line for each engine that is known not to load a format of the plan, though it reads it as
    such.

    engines: those that have to. Raises UserError where one of them would load something else.
    """
    # no configuration names it
    schemes = {replace(scheme, scale_dtype="fp16") for scheme in plan.quantized.values()}
    experts, lines = experts_of(model, plan), []
    for fmt in plan.formats:
        for engine in ENGINES:
            found = _limit(engine, fmt.name, schemes, experts, model.config.model_type)
            if found is None:
                continue
            line = _line(found, fmt.name)
            if found.fatal and engine in engines:
                others = ", ".join(e for e in ENGINES if e != engine and reads(e, fmt.name))
                hint = f", or --engines {others} if {engine} need not read it" if others else ""
                raise UserError(f"{line}; write another --format (fake loads anywhere){hint}")
            lines.append(line)
    return lines


def refusal(
    engine: str,
    format_name: str,
    schemes: Collection[Scheme],
    experts: Collection[str] = (),
    family: str = "",
) -> str | None:
    """Why an engine that reads the format takes no checkpoint with these schemes; None if it takes
    it.

    experts: words of `experts_of`; family: the model type.
    """
    found = _limit(engine, format_name, schemes, experts, family)
    return None if found is None else _line(found, format_name)


def _limit(
    engine: str,
    format_name: str,
    schemes: Collection[Scheme],
    experts: Collection[str],
    family: str,
) -> Limit | None:
    mine = (limit for limit in LIMITS if limit.engine == engine and format_name in limit.formats)
    return next((limit for limit in mine if limit.hits(schemes, experts, family)), None)


def _line(limit: Limit, format_name: str) -> str:
    engine = BUILDS.get(limit.engine, limit.engine)
    return f"{engine} takes no {format_name} with {limit.what}: {limit.message}"


def reads(engine: str, format_name: str) -> bool:
    """Whether the engine reads the format at all."""
    formats = ENGINES[engine].formats
    return format_name in formats or format_name.partition(":")[0] in formats


def support(format_name: str) -> dict[str, str]:
    """Engine -> "-" where it does not read the format, else "yes", with the numbers of its limits,
    counted from 1."""
    found = {}
    for engine in ENGINES:
        notes = [
            str(i)
            for i, limit in enumerate(LIMITS, 1)
            if limit.engine == engine and format_name in limit.formats
        ]
        found[engine] = (
            " ".join(["yes", *([f"({', '.join(notes)})"] if notes else [])])
            if reads(engine, format_name)
            else "-"
        )
    return found
