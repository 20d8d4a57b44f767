"""Whisper: the encoder hears the sound, the decoder is taught the transcript."""

from typing import Any

import torch
from torch import Tensor

from auto_mmround.calibration.processor import register_processor
from auto_mmround.calibration.rows import BadSample, Sample
from auto_mmround.calibration.template import MARKERS, Encoded, Template

from .basic import Basic


@register_processor("whisper")
class Whisper(Basic):
    """The transcript is the last answer, or the only turn's text (rows with `audio` and `text`)."""

    def render(self, sample: Sample, template: Template, *, prompt: bool = False) -> Encoded:
        text = "" if prompt else sample.messages[-1].content.replace(MARKERS["audio"], "").strip()
        return Encoded(text, ((0, len(text)),) if text else ())

    def encode(self, sample: Sample, template: Template, *, prompt: bool = False) -> dict[str, Any]:
        """`input_features` (1, mels, frames) and `decoder_input_ids`. Raises BadSample without exactly one sound."""
        if len(sample.audios) != 1 or sample.images or sample.videos:
            raise BadSample("markers", f"sample {sample.id}: Whisper takes one sound and its transcript")
        extractor = self.processor.feature_extractor
        heard = extractor(sample.audios[0], sampling_rate=extractor.sampling_rate, return_tensors="pt")
        words = self.tokenizer(self.render(sample, template, prompt=prompt).text)["input_ids"]
        start = self.config.decoder_start_token_id
        # Labels shifted right: its tokenizer opens with the start token and closes with the end of text.
        end = [self.config.eos_token_id] * (words[-1:] == [self.config.eos_token_id])
        ids = ([] if words[:1] == [start] else [start]) + words[: len(words) - len(end)]
        return {"input_features": heard["input_features"], "decoder_input_ids": torch.tensor([ids])}

    def modality(self, inputs: dict[str, Any]) -> Tensor:
        """int8 (T,): the decoder reads text alone."""
        return torch.zeros(inputs["decoder_input_ids"].shape[1], dtype=torch.int8)
