"""What engines refuse of the formats that they read, in their own messages.

A table for `plan`, `verify` and `formats`. Measured with the versions in docs/formats.md; vLLM in
its build for processors.
"""

from collections.abc import Collection
from dataclasses import replace

from transformers import PreTrainedModel

from auto_mmround.export.formats import FORMATS
from auto_mmround.model.experts import HALVES, separable
from auto_mmround.model.structure import find_experts
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run.plan import Plan
from auto_mmround.verify.engines import ENGINES

# Every one once, though several formats have it.
LIMITS = tuple(dict.fromkeys(limit for fmt in FORMATS.values() for limit in fmt.limits))
# Of which build the limits of an engine are.
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
    for limit in FORMATS[format_name].limits:
        if limit.engine == engine and limit.hits(schemes, experts, family):
            return (
                f"{BUILDS.get(engine, engine)} takes no {format_name} with {limit.what}:"
                f" {limit.message}"
            )
    return None


def support(format_name: str) -> dict[str, str]:
    """Engine -> "-" where it does not read the format, else "yes", with the numbers of its limits,
    counted from 1."""
    fmt = FORMATS[format_name]
    found = {}
    for engine in ENGINES:
        notes = [
            str(i)
            for i, limit in enumerate(LIMITS, 1)
            if limit.engine == engine and limit in fmt.limits
        ]
        yes = " ".join(["yes", *([f"({', '.join(notes)})"] if notes else [])])
        found[engine] = yes if engine in fmt.engines else "-"
    return found
