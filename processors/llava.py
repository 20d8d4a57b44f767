"""LLaVA 1.5 in its Transformers form (`LlavaProcessor`)."""

from auto_mmround.calibration.processor import chat_owner, register_processor
from auto_mmround.calibration.rows import Sample
from auto_mmround.calibration.template import Encoded, Template

from .basic import Basic

# Checkpoints without a chat template were trained on the Vicuna v1 conversation form.
VICUNA = Template(
    format_user="USER: {{content}} ",
    format_assistant="ASSISTANT: {{content}}</s>",
    extra_encode=True,
)


@register_processor("llava")
class Llava(Basic):
    """As Basic, with the Vicuna form where the checkpoint brings no chat template."""

    def render(self, sample: Sample, template: Template, *, prompt: bool = False) -> Encoded:
        if not template.extra_encode and chat_owner(self.tokenizer, self.processor) is None:
            template = VICUNA
        return super().render(sample, template, prompt=prompt)
