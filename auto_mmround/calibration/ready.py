"""Rows that hold the model's inputs ready: ids, features, labels."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from auto_mmround.calibration.rows import BadSample
from auto_mmround.errors import UserError

# Outputs of a processor with one entry a token along dimension 1: they are cut together.
PER_TOKEN = (
    "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "position_ids",
    "cross_attention_mask", "decoder_input_ids", "decoder_attention_mask",
)  # fmt: skip
# Ids -> what has an entry for each of them.
BESIDE = {
    "input_ids": ("attention_mask", "mm_token_type_ids", "token_type_ids"),
    "decoder_input_ids": ("decoder_attention_mask",),
}


def tensors(label: str, values: Mapping[str, Any]) -> dict[str, Tensor]:
    """A row's own inputs of the model as tensors. Raises BadSample, which names what is none."""
    made: dict[str, Tensor] = {}
    for key, value in values.items():
        try:
            made |= {} if value is None else {key: torch.as_tensor(value)}
        except (TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0][:100]
            raise BadSample(
                "form", f"sample {label}: {key!r} beside input_ids is no tensor ({reason})"
            ) from None
    for key in (*PER_TOKEN, "labels"):
        if key in made and made[key].ndim == 1:
            made[key] = made[key][None]
    check_lengths(label, made)
    return made


def check_lengths(label: str, kwargs: Mapping[str, Any]) -> None:
    """Raises BadSample for a mask, or kinds of tokens, of another length than the ids."""
    for ids, keys in BESIDE.items():
        for key in keys:
            if ids not in kwargs or not isinstance(kwargs.get(key), Tensor):
                continue
            wanted, got = kwargs[ids].shape[:2], kwargs[key].shape
            # ids may have a row for each codebook
            if len(got) == 2 and got not in (wanted, (1, wanted[1])):
                raise BadSample(
                    "form",
                    f"sample {label}: {key} has the shape {tuple(got)}, {ids} {tuple(wanted)}",
                )


def check_finite(label: str, kwargs: Mapping[str, Any]) -> None:
    """Raises BadSample for NaN or infinity in what a model sees or hears; masks may hold some."""
    for key, value in kwargs.items():
        floats = isinstance(value, Tensor) and value.is_floating_point() and "mask" not in key
        if floats and not bool(value.isfinite().all()):
            raise BadSample("not finite", f"sample {label}: {key} holds NaN or infinity")


def with_decoder_ids(kwargs: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """Inputs of an encoder-decoder that has labels only: shifted right behind the decoder's first
    token, without the padding of a batch at their end. Raises UserError for labels of several
    rows, or of codebooks."""
    inputs = dict(kwargs)
    labels = inputs.pop("labels", None)
    if (
        labels is None
        or "decoder_input_ids" in inputs
        or not getattr(config, "is_encoder_decoder", False)
    ):
        return inputs
    if labels.ndim != 2 or len(labels) != 1:
        raise UserError(
            f"labels of the shape {tuple(labels.shape)}, not (1, T): give one sample at a time, or"
            " decoder_input_ids"
        )
    start = torch.full_like(labels[:, :1], _token(config, "decoder_start", "bos", "pad"))
    said = (labels >= 0).any(0).nonzero()[:, 0]
    labels = labels[:, : int(said[-1]) + 2] if len(said) else labels[:, :1]
    words = labels[:, :-1].masked_fill(labels[:, :-1] < 0, _token(config, "pad", "eos"))
    inputs["decoder_input_ids"] = torch.cat([start, words], 1)
    return inputs


def _token(config: Any, *names: str) -> int:
    """The first of some special tokens that a configuration names, itself or for its text; 0
    without any."""
    places = (config, config.get_text_config(decoder=True))
    ids = (getattr(place, f"{name}_token_id", None) for name in names for place in places)
    return next((each for each in ids if isinstance(each, int)), 0)
