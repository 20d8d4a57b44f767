"""One greedy answer of a model, to look at beside the figures."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.calibration.ready import PER_TOKEN
from auto_mmround.evaluate.metrics import moved
from auto_mmround.modalities import TEXT
from auto_mmround.model import devices
from auto_mmround.model.loading import Loaded
from auto_mmround.model.passes import taking
from auto_mmround.model.positions import room
from auto_mmround.model.speaking import speaking
from auto_mmround.model.streaming import device_of

# Whatever a model's own settings of generation say, an answer is one, greedy, and ids alone.
GREEDY = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False,
    # each of these would choose another way to generate
    "penalty_alpha": None, "dola_layers": None, "prompt_lookup_num_tokens": None,
    "assistant_early_exit": None, "constraints": None, "force_words_ids": None,
}  # fmt: skip
OPENING = 16  # tokens of a plain text that the model gets as its beginning


class Generated(NamedTuple):
    """prompt: the text before the answer, without media tokens."""

    prompt: str
    text: str


def generate_sample(
    loaded: Loaded, inputs: Sequence[ModelInput], max_new_tokens: int = 48
) -> Generated:
    """The greedy answer to the first sample with media, or the continuation of the first text.

    Raises ValueError without samples.
    """
    if not inputs:
        raise ValueError("no sample to generate from")
    sample = next(
        (s for s in inputs if bool((s.modality_T != TEXT).any()) or _features(s)), inputs[0]
    )
    kwargs, start = prompt_of(sample, bool(loaded.model.config.is_encoder_decoder))
    count = room(loaded.model, start, max_new_tokens)
    ids = generated(loaded, moved(loaded.model, kwargs), max_new_tokens=count)
    shown = sample.modality_T[:start] == TEXT
    prompt = loaded.tokenizer.decode(sample.kwargs["input_ids"][0, :start][shown]) if start else ""
    return Generated(prompt, loaded.tokenizer.decode(ids[0, start:], skip_special_tokens=True))


def generated(loaded: Loaded, kwargs: Mapping[str, Any], **options: Any) -> Tensor:
    """Ids (1, T) that the model writes greedily, behind those it was given. Raises NotTaken."""
    model = loaded.model
    own: Any = speaking(model)
    if getattr(own.generation_config, "stop_strings", None):
        options["tokenizer"] = loaded.tokenizer
    products = devices.products(device_of(model), model.dtype)
    with torch.inference_mode(), products, taking(model, kwargs):
        made: Tensor = own.generate(**kwargs, **GREEDY, **options)
        return made


def prompt_of(sample: ModelInput, encoder_decoder: bool = False) -> tuple[dict[str, Any], int]:
    """The model's arguments up to the first answer, and their number of tokens.

    0 tokens: the encoder has all of it.
    """
    if encoder_decoder:
        return {
            key: value
            for key, value in sample.kwargs.items()
            if not key.startswith(("decoder_", "labels"))
        }, 0
    answer_T = sample.answer_T
    start = max(
        1,
        min(OPENING, len(answer_T) - 1) if bool(answer_T.all()) else int(answer_T.long().argmax()),
    )
    return {
        key: value[:, :start] if key in PER_TOKEN and isinstance(value, Tensor) else value
        for key, value in sample.kwargs.items()
    }, start


def _features(sample: ModelInput) -> bool:
    return any(key.endswith("features") for key in sample.kwargs)
