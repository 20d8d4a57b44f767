"""Phi-3-vision: its processor takes one string, and every image has a numbered tag of its own."""

import re
from itertools import count
from typing import Any

from auto_mmround.calibration.processor import register_processor
from auto_mmround.calibration.rows import BadSample, Sample
from auto_mmround.calibration.template import Encoded, Template

from .basic import Basic

TAG = re.compile(r"<\|image_\d+\|>")


@register_processor("phi3_v")
class Phi3V(Basic):
    """As Basic, with the tags numbered in the order of the images."""

    def render(self, sample: Sample, template: Template, *, prompt: bool = False) -> Encoded:
        encoded = super().render(sample, template, prompt=prompt)
        if len(sample.images) > 9 or len(TAG.findall(encoded.text)) != len(sample.images):
            raise BadSample(
                "markers", f"sample {sample.id}: up to 9 images, each with its tag, are taken"
            )
        numbers = count(1)  # one digit for another: the places of the answers stay
        return encoded._replace(
            text=TAG.sub(lambda tag: f"<|image_{next(numbers)}|>", encoded.text)
        )

    def encode(self, sample: Sample, template: Template, *, prompt: bool = False) -> dict[str, Any]:
        """Negative ids stand where the features of image 1, 2 .. go."""
        text = self.render(sample, template, prompt=prompt).text
        return dict(self.processor(text, list(sample.images) or None, return_tensors="pt"))
