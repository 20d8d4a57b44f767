"""The parent's side of engine checks: which interpreter reads which format, and one subprocess a question."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

WORKERS = {name: Path(__file__).with_name(f"engine_{name}.py") for name in ("transformers", "vllm")}
MADE = ("logits", "tokens")  # what a worker may write for each input
ENGINES = Path(".engines")
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}

# Which environment reads which format through Transformers; None is the one this program runs in.
ENVIRONMENTS: dict[str, str | None] = {
    "auto_round": None,
    "auto_round:auto_gptq": None,
    "auto_round:auto_awq": "gptqmodel",
    "auto_gptq": "gptqmodel",
    "auto_awq": "gptqmodel",
    "compressed_tensors": None,
    "compressed_tensors:int8": None,
    "compressed_tensors:float": None,
    "fake": None,
}


@dataclass(frozen=True)
class EngineResult:
    """What one engine made of one checkpoint.

    logits: one (1, T, vocabulary) float32 tensor an input. tokens: (1, n) greedy tokens an input, where asked for.
    """

    ok: bool
    error: str | None = None
    engine: str = ""
    classes: Mapping[str, int] = field(default_factory=dict)
    quantized: int = 0
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    dtype: str = ""
    logits: Sequence[Tensor] = field(default=(), repr=False)
    tokens: Sequence[Tensor] = field(default=(), repr=False)


def interpreter(format_name: str, root: Path = Path()) -> Path:
    """The Python that reads the format; it may not exist yet (`run_transformers` then says what installs it)."""
    environment = ENVIRONMENTS[format_name]
    return Path(sys.executable) if environment is None else python_of(environment, root)


def python_of(engine: str, root: Path = Path()) -> Path:
    """The Python of an environment that `scripts/engines.sh` builds; it may not exist yet."""
    return root / ENGINES / engine / "bin" / "python"


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
    """Logits of the inputs (keyword arguments of the model, batch 1) by Transformers in another interpreter.

    activations: quantize the inputs of layers where the checkpoint says so; off, exact weights give exact logits.
    """
    asked = {"dtype": dtype, "class": model_class, "quantization": dict(quantization or {}), "activations": activations}
    return ask("transformers", checkpoint_dir, inputs, asked, python=python, timeout=timeout)


def run_vllm(
    checkpoint_dir: Path,
    inputs: Sequence[Mapping[str, Tensor]],
    *,
    python: Path,
    timeout: float = 600,
    dtype: str = "float16",
    new_tokens: int = 0,
) -> EngineResult:
    """Logits, and so many greedy tokens, by vLLM on the processor; in float16 the scales stay as stored.

    inputs: `input_ids` (1, T) as the model takes them, and the images in order as `image0`, `image1` .., uint8
    (height, width, 3). Other keyword arguments are not used: vLLM makes its own.
    """
    asked = {"dtype": dtype, "new_tokens": new_tokens}
    return ask("vllm", checkpoint_dir, inputs, asked, python=python, timeout=timeout)


def ask(
    worker: str,
    checkpoint_dir: Path,
    inputs: Sequence[Mapping[str, Tensor]],
    asked: Mapping[str, Any],
    *,
    python: Path,
    timeout: float,
) -> EngineResult:
    """One question to a worker in another interpreter.

    Never raises for what the engine does: a crash, a time-out or a missing environment is a result with an error.
    """
    if not python.is_file():
        name = python.parent.parent.name
        return EngineResult(False, f"the engine {name} is not installed: scripts/engines.sh {name}")
    with tempfile.TemporaryDirectory() as folder:
        paths = {key: str(Path(folder) / f"{key}.safetensors") for key in ("inputs", "output")}
        flat = {f"{i}.{key}": t.contiguous().clone() for i, kwargs in enumerate(inputs) for key, t in kwargs.items()}
        save_file(flat, paths["inputs"])
        request = {"model": str(checkpoint_dir.resolve()), **asked, **paths}
        request_file = Path(folder) / "request.json"
        request_file.write_text(json.dumps(request), encoding="utf-8")
        # Run from the empty folder: the worker must not find this package, nor modules of the caller's folder.
        command = [str(python.absolute()), str(WORKERS[worker]), str(request_file)]
        try:
            done = subprocess.run(
                command, cwd=folder, env=OFFLINE, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return EngineResult(False, f"no answer after {timeout:.0f} s")
        answer = _last_json(done.stdout)
        if answer is None:
            tail = (done.stderr.strip().splitlines() or ["no output"])[-1]
            return EngineResult(False, f"the engine died (exit {done.returncode}): {tail}")
        stored = load_file(paths["output"]) if Path(paths["output"]).is_file() else {}
    made: dict[str, Any] = {
        what: [stored[key] for i in range(len(inputs)) if (key := f"{i}.{what}") in stored] for what in MADE
    }
    known = {key: answer[key] for key in EngineResult.__dataclass_fields__ if key in answer}
    return EngineResult(**known, **made)


def _last_json(text: str) -> dict[str, Any] | None:
    lines = text.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
