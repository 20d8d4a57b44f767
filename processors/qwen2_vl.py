"""Qwen2-VL and its kin: patches of all images in one flat tensor, with a grid for each."""

from typing import Any

from auto_mmround.calibration.processor import register_processor
from auto_mmround.calibration.rows import BadSample, Sample
from auto_mmround.calibration.template import Template

from .basic import Basic


@register_processor("qwen2_vl")
class Qwen2VL(Basic):
    """As Basic; besides, the placeholders must match the features that the grids announce."""

    def encode(self, sample: Sample, template: Template, *, prompt: bool = False) -> dict[str, Any]:
        """Raises BadSample when placeholders and image or video features differ in number."""
        inputs = super().encode(sample, template, prompt=prompt)
        for kind in ("image", "video"):
            token = getattr(self.processor, f"{kind}_token_id", None)
            owner = getattr(self.processor, f"{kind}_processor", None)
            grid = inputs.get(f"{kind}_grid_thw")
            if token is None or owner is None:
                continue
            features = 0 if grid is None else int(grid.prod(dim=-1).sum()) // owner.merge_size**2
            places = int((inputs["input_ids"] == token).sum())
            if places != features:
                message = (
                    f"sample {sample.id}: {places} {kind} placeholders for {features} {kind}"
                    " features"
                )
                raise BadSample("markers", message)
        return inputs
