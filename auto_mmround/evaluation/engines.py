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
from tokenizers import Tokenizer
from torch import Tensor

WORKER = Path(__file__).with_name("engine_transformers.py")
ENGINES = Path(".engines")
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "GGML_NO_BACKTRACE": "1"}  # no debugger on a crash of llama.cpp

# Which environment reads which format through Transformers; None is the one this program runs in.
ENVIRONMENTS: dict[str, str | None] = {
    "auto_round": None,
    "auto_round:auto_gptq": None,
    "auto_round:auto_awq": "gptqmodel",
    "auto_gptq": "gptqmodel",
    "auto_awq": "gptqmodel",
}


@dataclass(frozen=True)
class EngineResult:
    """What one engine made of one checkpoint. logits: one (1, T, vocabulary) float32 tensor an input."""

    ok: bool
    error: str | None = None
    engine: str = ""
    classes: Mapping[str, int] = field(default_factory=dict)
    quantized: int = 0
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    dtype: str = ""
    logits: Sequence[Tensor] = field(default=(), repr=False)


@dataclass(frozen=True)
class LlamaCppResult:
    """What llama.cpp made of one GGUF folder. logprobs: the next token's {id: log probability} a prompt. answers:
    {"text", "prompt_tokens", "logprobs" of its first token} a question."""

    ok: bool
    error: str | None = None
    engine: str = ""
    logprobs: Sequence[Mapping[int, float]] = field(default=(), repr=False)
    answers: Sequence[Mapping[str, Any]] = field(default=(), repr=False)


def interpreter(format_name: str, root: Path = Path()) -> Path:
    """The Python that reads the format; it may not exist yet (`run_transformers` then says what installs it)."""
    environment = ENVIRONMENTS[format_name]
    return Path(sys.executable) if environment is None else root / ENGINES / environment / "bin" / "python"


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
    """Logits of the inputs (keyword arguments of the model, batch 1) by Transformers in another interpreter.

    Never raises for what the engine does: a crash, a time-out or a missing environment is a result with an error.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = {key: str(Path(folder) / f"{key}.safetensors") for key in ("inputs", "output")}
        flat = {f"{i}.{key}": t.contiguous().clone() for i, kwargs in enumerate(inputs) for key, t in kwargs.items()}
        save_file(flat, paths["inputs"])
        request = {"model": str(checkpoint_dir.resolve()), "dtype": dtype, "class": model_class, **paths}
        answer = _ask(WORKER, request | {"quantization": dict(quantization or {})}, python, Path(folder), timeout)
        logits = []
        if Path(paths["output"]).is_file():
            stored = load_file(paths["output"])
            logits = [stored[f"{i}.logits"] for i in range(len(inputs))]
    known = {key: answer[key] for key in EngineResult.__dataclass_fields__ if key in answer}
    return EngineResult(**known, logits=logits)


def run_llamacpp(
    checkpoint_dir: Path,
    *,
    prompts: Sequence[Sequence[int] | str] = (),
    questions: Sequence[Mapping[str, Any]] = (),
    python: Path,
    top: int = 20,
    timeout: float = 600,
) -> LlamaCppResult:
    """Next-token log probabilities of prompts, and greedy answers, by llama.cpp in another interpreter.

    prompts: token ids, or text that llama.cpp tokenizes. questions: {"text", "image": file or None, "max_tokens"}.
    top: as many most likely tokens. Never raises for what the engine does.
    """
    models = sorted(checkpoint_dir.glob("model-*.gguf"))
    towers = sorted(checkpoint_dir.glob("mmproj-*.gguf"))
    if not models:
        return LlamaCppResult(False, f"{checkpoint_dir} holds no model-*.gguf")
    asked = [dict(question) | {"image": question.get("image") and str(question["image"])} for question in questions]
    request: dict[str, Any] = {
        "model": str(models[0].resolve()),
        "prompts": list(prompts),
        "questions": asked,
        "top": top,
    }
    tokenizer = checkpoint_dir / "tokenizer.json"
    if prompts and tokenizer.is_file():
        request["filler"] = Tokenizer.from_file(str(tokenizer)).encode("a", add_special_tokens=False).ids[-1]
    request["mmproj"] = str(towers[0].resolve()) if towers else None
    with tempfile.TemporaryDirectory() as folder:
        answer = _ask(WORKER.with_name("engine_llamacpp.py"), request, python, Path(folder), timeout)
    known = {key: answer[key] for key in LlamaCppResult.__dataclass_fields__ if key in answer}
    known["logprobs"] = [{int(key): value for key, value in found.items()} for found in answer.get("logprobs", ())]
    return LlamaCppResult(**known)


def _ask(worker: Path, request: Mapping[str, Any], python: Path, folder: Path, timeout: float) -> dict[str, Any]:
    """The worker's answer; {"ok": False, "error": ..} where there is none."""
    if not python.is_file():
        name = python.parent.parent.name
        return {"ok": False, "error": f"the engine {name} is not installed: scripts/engines.sh {name}"}
    request_file = folder / "request.json"
    request_file.write_text(json.dumps(request), encoding="utf-8")
    # Run from the empty folder: the worker must not find this package, nor modules of the caller's folder.
    command = [str(python.absolute()), str(worker), str(request_file)]
    try:
        done = subprocess.run(
            command, cwd=folder, env=OFFLINE, capture_output=True, text=True, timeout=timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"no answer after {timeout:.0f} s"}
    tail = (done.stderr.strip().splitlines() or ["no output"])[-1]
    return _last_json(done.stdout) or {"ok": False, "error": f"the engine died (exit {done.returncode}): {tail}"}


def _last_json(text: str) -> dict[str, Any] | None:
    lines = text.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
