"""The last hidden states of a model and the head that makes logits of them, a few positions at a
time.

A vocabulary of a quarter million words makes the logits of one sample larger than a small model.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature, unwrap
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from auto_mmround.errors import UserError
from auto_mmround.model import devices
from auto_mmround.model.passes import run_model, stopping_at
from auto_mmround.model.speaking import speaking
from auto_mmround.model.structure import input_weight

# Logits in memory at a time: on a processor few enough for its cache to help. On an accelerator
# pieces cost launches: as many as an eighth of the free memory holds, with what is made of them.
LOGITS, EACH, ROOM = 2**23, 16, 8
# model, what it takes -> hidden states (T, D), and the module that turns them into logits (T, V)
ToHead = Callable[[PreTrainedModel, Mapping[str, Any]], tuple[Tensor, nn.Module]]


def check_head(model: PreTrainedModel) -> None:
    """Raises UserError for a class of Transformers that predicts no tokens: it has no head, or one
    that classifies.

    Code that comes with a model need not say where its head is.
    """
    model = speaking(model)
    own = type(model).__module__.startswith("transformers.")
    # Some that write do not say where their head is (BLIP).
    tells = model.get_output_embeddings() is not None or model.can_generate()
    if own and not tells and type(model).__name__ not in _predicting():
        known = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        like = known.get(model.config.model_type, "LlamaForCausalLM")
        raise UserError(
            f"{type(model).__name__} has no head that predicts tokens, which quantizing is measured"
            f" by: give a model with one, and a class like {like} in architectures of its"
            " config.json"
        )


def untie(model: PreTrainedModel) -> bool:
    """Give an output head that is the input embedding a copy of it; False where it is not. Raises
    UserError for a class that computes something else when its configuration says so."""
    speaks = speaking(model)
    head, words = speaks.get_output_embeddings(), input_weight(model)
    if words is None or not isinstance(head, nn.Linear) or head.weight is not words:
        return False
    if "tie_word_embeddings" in unwrap(type(speaks).forward).__code__.co_names:
        raise UserError(
            f"untie_lm_head: {type(speaks).__name__} scales what its head reads where that is the"
            " input embedding, so it can't have one of its own; leave it off"
        )
    head.weight = nn.Parameter(words.detach().clone(), requires_grad=words.requires_grad)
    for part in {id(each): each for each in (model, speaks)}.values():
        config = part.config
        for level in {id(each): each for each in (config, config.get_text_config())}.values():
            level.tie_word_embeddings = False
        name = next((n for n, module in part.named_modules() if module is head), "")
        part.all_tied_weights_keys.pop(f"{name}.weight", None)
    return True


def _predicting() -> set[str]:
    """Classes that hear or see, and give logits, by a head of their own: CTC and transducers."""
    tables = (
        modeling_auto.MODEL_FOR_CTC_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_RNNT_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_TDT_MAPPING_NAMES,
    )
    return {name for table in tables for name in table.values()}


def to_head(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> ToHead:
    """How to run the model up to its head; tried on ``kwargs``. The logits themselves and an
    identity, where a soft cap or a scale comes after the head."""
    return _until_head if _head_is_last(model, kwargs) else _whole


def room(device: torch.device) -> int:
    """Logits that may be in memory at a time."""
    return LOGITS if device.type == "cpu" else devices.free_memory(device) // (ROOM * EACH)


def parts(head: nn.Module, *hidden_TD: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Rows of tensors side by side, in the same memory, as many at a time as there is room for
    their logits."""
    device, width = hidden_TD[0].device, hidden_TD[0].shape[-1]
    rows = max(1, room(device) // getattr(head, "out_features", width))
    return zip(*(each_TD.split(rows) for each_TD in hidden_TD), strict=True)


@contextmanager
def _at_head(model: PreTrainedModel, hook: Callable[..., None]) -> Iterator[None]:
    handle = speaking(model).get_output_embeddings().register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _head_is_last(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> bool:
    """Whether the logits are what the output head gives: no soft cap or scale comes after it."""
    model = speaking(model)
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        return False
    made: list[Tensor] = []
    # The last position is enough: logits of a whole sample would be the largest tensor of a run.
    few = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
    with torch.no_grad(), _at_head(model, lambda head, args, output: made.append(output)):
        logits = run_model(model, {**kwargs, **few}).logits
    return (
        len(made) == 1
        and made[0].shape == logits.shape
        and torch.equal(made[0], logits.to(made[0]))
    )


def _until_head(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> tuple[Tensor, nn.Module]:
    """The last hidden states (T, D) where the head lies, and the head that turns them into
    logits."""
    model = speaking(model)
    head = model.get_output_embeddings()
    with stopping_at(head) as reached:
        run_model(model, kwargs)
    return reached[0][0].to(head.weight.device), head


def _whole(model: PreTrainedModel, kwargs: Mapping[str, Any]) -> tuple[Tensor, nn.Module]:
    """For models that change the head's output: the logits themselves. Of a transducer, or of
    several codebooks, all of a sample's in one list."""
    return run_model(model, kwargs).logits.flatten(0, -2), nn.Identity()
