"""Whisper: the encoder hears the sound, the decoder is taught the transcript."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

from auto_mmround.calibration.inputs import AUDIO, PAD
from auto_mmround.calibration.processor import check_heard, register_processor
from auto_mmround.calibration.rows import BadSample, Sample
from auto_mmround.calibration.template import Encoded, Template
from auto_mmround.calibration.turns import MARKER, MARKERS, extras

from .basic import Basic

ENGLISH_ONLY = 51864  # words of the models that know one language; the others have more


@register_processor("whisper")
class Whisper(Basic):
    """The transcript is the last answer, or the only turn's text (rows with `audio` and `text`)."""

    def render(self, sample: Sample, template: Template, *, prompt: bool = False) -> Encoded:
        """A blank and the transcript: Whisper's own begin with one."""
        text = "" if prompt else sample.messages[-1].content.replace(MARKERS["audio"], "").strip()
        left = (*extras(sample.messages, sample.options),
            *("other turns" for turn in sample.messages[:-1]
                if MARKER.sub("", turn.content).strip()))  # fmt: skip
        return Encoded(f" {text}", ((0, len(text) + 1),), left) if text else Encoded("", (), left)

    def opening(self) -> list[int]:
        """Start, language, task, no time stamps: what Whisper writes before a transcript.

        Language and task are those of the tokenizer, else English to be transcribed; English models
        have neither.
        """
        language, task = (getattr(self.tokenizer, key, None) for key in ("language", "task"))
        code = TO_LANGUAGE_CODE.get(language or "english", language)
        names = ["<|notimestamps|>"]
        if self.config.vocab_size != ENGLISH_ONLY:
            names = [f"<|{code}|>", f"<|{task or 'transcribe'}|>", *names]
        found = self.tokenizer.convert_tokens_to_ids(names)
        return [
            self.config.decoder_start_token_id,
            *(i for i in found if i not in (None, self.tokenizer.unk_token_id)),
        ]

    def encode(self, sample: Sample, template: Template, *, prompt: bool = False) -> dict[str, Any]:
        """`input_features` (1, mels, frames) and `decoder_input_ids`. Raises BadSample without
        exactly one sound."""
        if len(sample.audios) != 1 or sample.images or sample.videos:
            raise BadSample(
                "markers", f"sample {sample.id}: Whisper takes one sound and its transcript"
            )
        extractor = self.processor.feature_extractor
        check_heard(sample, extractor)
        heard = extractor(
            sample.audios[0], sampling_rate=extractor.sampling_rate, return_tensors="pt"
        )
        text = self.render(sample, template, prompt=prompt).text
        ids = self.opening() + self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return {"input_features": heard["input_features"], "decoder_input_ids": torch.tensor([ids])}

    def modality(self, inputs: dict[str, Any]) -> Tensor:
        """int8 (T,): the decoder reads text alone."""
        return torch.zeros(inputs["decoder_input_ids"].shape[1], dtype=torch.int8)

    def tower_modality(self, inputs: dict[str, Any]) -> Tensor:
        """int8 (frames,): PAD where the encoder's frame, two columns of features, is pure silence
        as padding is."""
        features_MF = inputs["input_features"][0]
        heard_F = (features_MF > features_MF.amin()).any(0).reshape(-1, 2).any(1)
        return torch.where(heard_F, AUDIO, PAD).to(torch.int8)
