"""The processor for most families: text by the template or the chat template, the rest by the
model's own processor."""

from typing import Any

from auto_mmround.calibration.processor import (
    check_heard,
    hearing,
    register_processor,
    render,
    special_tokens_for,
)
from auto_mmround.calibration.rows import Sample
from auto_mmround.calibration.template import Encoded, Template
from auto_mmround.errors import UserError


@register_processor("hf")
@register_processor("basic")
class Basic:
    """Calls the Transformers processor once with the whole text and all media; every output is
    passed on."""

    def __init__(
        self, tokenizer: Any, processor: Any = None, image_processor: Any = None, config: Any = None
    ) -> None:
        self.tokenizer, self.processor = tokenizer, processor
        self.image_processor, self.config = image_processor, config

    def render(self, sample: Sample, template: Template, *, prompt: bool = False) -> Encoded:
        """The sample's text and the places of its answers; a family that writes differently
        overrides this."""
        return render(
            sample.messages,
            template,
            self.tokenizer,
            self.processor,
            prompt=prompt,
            options=sample.options,
        )

    def encode(self, sample: Sample, template: Template, *, prompt: bool = False) -> dict[str, Any]:
        """Raises UserError for media without a processor to read them."""
        text = self.render(sample, template, prompt=prompt).text
        options = special_tokens_for(self.tokenizer, text)
        if self.processor is None:
            if sample.has_media:
                raise UserError(
                    "the samples have media, but the model has no processor: give processor="
                )
            return dict(self.tokenizer([text], return_tensors="pt", **options))
        media = {"images": sample.images, "videos": sample.videos, "audio": sample.audios}
        given: dict[str, Any] = {key: list(items) for key, items in media.items() if items}
        if sample.audios:
            extractor = hearing(self.processor)
            check_heard(sample, extractor)
            # else some warn that they can't check
            given["audio_kwargs"] = {"sampling_rate": extractor.sampling_rate}
        return dict(self.processor(text=[text], return_tensors="pt", **given, **options))
