"""What engines refuse of the formats that they read, in their own messages.

A table for `plan`, `verify` and `formats`. Measured with the versions in docs/formats.md; vLLM in
its build for processors.
"""

from collections.abc import Collection
from dataclasses import replace

from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auto_mmround.errors import UserError
from auto_mmround.export.format import Limit
from auto_mmround.export.formats import FORMATS
from auto_mmround.model.experts import HALVES, separable
from auto_mmround.model.merging import merged_parameters, own_merges
from auto_mmround.model.structure import find_experts, linears
from auto_mmround.readers import ENGINES, READERS
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run.plan import Plan

# Every one once, though several formats have it.
LIMITS = tuple(dict.fromkeys(limit for fmt in FORMATS.values() for limit in fmt.limits))


def experts_of(model: PreTrainedModel, plan: Plan) -> frozenset[str]:
    """What is true of a model's experts: "quantized"; "stacked" in the checkpoint, or "renamed",
    where it does not say gate_proj, up_proj, down_proj; "kept", where those that auto-round takes
    apart stay as one parameter a layer; "asymmetric"; of "several" schemes; "other", where what
    they share with all tokens has another one; in 8-bit floats by "blocks"; in "NVFP4".

    And of all weights: "merged", where Transformers merges or splits some that auto-round expects
    as they are stored; "left", where it merges some that stay beside packed ones; "4 bits", where
    floats of 4 bits are packed; "turned", where a layer that Transformers keeps as (in, out) is.
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
    own = {expert.parameter for expert in chosen.values()}
    apart = {  # stacks with biases that stay are written as stacks, see `Names.taken_apart`
        e.parameter
        for e in experts.values()
        if not e.stacked or (e.alone and (not e.biases or e.parameter in own))
    }
    whole = {e.parameter for n, e in experts.items() if not e.stacked and n not in chosen}
    fused = [name for name in find_experts(model).fused if name not in apart]
    merged = merged_parameters(model)
    packed = {e.parameter for e in experts.values() if not e.stacked} - whole
    words = {
        "quantized": bool(chosen),
        "stacked": any(expert.stacked for expert in chosen.values()),
        "renamed": any(expert.key.split(".")[-2] not in usual for expert in chosen.values()),
        "kept": any(_taken_apart(model, name) for name in fused),
        "asymmetric": any(not scheme.sym for scheme in schemes),
        "several": len(schemes) > 1,
        "blocks": any(s.data_type in ("fp8", "mxfp8") and s.group_size > 0 for s in schemes),
        "NVFP4": any(s.data_type == "nvfp4" for s in schemes),
        "4 bits": any(s.data_type in ("nvfp4", "mxfp4") for s in plan.quantized.values()),
        "turned": any(
            isinstance(m, Conv1D) for name, m in linears(model) if name in plan.quantized
        ),
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
            limit = _limit(engine, fmt.name, schemes, experts, model.config.model_type)
            if limit is None:
                continue
            line = _line(limit, fmt.name)
            if limit.fatal and engine in engines:
                others = ", ".join(e for e in ENGINES if e != engine and e in fmt.engines)
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
    """Why an engine that reads the format refuses these schemes; None if it does not.

    experts: words of `experts_of`. family: the model type.
    """
    limit = _limit(engine, format_name, schemes, experts, family)
    return None if limit is None else _line(limit, format_name)


def _limit(
    engine: str,
    format_name: str,
    schemes: Collection[Scheme],
    experts: Collection[str],
    family: str,
) -> Limit | None:
    mine = sorted(FORMATS[format_name].limits, key=lambda limit: not limit.fatal)
    return next((m for m in mine if m.engine == engine and m.hits(schemes, experts, family)), None)


def _line(limit: Limit, format_name: str) -> str:
    engine = READERS[limit.engine].build or limit.engine
    return f"{engine} takes no {format_name} with {limit.what}: {limit.message}"


def support(format_name: str) -> dict[str, str]:
    """Engine -> "-" where it does not read the format, else "yes", with the numbers of its limits,
    counted from 1."""
    fmt = FORMATS[format_name]
    engines = {}
    for engine in ENGINES:
        notes = [
            str(i)
            for i, limit in enumerate(LIMITS, 1)
            if limit.engine == engine and limit in fmt.limits
        ]
        yes = " ".join(["yes", *([f"({', '.join(notes)})"] if notes else [])])
        engines[engine] = yes if engine in fmt.engines else "-"
    return engines
