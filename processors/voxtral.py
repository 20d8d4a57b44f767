"""Voxtral: its tokenizer, mistral-common's, writes the conversation itself and only as a
question."""

import base64
import io
from importlib.util import find_spec
from typing import Any

import torch

from auto_mmround.calibration.processor import register_processor, split_markers
from auto_mmround.calibration.rows import BadSample, Sample
from auto_mmround.calibration.template import Encoded, Template, without_last_answer
from auto_mmround.calibration.turns import extras
from auto_mmround.errors import UserError

from .basic import Basic


@register_processor("voxtral")
class Voxtral(Basic):
    """The conversation up to the last answer by the processor's own chat template, then the
    answer's tokens."""

    def render(self, sample: Sample, template: Template, *, prompt: bool = False) -> Encoded:
        last = sample.messages[-1]
        text = last.content.strip() if last.role == "assistant" and not prompt else ""
        return Encoded(
            text, ((0, len(text)),) if text else (), extras(sample.messages, sample.options)
        )

    def encode(self, sample: Sample, template: Template, *, prompt: bool = False) -> dict[str, Any]:
        """`input_ids` and, with sound, `input_features` of 30 seconds each. Raises BadSample for
        images and video."""
        # Transformers puts a tokenizer in its place that can't write this
        if find_spec("mistral_common") is None:
            raise UserError(
                "Voxtral's conversations need the package mistral-common: pip install"
                " mistral-common"
            )
        if sample.images or sample.videos:
            raise BadSample("markers", f"sample {sample.id}: Voxtral takes text and sound")
        sounds = iter(sample.audios)
        chat = []
        for turn in without_last_answer(sample.messages):
            parts = [{"type": "audio",
                "base64": self._wav(next(sounds))} if part["type"] == "audio" else part
                     for part in split_markers(turn.content)]  # fmt: skip
            chat.append(
                {"role": turn.role, "content": parts if turn.role == "user" else turn.content}
            )
        made = dict(self.processor.apply_chat_template(chat))
        answer = self.render(sample, template, prompt=prompt).text
        if answer:
            words = [
                *self.tokenizer(answer, add_special_tokens=False)["input_ids"],
                self.tokenizer.eos_token_id,
            ]
            made["input_ids"] = torch.cat([made["input_ids"], torch.tensor([words])], 1)
        made["attention_mask"] = torch.ones_like(made["input_ids"])
        return made

    def _wav(self, sound_T: Any) -> str:
        """The sound as its tokenizer takes it: a file in base64."""
        try:
            import soundfile
        except ImportError as error:
            raise UserError(
                "audio samples need the package soundfile: pip install soundfile"
            ) from error
        file = io.BytesIO()
        soundfile.write(
            file,
            sound_T,
            self.processor.feature_extractor.sampling_rate,
            format="WAV",
            subtype="FLOAT",
        )
        return base64.b64encode(file.getvalue()).decode()
