"""Of a model that is several in one folder (it listens, answers and speaks): the part that predicts
text.

Qwen2.5-Omni and Qwen3-Omni are a thinker, a talker and a vocoder; the whole has no forward pass of
its own. The thinker is what samples are run through and what is quantized, the others come along.
"""

from typing import TypeGuard

from torch import nn
from transformers import PreTrainedModel


def is_several(cls: type[nn.Module]) -> bool:
    """Whether a class of models has no forward pass of its own."""
    return cls.forward is nn.Module.forward


def speaking(model: PreTrainedModel) -> PreTrainedModel:
    """The part whose forward pass gives the logits of text; most models are it themselves."""
    if not is_several(type(model)):
        return model
    return next((part for part in model.children() if _predicts_text(part)), model)


def speaking_path(model: PreTrainedModel) -> str:
    """Dotted name of that part, "" where it is the model itself."""
    return path_of(model, speaking(model))


def path_of(model: nn.Module, part: nn.Module | None) -> str:
    """Dotted name of a module, "" where it is the model itself or no part of it."""
    return next((name for name, module in model.named_modules() if module is part), "")


def output_head(model: nn.Module) -> nn.Module | None:
    """The module behind all blocks that makes the logits; None where none does."""
    try:
        head = speaking(model).get_output_embeddings()  # type: ignore[arg-type]
    except (NotImplementedError, AttributeError):
        return None
    # FSMT names the table of its decoder's words, which is read at the start
    return head if isinstance(head, nn.Module) and not isinstance(head, nn.Embedding) else None


def _predicts_text(part: nn.Module) -> TypeGuard[PreTrainedModel]:
    return (
        isinstance(part, PreTrainedModel)
        and "text" in getattr(part, "output_modalities", ())
        and part.get_output_embeddings() is not None
    )
