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

MADE = ("logits", "tokens")  # what a worker may write for each input
FOLDER = Path(".engines")
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Engine:
    """formats: those it reads, each with the environment below `.engines` that can; None is the one this program runs
    in. dtype: what it is asked to compute in. kinds: of inputs it takes. own_media: it processes media itself, and gets
    token ids and images as they are. The worker is engine_<name>.py in this folder."""

    formats: Mapping[str, str | None]
    dtype: str = "float32"
    kinds: tuple[str, ...] = ("text", "image", "audio")
    own_media: bool = False


_COMPRESSED = ("compressed_tensors", "compressed_tensors:int8", "compressed_tensors:float")
_GPTQ = ("auto_round:auto_awq", "auto_gptq", "auto_awq")
ENGINES: dict[str, Engine] = {
    "transformers": Engine(
        {
            **dict.fromkeys(("auto_round", "auto_round:auto_gptq", "fake", *_COMPRESSED), None),
            **dict.fromkeys(_GPTQ, "gptqmodel"),
        }
    ),
    # In float16 vLLM keeps the scales as they are stored.
    "vllm": Engine(
        dict.fromkeys(("auto_round:auto_gptq", *_GPTQ, *_COMPRESSED), "vllm"),
        dtype="float16",
        kinds=("text", "image"),
        own_media=True,
    ),
    "llamacpp": Engine({"gguf": "llamacpp"}, kinds=("text",)),
    "mlx": Engine({"mlx": "mlx"}, kinds=("text", "image")),
    "openvino": Engine({"openvino": "openvino"}, kinds=("text",)),
}


@dataclass(frozen=True)
class EngineResult:
    """What one engine made of one checkpoint.

    quantized: layers, None where the engine does not tell. logits: one (1, t, vocabulary) float32 tensor an input, for
    its last t positions. tokens: (1, n) greedy tokens an input, where asked for. logprobs: {token id: log probability}
    of the likeliest next tokens an input, from engines that give no logits.
    """

    ok: bool
    error: str | None = None
    engine: str = ""
    classes: Mapping[str, int] = field(default_factory=dict)
    quantized: int | None = None
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    dtype: str = ""
    logits: Sequence[Tensor] = field(default=(), repr=False)
    tokens: Sequence[Tensor] = field(default=(), repr=False)
    logprobs: Sequence[Mapping[str, float]] = field(default=(), repr=False)


def root() -> Path:
    """Where `.engines` lies: here, or in the checkout that this package belongs to."""
    return Path() if FOLDER.is_dir() else Path(__file__).parents[2]


def worker(engine: str) -> Path:
    """The program that an engine's interpreter runs."""
    return Path(__file__).with_name(f"engine_{engine}.py")


def interpreter(format_name: str, root: Path = Path(), engine: str = "transformers") -> Path:
    """The Python that reads the format; it may not exist yet (`ask` then says what installs it)."""
    environment = ENGINES[engine].formats[format_name]
    return Path(sys.executable) if environment is None else root / FOLDER / environment / "bin" / "python"


def not_installed(python: Path) -> str | None:
    """What to do about an interpreter that isn't there; None for one that is."""
    if python.is_file():
        return None
    name = python.parent.parent.name
    return f"the engine {name} is not installed: bash scripts/engines.sh {name}"


def run_transformers(
    checkpoint_dir: Path,
    inputs: Sequence[Mapping[str, Tensor]],
    *,
    python: Path,
    timeout: float = 600,
    model_class: str = "AutoModelForImageTextToText",
    dtype: str = "float32",
    quantization: Mapping[str, Any] | None = None,
) -> EngineResult:
    """Logits of the inputs (keyword arguments of the model, batch 1) by Transformers in another interpreter."""
    asked = {"dtype": dtype, "class": model_class, "quantization": dict(quantization or {})}
    return ask("transformers", checkpoint_dir, inputs, asked, python=python, timeout=timeout)


def ask(
    engine: str,
    checkpoint_dir: Path,
    inputs: Sequence[Mapping[str, Tensor]],
    asked: Mapping[str, Any],
    *,
    python: Path,
    timeout: float = 600,
) -> EngineResult:
    """One question to an engine's worker in its own interpreter.

    Never raises for what the engine does: a crash, a time-out or a missing environment is a result with an error.
    """
    if problem := not_installed(python):
        return EngineResult(False, problem)
    with tempfile.TemporaryDirectory() as folder:
        paths = {key: str(Path(folder) / f"{key}.safetensors") for key in ("inputs", "output")}
        flat = {f"{i}.{key}": t.contiguous().clone() for i, kwargs in enumerate(inputs) for key, t in kwargs.items()}
        save_file(flat, paths["inputs"])
        request = {"model": str(checkpoint_dir.resolve()), **asked, **paths}
        request_file = Path(folder) / "request.json"
        request_file.write_text(json.dumps(request), encoding="utf-8")
        # Run from the empty folder: the worker must not find this package, nor modules of the caller's folder.
        command = [str(python.absolute()), str(worker(engine)), str(request_file)]
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
    known = {key: answer[key] for key in EngineResult.__dataclass_fields__ if key in answer}
    for what in MADE:
        known[what] = [stored[key] for i in range(len(inputs)) if (key := f"{i}.{what}") in stored]
    return EngineResult(**known)


def _last_json(text: str) -> dict[str, Any] | None:
    lines = text.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
