"""Inputs for any class, made from what its forward takes.

They are found by trying: shapes of pictures and sounds, until the model answers and its answer
depends on them.
"""

import dataclasses
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import torch
from sweep_models import NotBuiltError
from sweep_table import AUDIO, TOKENS, WORDS
from tiny_models import FAMILIES
from torch import Tensor, nn
from transformers import PreTrainedModel

from auto_mmround.model.passes import REFUSES
from auto_mmround.model.speaking import speaking

# Rows of codebooks that stand for a token.
CODEBOOKS = {"kyutai_speech_to_text": 5, "csm": 2}
# The same in the first dimension, as if they were so many samples; of decoders too.
ROWS_OF_CODES = {"musicgen_decoder": 2, "musicgen_melody_decoder": 2}


def words(length: int, seed: int) -> Tensor:
    """Ids (1, length) of plain words."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(4, WORDS, (1, length), generator=draw)


def noise(shape: tuple[int, ...], seed: int) -> Tensor:
    """Features of the given shape, between 0 and 1."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def _numbers(config: Any, names: tuple[str, ...]) -> list[int]:
    """Values of fields, in the configuration or those in it."""
    found: list[int] = []
    for field in dataclasses.fields(config):
        value = vars(config).get(field.name)
        if dataclasses.is_dataclass(value) and hasattr(value, "model_type"):
            found += _numbers(value, names)
        elif field.name in names and isinstance(value, int | list | tuple):
            found += [value] if isinstance(value, int) else [n for n in value if type(n) is int]
    return list(dict.fromkeys(found))


def picture_shapes(config: Any) -> Iterator[tuple[int, ...]]:
    """Shapes that pictures may have: whole, in tiles, as flat patches."""
    side = _numbers(config, ("image_size", "crop_size")) or [16]
    patch = _numbers(config, ("patch_size",)) or [4]
    yield from ((1, 16, 2 + size) for size in _numbers(config, ("patch_embed_hidden_size",)))
    for size in [*side[:2], 32]:
        yield from ((*lead, 3, size, size) for lead in ((1,), (1, 1), (1, 2), (1, 3), (1, 1, 2)))
    for p, frames in product(patch[:2], (1, 2)):
        yield (16, 3 * frames * p * p)
        yield (1, 16, 3 * frames * p * p)
        yield (1, 3, p, 16 * p)
    yield from ((16, 3, patch[0], patch[0]), (1, 16, 3, patch[0], patch[0]))
    yield (16, 2 * patch[0], 2 * patch[0], 3)


def sound_shapes(config: Any) -> Iterator[tuple[int, ...]]:
    """Shapes that sounds may have: mel bins by frames, frames by bins, samples."""
    names = ("num_mel_bins", "feature_size", "input_dim", "input_size", "n_mels", "num_mels",
             "input_feat_per_channel", "feat_dim", "feature_projection_input_dim",
             "mel_bins", "audio_channels", "audio_embed_dim")  # fmt: skip
    for bins, frames in product(_numbers(config, names), (32, 64, 128, 100)):
        yield from ((1, bins, frames), (1, frames, bins))
    yield from ((1, n) for n in (1600, 6400))
    yield from ((1, 1, n) for n in (1920, 6400))


def companions(name: str, shape: tuple[int, ...]) -> list[Any]:
    """What another input of this name may be beside a picture or sound of the given shape."""
    side, frames = shape[-1], shape[-1] if len(shape) < 3 else max(shape[1:])
    ones = torch.ones
    grid = torch.cartesian_prod(torch.arange(4), torch.arange(4))[None].flip(-1)
    known: dict[str, list[Any]] = {
        "image_grid_thw": [torch.tensor([[1, 4, 4]])],
        "grid_thw": [torch.tensor([[1, 4, 4]])],
        "image_grid_hw": [torch.tensor([[4, 4]])],
        "image_grid_hws": [torch.tensor([[4, 4]])],
        "image_sizes": [torch.tensor([[side, side]]), torch.tensor([[side, 2 * side]])],
        "target_sizes": [torch.tensor([[4, 4]])],
        "spatial_shapes": [torch.tensor([[4, 4]])],
        "image_position_ids": [grid], "pixel_position_ids": [grid],
        "pixel_attention_mask": {3: [ones(1, 16, dtype=torch.long)],
            5: [ones(*shape[:2], *shape[3:], dtype=torch.long), ones(*shape[:2]).bool()],
        }.get(len(shape), []),
        "image_merge_sizes": [torch.tensor([2]), torch.tensor([1])],
        "image_token_pooling": [torch.arange(16).reshape(4, 4)],
        "image_grids": [torch.tensor([[2, 2, 0, 0]])],
        "image_num_crops": [torch.tensor([1])],
        "high_res_pixel_values": [noise((1, 3, side, side), 3)],
        "feature_attention_mask": [ones(1, frames, dtype=torch.long)],
        "input_features_mask": [ones(1, frames, dtype=torch.long), ones(1, 16).bool()],
        "audio_attention_mask": [ones(1, frames, dtype=torch.long)],
        "padding_mask": [ones(1, frames, dtype=torch.long)],
        "audio_embed_sizes": [torch.tensor([4])],
        "audio_sizes": [torch.tensor([4])],
        "num_image_tokens": [torch.tensor([4])],
    }  # fmt: skip
    return known.get(name, [])


def others(tokens: int, seed: int) -> list[tuple[str, Tensor]]:
    """What some classes want beside words, for as many tokens."""
    box = torch.tensor([[0, 0, 5, 5]]).expand(tokens, 4)[None]
    return [
        ("qformer_input_ids", words(6, seed)), ("bbox", box.clone()),
        ("noise", noise((1, 16, 16), seed)), ("timestep", torch.tensor([0.5])),
        ("image_attention_mask", torch.ones(1, tokens, 1).long()),
    ]  # fmt: skip


class Finder:
    """Looks for inputs that a model takes."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = speaking(model)
        self.config = self.model.config
        self.takes = tuple(inspect.signature(self.model.forward).parameters)
        self.more = {"use_cache": False} if "use_cache" in self.takes else {}
        self.pairs = bool(self.config.is_encoder_decoder)
        self.why: list[str] = []

    def answer(self, inputs: dict[str, Any]) -> Tensor | None:
        """The model's logits, None (and why) where it takes no such inputs."""
        try:
            with torch.no_grad():
                out = self.model(**inputs, **self.more)
        except (*REFUSES, StopIteration) as error:
            self.why.append(f"{type(error).__name__}: {' '.join(str(error).split())[:120]}")
            return None
        logits = logits_of(out)
        return logits if logits is not None and bool(logits.isfinite().all()) else None

    def text(self, seed: int, count: int = 0, token: int = 0) -> dict[str, Any]:
        """Words, with ``count`` placeholders among them."""
        row = words(12 + 3 * seed, seed)
        row = torch.cat([row[:, :3], torch.full((1, count), token), row[:, 3:]], 1)
        made: dict[str, Any] = {"input_ids": row}
        if self.config.model_type in CODEBOOKS:
            made["input_ids"] = row[..., None].repeat(1, 1, CODEBOOKS[self.config.model_type])
        made["input_ids"] = self._codes(made["input_ids"], self.config.model_type)
        if "attention_mask" in self.takes:
            made["attention_mask"] = torch.ones_like(row)
        made |= {name: value for name, value in others(row.shape[1], seed) if name in self.takes}
        if "noise" in self.takes:  # of what acts: where it stands
            made["state"] = noise((1, 16), seed)
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in self.takes and count:
                made[name] = (row == token).long() * (3 if token == AUDIO else 1)
        if "image_embeds_position_mask" in self.takes and count:
            made["image_embeds_position_mask"] = row == token
        return made | self.decoded(seed)

    def decoded(self, seed: int) -> dict[str, Any]:
        """What the decoder of an encoder-decoder reads."""
        if not self.pairs:
            return {}
        made = words(8 + 2 * seed, seed + 7)
        if self.config.model_type == "dia":
            made = made[..., None].repeat(1, 1, 3)
        decoder = getattr(self.config.get_text_config(decoder=True), "model_type", "")
        return {"decoder_input_ids": self._codes(made, decoder)}

    def _codes(self, ids: Tensor, model_type: str) -> Tensor:
        return ids.repeat(ROWS_OF_CODES.get(model_type, 1), *[1] * (ids.ndim - 1))

    def plain(self) -> list[dict[str, Any]] | None:
        """Two samples of text alone."""
        made = [self.text(seed) for seed in range(2)]
        return made if "input_ids" in self.takes and self.answer(made[0]) is not None else None

    def media(self, kind: str) -> list[dict[str, Any]] | None:
        """Two samples with a picture or a sound."""
        names = [name for name in self.takes if re.fullmatch(MEDIA[kind], name)]
        shapes = list((picture_shapes if kind == "image" else sound_shapes)(self.config))
        for name, shape in product(names[:2], shapes):
            for extra in self._extras(name, shape):
                for text in self._texts(kind, name, shape, extra):
                    made = [self._sample(name, shape, extra, text, seed) for seed in range(2)]
                    first = self.answer(made[0])
                    if first is not None and self._depends(made[0], name, first):
                        # Some want as many words as there are frames, so the same number again.
                        again = made[0] | {name: made[1][name]}
                        return made if self.answer(made[1]) is not None else [made[0], again]
        return None

    def _extras(self, name: str, shape: tuple[int, ...]) -> Iterator[dict[str, Any]]:
        found = {n: v for n in self.takes if (v := companions(n, shape))}
        for chosen in product(*found.values()):
            yield dict(zip(found, chosen))
        if found:
            yield {}

    def _texts(
        self, kind: str, name: str, shape: tuple[int, ...], extra: dict[str, Any]
    ) -> Iterator[int | None]:
        """Numbers of placeholders to try; None: no text but the decoder's."""
        if "input_ids" not in self.takes or self.pairs:
            yield None
        if "input_ids" in self.takes:
            count = self._features(kind, name, shape, extra)
            counts, seen = [*([count] if count else []), 4, 16, 1, 17], Counter[str]()
            tried: list[int] = []
            for count in dict.fromkeys(counts):
                self.why.append("")
                tried.append(count)
                yield count
                seen[self.why[-1]] += 1
                told = re.search(r"tokens: \d+,? features:? (\d+)", self.why[-1])
                if told and int(told[1]) not in tried:  # elements, of some classes
                    yield from {int(told[1]), int(told[1]) // 64} - {*tried, 0}
                    return
                if not told and seen[self.why[-1]] == 2 and self.why[-1]:
                    return  # it does not come to the words

    def _features(
        self, kind: str, name: str, shape: tuple[int, ...], extra: dict[str, Any]
    ) -> int | None:
        """How many tokens the model makes of it."""
        read = getattr(self.model, f"get_{kind}_features", None)
        if read is None:
            return None
        takes = inspect.signature(read).parameters
        given = {k: v for k, v in ({name: noise(shape, 0)} | extra).items() if k in takes}
        try:
            with torch.no_grad():
                found = read(**given)
        except REFUSES:
            return None
        found = getattr(found, "pooler_output", found)
        rows = [found] if isinstance(found, Tensor) else list(found or ())
        return sum(r.numel() // r.shape[-1] for r in rows if isinstance(r, Tensor))

    def _sample(
        self, name: str, shape: tuple[int, ...], extra: dict[str, Any], count: int | None, seed: int
    ) -> dict[str, Any]:
        kind = "audio" if re.fullmatch(MEDIA["audio"], name) else "image"
        text = self.decoded(seed) if count is None else self.text(seed, count, TOKENS[kind])
        return text | extra | {name: noise(shape, seed)}

    def _depends(self, inputs: dict[str, Any], name: str, first: Tensor) -> bool:
        other = self.answer(inputs | {name: noise(tuple(inputs[name].shape), 5)})
        return other is not None and other.shape == first.shape and not torch.equal(other, first)


MEDIA = {
    "image": "pixel_values|image_pixel_values|images|flattened_patches|pixel_values_images",
    "audio": "input_(features|values|audio_embeds)|audio_(input_features|values|features)",
}


def logits_of(out: Any) -> Tensor | None:
    """What a model answers: its logits, else its first tensor."""
    found = getattr(out, "logits", None)
    if found is None:
        found = next((v for v in out.values() if isinstance(v, Tensor)), None)
    return found[0] if isinstance(found, tuple) else found


def samples(model: PreTrainedModel) -> dict[str, list[dict[str, Any]]]:
    """Kind -> inputs. Raises NotBuiltError where none of them runs."""
    row = FAMILIES.get(model.config.model_type)
    if row and row.architecture == type(model).__name__:
        kinds = {kind: [make(seed) for seed in range(2)] for kind, make in row.media.items()}
        return ({"text": replace(row, media={}).samples()} if row.plain else {}) | kinds
    finder = Finder(model)
    found = {"text": finder.plain()} | {kind: finder.media(kind) for kind in MEDIA}
    made = {kind: inputs for kind, inputs in found.items() if inputs}
    if not made:
        often = "; ".join([*finder.why[:1], *(w for w, _ in Counter(finder.why).most_common(2))])
        raise NotBuiltError(f"no inputs found: {often}")
    return made


def block_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of modules with linear weights, those inside of others left out."""

    def weighty(block: nn.Module) -> bool:
        plain = isinstance(block, nn.Linear | nn.ModuleList)
        return not plain and any(isinstance(m, nn.Linear) for m in block.modules())

    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{other}.") for other in found)
        if isinstance(module, nn.ModuleList) and not inside and len(module):
            found |= {path: module} if all(map(weighty, module)) else {}
    return found
