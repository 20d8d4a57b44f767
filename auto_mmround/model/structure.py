"""Stages and blocks, found from the module tree.

A stage is a list of blocks that one hidden state runs through: the layers of a vision tower, of an audio encoder, of
the text model. Candidates are ModuleLists of equal modules that hold linear weights and stand in no other such list;
whether a forward pass really runs through them one after the other is seen when inputs are captured (`chains`).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from auto_mmround.errors import UserError

LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class Stage:
    """name: "text", or the modality of the tower. path: dotted name of the block list. depth: number of blocks."""

    name: str
    path: str
    depth: int

    @property
    def blocks(self) -> list[str]:
        """Dotted names of the blocks, in order."""
        return [f"{self.path}.{i}" for i in range(self.depth)]


def linears(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(dotted name, module) of every linear layer below ``module``."""
    for name, child in module.named_modules(prefix=prefix):
        if isinstance(child, LINEAR):
            yield name, child


def find_stages(model: PreTrainedModel) -> list[Stage]:
    """All stages, text last. Raises UserError when the model has no text blocks."""
    lists = dict(_block_lists(model))
    decoder = _prefix_of(model, model.get_decoder())
    inside = [path for path in lists if _is_inside(path, decoder)]
    if not inside:
        raise UserError(f"{type(model).__name__}: found no list of text blocks; add the family to model/families.py")
    # A tower may hang below the decoder (Phi-3-vision); the decoder's own layers are the list nearest to it.
    text = min(inside, key=lambda path: (path.count("."), -len(lists[path])))
    towers = [Stage(_tower_name(model, path), path, len(lists[path])) for path in lists if path != text]
    return [*towers, Stage("text", text, len(lists[text]))]


def select_stages(stages: list[Stage], nontext: bool, names: str | None) -> list[Stage]:
    """The stages to quantize: text, with ``nontext`` the towers too, or those whose path matches ``names``.

    names: comma-separated regular expressions, as in `to_quant_block_names`; UserError if one matches nothing.
    """
    if names is None:
        return [stage for stage in stages if nontext or stage.name == "text"]
    chosen = []
    for pattern in (part.strip() for part in names.split(",")):
        found = [stage for stage in stages if re.search(pattern, stage.path)]
        if not found:
            known = ", ".join(stage.path for stage in stages)
            raise UserError(f"to_quant_block_names: {pattern!r} matches no list of blocks; this model has {known}")
        chosen += found
    return [stage for stage in stages if stage in chosen]


def _block_lists(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList]]:
    taken: list[str] = []
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module) or any(_is_inside(path, t) for t in taken):
            continue
        block = module[0]
        if isinstance(block, LINEAR) or not all(type(other) is type(block) for other in module):
            continue
        if any(True for _ in linears(block)):
            taken.append(path)
            yield path, module


def _tower_name(model: PreTrainedModel, path: str) -> str:
    for modality, name in (("image", "vision"), ("audio", "audio")):
        tower = model.get_encoder(modality=modality)
        if tower is not model and _is_inside(path, _prefix_of(model, tower)):
            return name
    encoder = model.get_encoder()
    if encoder is not model and _is_inside(path, _prefix_of(model, encoder)):
        return "encoder"
    return "nontext"


def _prefix_of(model: nn.Module, part: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is part), "")


def _is_inside(path: str, prefix: str) -> bool:
    return not prefix or path == prefix or path.startswith(prefix + ".")
