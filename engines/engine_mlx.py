"""Loads one checkpoint through mlx-vlm or mlx-lm and answers with logits.

The engine's interpreter runs it. It is standalone like `engine_transformers.py`, with the same
request and answer. Models with a vision or audio configuration go through mlx-vlm, others through
mlx-lm. "dtype": every stored float is widened to it after loading. "new_tokens": number of greedy
tokens for each input, as "<i>.tokens" in the output file. With "ends", ids of tokens that end an
answer, there is one input, and only its tokens are said one by one, as the packages generate. Both
loaders are strict: one tensor too many or too few is an error.
"""

# What `scripts/engines.sh` installs: MLX's own backend for processors. mlx-vlm's other requirements
# are servers and audio, which loading does not need.
# packages: mlx==0.32.4 mlx-cpu==0.32.4 mlx-lm==0.32.2 mlx-vlm==0.7.10
# tried by: import mlx_lm.utils, mlx_vlm.utils

import json
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from engine_main import aloud

# What MLX's models derive by themselves from the token ids of a single unpadded sample.
DERIVED = ("attention_mask", "mm_token_type_ids")


def load(folder: Path) -> tuple[nn.Module, str]:
    """(model, package that loaded it)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("vision_config") or config.get("audio_config"):
        from mlx_vlm.utils import load_model as load_multimodal

        return load_multimodal(folder), "mlx-vlm"
    from mlx_lm.utils import load_model as load_text

    return load_text(folder)[0], "mlx-lm"


def linear_classes(model: nn.Module) -> tuple[dict[str, int], int]:
    """(class name -> count of linear modules, number of quantized modules)."""
    names = [type(module).__name__ for _, module in model.named_modules()]
    return dict(sorted(Counter(n for n in names if n.endswith("Linear")).items())), sum(
        "Quantized" in n for n in names
    )


def logits_of(model: nn.Module, kwargs: dict[str, mx.array]) -> mx.array:
    """(1, T, vocabulary) float32."""
    mask = kwargs.get("attention_mask")
    if mask is not None and not bool(mx.all(mask).item()):
        raise ValueError("padded inputs are not supported: one unpadded sample an input")
    ids = kwargs["input_ids"]
    rest = {
        key: value for key, value in kwargs.items() if key != "input_ids" and key not in DERIVED
    }
    # mlx-vlm, as its own generation does it: positions are passed along
    if hasattr(model, "get_input_embeddings"):
        features = model.get_input_embeddings(ids, **rest).to_dict()
        rest = {key: value for key, value in (rest | features).items() if value is not None}
        made = model.language_model(ids, **rest)
    else:
        made = model(ids)
    return getattr(made, "logits", made).astype(mx.float32)


def greedy(model: nn.Module, kwargs: dict[str, mx.array], count: int) -> mx.array:
    """The most likely next tokens (1, count), one after the other without a cache."""
    for _ in range(count):
        best = mx.argmax(logits_of(model, kwargs)[:, -1:], axis=-1).astype(
            kwargs["input_ids"].dtype
        )
        kwargs = kwargs | {"input_ids": mx.concatenate([kwargs["input_ids"], best], axis=1)}
    return kwargs["input_ids"][:, -count:]


def spoken(model: nn.Module, package: str, kwargs: dict[str, mx.array], most: int) -> Iterator[int]:
    """The greedy tokens after one input, with the packages' own caches. Raises ValueError for
    values that are not finite."""
    ids = kwargs["input_ids"]
    if package == "mlx-vlm":
        from mlx_vlm.generate import generate_step as generate_multimodal

        rest = {k: v for k, v in kwargs.items() if k not in ("input_ids", "pixel_values", *DERIVED)}
        pixels = kwargs.get("pixel_values")
        made = generate_multimodal(
            ids, model, pixels, None, max_tokens=most, temperature=0.0, **rest
        )
    else:
        from mlx_lm.generate import generate_step as generate_text

        made = generate_text(ids[0], model, max_tokens=most)
    for token, logprobs in made:
        if not bool(mx.isfinite(mx.max(logprobs)).item()):
            raise ValueError("logits are not finite")
        yield int(token)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    mx.set_default_device(mx.cpu)
    model, package = load(Path(request["model"]))
    samples: dict[str, dict[str, mx.array]] = {}
    for key, array in mx.load(request["inputs"]).items():
        index, _, kwarg = key.partition(".")
        samples.setdefault(index, {})[kwarg] = array
    versions = " + ".join(f"{name} {metadata.version(name)}" for name in (package, "mlx"))
    if "ends" in request:
        tokens = spoken(model, package, samples["0"], request["new_tokens"])
        return {"engine": versions} | aloud(tokens, request["ends"])
    model.set_dtype(getattr(mx, request["dtype"]))
    classes, quantized = linear_classes(model)
    output = {f"{index}.logits": logits_of(model, kwargs) for index, kwargs in samples.items()}
    broken = [
        name for name, logits in output.items() if not bool(mx.all(mx.isfinite(logits)).item())
    ]
    if count := request.get("new_tokens", 0):
        output |= {
            f"{index}.tokens": greedy(model, kwargs, count) for index, kwargs in samples.items()
        }
    mx.save_safetensors(request["output"], output)
    facts = {
        "engine": versions,
        "classes": classes,
        "quantized": quantized,
        "dtype": request["dtype"],
    }
    return (
        facts
        | {"ok": not broken}
        | ({"error": f"logits are not finite: {broken[:3]}"} if broken else {})
    )
