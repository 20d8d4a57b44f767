"""CogVLM2: no Transformers processor; image features take a fixed number of places right behind the
first token."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from auto_mmround.calibration.processor import register_processor
from auto_mmround.calibration.rows import BadSample, Sample
from auto_mmround.calibration.template import Template

from .basic import Basic

# The normalisation of the CLIP family that its vision tower was trained with.
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])
LANGUAGE, VISION = 0, 1


def _setting(config: Any, key: str) -> int:
    vision = config.vision_config
    return int(vision[key] if isinstance(vision, dict) else getattr(vision, key))


@register_processor("cogvlm2")
class CogVLM2(Basic):
    """Writes ids, token types and pixels as the family's own code does, from the configuration
    alone."""

    def encode(self, sample: Sample, template: Template, *, prompt: bool = False) -> dict[str, Any]:
        """`images` is a list (batch) of lists of (3, H, W). Raises BadSample for more than one
        image."""
        if len(sample.images) > 1 or sample.videos or sample.audios:
            raise BadSample(
                "markers", f"sample {sample.id}: CogVLM2 takes one image and nothing else"
            )
        text = self.render(sample, template, prompt=prompt).text
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        size, patch = _setting(self.config, "image_size"), _setting(self.config, "patch_size")
        # Features are pooled 2 x 2; two more mark their begin and end.
        places = ((size // patch // 2) ** 2 + 2) * len(sample.images)
        filler = next(
            i
            for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
            if i is not None
        )
        row = torch.tensor([[self.tokenizer.bos_token_id, *[filler] * places, *ids]])
        kinds = torch.tensor([[LANGUAGE, *[VISION] * places, *[LANGUAGE] * len(ids)]])
        inputs: dict[str, Any] = {
            "input_ids": row,
            "token_type_ids": kinds,
            "attention_mask": torch.ones_like(row),
        }
        if sample.images:
            inputs["images"] = [[self._pixels(image, size) for image in sample.images]]
        return inputs

    def modality(self, inputs: dict[str, Any]) -> Tensor:
        """int8 (T,): its token types happen to be the codes of text (0) and image (1)."""
        kinds: Tensor = inputs["token_type_ids"][0].to(torch.int8)
        return kinds

    def _pixels(self, image: Image.Image, size: int) -> Tensor:
        pixels_HWC = (
            np.asarray(image.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32) / 255
        )
        return ((torch.from_numpy(pixels_HWC) - MEAN) / STD).permute(2, 0, 1).contiguous()
