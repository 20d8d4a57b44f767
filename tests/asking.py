"""What engines and decoded checkpoints answer, as tests ask for it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auto_mmround.checkpoint.loader import from_quantized
from auto_mmround.readers import ENGINES
from auto_mmround.verify.engines import EngineResult, ask


def run_transformers(
    checkpoint_dir: Path,
    inputs: Sequence[Mapping[str, Tensor]],
    *,
    python: Path,
    timeout: float = 600,
    model_class: str = "AutoModelForImageTextToText",
    dtype: str = "float32",
    quantization: Mapping[str, Any] | None = None,
    activations: bool = False,
) -> EngineResult:
    """Logits of the inputs (keyword arguments of the model, batch 1) by Transformers in another
    interpreter.

    activations: quantize the inputs of layers where the checkpoint says so; off, exact weights
      give exact logits.
    """
    asked = {
        "dtype": dtype,
        "class": model_class,
        "quantization": dict(quantization or {}),
        "activations": activations,
    }
    return ask("transformers", checkpoint_dir, inputs, asked, python=python, timeout=timeout)


def run_engine(
    engine: str,
    checkpoint_dir: Path,
    inputs: Sequence[Mapping[str, Tensor]],
    *,
    python: Path,
    timeout: float = 600,
    dtype: str | None = None,
    new_tokens: int = 0,
) -> EngineResult:
    """Logits, and so many greedy tokens, by an engine with models of its own: "vllm", "mlx" or
    "openvino".

    inputs: keyword arguments of the model, batch 1; for an engine that processes media itself
    `input_ids` (1, T) as the model takes them, and the images in order as `image0`, `image1` ..,
    uint8 (height, width, 3). dtype: None is the one in `ENGINES`.
    """
    asked = {"dtype": dtype or ENGINES[engine].dtype, "new_tokens": new_tokens}
    return ask(engine, checkpoint_dir, inputs, asked, python=python, timeout=timeout)


def same_weights(folder: Path, tuned: Mapping[str, Tensor]) -> list[str]:
    """Names of the parameters that the checkpoint, decoded, does not hold bit for bit as ``tuned``
    (by module name)."""
    state = from_quantized(folder).model.state_dict()
    return [
        name
        for name, wanted in tuned.items()
        if not torch.equal(state[name].to(wanted.dtype), wanted)
    ]
