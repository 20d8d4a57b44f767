"""Loads one checkpoint through mlx-vlm or mlx-lm and answers with logits.

The engine's interpreter runs it. It is standalone like `engine_transformers.py`, with the same
request and answer. Models with a vision or audio configuration go through mlx-vlm, others through
mlx-lm. "dtype": every stored float is widened to it after loading. "new_tokens": number of greedy
tokens for each input, as "<i>.tokens" in the output file. Both loaders are strict: one tensor too
many or too few is an error.
"""

import json
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

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


def answer(request: dict[str, Any]) -> dict[str, Any]:
    mx.set_default_device(mx.cpu)
    model, package = load(Path(request["model"]))
    model.set_dtype(getattr(mx, request["dtype"]))
    classes, quantized = linear_classes(model)
    samples: dict[str, dict[str, mx.array]] = {}
    for key, array in mx.load(request["inputs"]).items():
        index, _, kwarg = key.partition(".")
        samples.setdefault(index, {})[kwarg] = array
    output = {f"{index}.logits": logits_of(model, kwargs) for index, kwargs in samples.items()}
    broken = [
        name for name, logits in output.items() if not bool(mx.all(mx.isfinite(logits)).item())
    ]
    started = time.perf_counter()
    if count := request.get("new_tokens", 0):
        output |= {
            f"{index}.tokens": greedy(model, kwargs, count) for index, kwargs in samples.items()
        }
        mx.eval(*output.values())  # MLX computes when asked
    seconds = time.perf_counter() - started
    mx.save_safetensors(request["output"], output)
    versions = " + ".join(f"{name} {metadata.version(name)}" for name in (package, "mlx"))
    facts = {
        "engine": versions,
        "classes": classes,
        "quantized": quantized,
        "dtype": request["dtype"],
        "seconds": seconds,
    }
    return (
        facts
        | {"ok": not broken}
        | ({"error": f"logits are not finite: {broken[:3]}"} if broken else {})
    )
