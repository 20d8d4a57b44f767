"""Loads one IR folder in OpenVINO's CPU plugin and answers with logits; run by the engine's own interpreter.

Standalone like `engine_transformers.py`, with the same request and answer; text inputs only. "dtype" float32 switches
off what the plugin rounds by itself: bfloat16 kernels, and the activations of packed weights to 8 bits (2 % of a
matrix product). "new_tokens": so many greedy tokens an input, with the cache, as "<i>.tokens".
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from safetensors.numpy import load_file, save_file

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
PACKED = ("u4", "i4", "u8", "i8")
DERIVED = ("attention_mask", "mm_token_type_ids")  # of a single unpadded text


def load(folder: Path, dtype: str) -> Any:
    options = {"INFERENCE_NUM_THREADS": 2} | (EXACT if dtype == "float32" else {})
    return ov.Core().compile_model(folder / "openvino_model.xml", "CPU", options)


def linear_classes(compiled: Any) -> tuple[dict[str, int], int]:
    """(weight type -> count of matrix products by a constant in the plugin's own graph, number with packed weights)."""
    kinds: Counter[str] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        if node.get_rt_info()["layerType"].astype(str) == "FullyConnected":
            kinds[node.input(1).get_element_type().get_type_name()] += 1
    return dict(sorted(kinds.items())), sum(kinds[kind] for kind in PACKED)


class Text:
    """One text, fed piece by piece; the cache is the request's state."""

    def __init__(self, compiled: Any) -> None:
        self.request = compiled.create_infer_request()
        self.length = 0

    def feed(self, ids: np.ndarray) -> np.ndarray:
        """(1, T) token ids -> (1, T, vocabulary) float32."""
        start, self.length = self.length, self.length + ids.shape[1]
        made = self.request.infer({
            "input_ids": ids.astype(np.int64),
            "attention_mask": np.ones((1, self.length), np.int64),
            "position_ids": np.arange(start, self.length)[None],
            "beam_idx": np.zeros(1, np.int32),
        })  # fmt: skip
        return made["logits"].astype(np.float32)


def run_input(compiled: Any, kwargs: dict[str, np.ndarray], new_tokens: int) -> dict[str, np.ndarray]:
    unknown = kwargs.keys() - {"input_ids", *DERIVED}
    if unknown or not kwargs.get("attention_mask", np.ones(1)).all():
        raise ValueError(f"only unpadded text inputs are supported, not {sorted(unknown) or 'padding'}")
    text = Text(compiled)
    logits, tokens = text.feed(kwargs["input_ids"]), []
    best = logits[:, -1:].argmax(-1)
    for _ in range(new_tokens):
        tokens.append(best)
        best = text.feed(best)[:, -1:].argmax(-1)
    return {"logits": logits} | ({"tokens": np.concatenate(tokens, axis=1)} if tokens else {})


def answer(request: dict[str, Any]) -> dict[str, Any]:
    compiled = load(Path(request["model"]), request["dtype"])
    classes, quantized = linear_classes(compiled)
    samples: dict[str, dict[str, np.ndarray]] = {}
    for key, array in load_file(request["inputs"]).items():
        index, _, kwarg = key.partition(".")
        samples.setdefault(index, {})[kwarg] = array
    output: dict[str, np.ndarray] = {}
    for index, kwargs in samples.items():
        made = run_input(compiled, kwargs, request.get("new_tokens", 0))
        output |= {f"{index}.{what}": array for what, array in made.items()}
    save_file(output, request["output"])
    broken = [name for name, array in output.items() if not np.isfinite(array).all()]
    facts = {"engine": f"openvino {ov.__version__}", "classes": classes, "quantized": quantized}
    return facts | {"ok": not broken} | ({"error": f"logits are not finite: {broken[:3]}"} if broken else {})
