"""What structure alone cannot tell about a model family, as data. A family that is missing here has no quirk."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Family:
    """Quirks of one `config.model_type`.

    title: as people write it. text_only: the model runs on plain text, so a text set can calibrate it.
    template: name on the template shelf, where it is not the model type. connectors: names of module lists that look
    like blocks and are none, because no hidden state runs from one to the next. towers: part of a module name -> stage
    name, where the code does not declare what a tower reads.
    """

    title: str
    text_only: bool = True
    template: str | None = None
    connectors: tuple[str, ...] = ()
    towers: Mapping[str, str] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "qwen2_vl": Family("Qwen2-VL-Instruct"),
    "qwen2_5_vl": Family("Qwen2.5-VL-Instruct", template="qwen2_vl"),
    "qwen3_vl": Family("Qwen3-VL", connectors=("deepstack_merger_list",)),
    "qwen3_vl_moe": Family("Qwen3-VL-MoE", connectors=("deepstack_merger_list",)),
    "mllama": Family("Llama-3.2-Vision", text_only=False),
    "phi3_v": Family("Phi-3.5-vision-instruct"),
    "llava": Family("LLaVA-1.5"),
    "cogvlm2": Family("CogVLM2", towers={"vision": "vision"}),
}


def family_of(model_type: str) -> Family:
    """The family's entry, or one without quirks."""
    return FAMILIES.get(model_type, Family(model_type))
