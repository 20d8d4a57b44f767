"""Which interpreter reads which format, and one subprocess for each question to an engine."""

import os
import re
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

from auto_mmround import strict
from auto_mmround.export.formats import FORMATS
from auto_mmround.programs import answer_of, program

# only llama.cpp's log says it
LOADED = re.compile(r"llama_model_loader: - type +(\w+): +(\d+) tensors")
MADE = ("logits", "tokens")  # results that a worker may write for each input
FOLDER = Path(".engines")
RUNNER = program("engine_main")
# no debugger on a crash of llama.cpp
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "GGML_NO_BACKTRACE": "1"}


@dataclass(frozen=True)
class Engine:
    """dtype: what it is asked to compute in. kinds: of inputs it takes, see
    `Probe`; tower: the file without which it takes texts only. own_media: it processes media
    itself, and gets token ids, images and sounds as they are.
    rounds_inputs: it always quantizes activations where the checkpoint says so. The
    worker is engine_<name>.py on the shelf."""

    dtype: str = "float32"
    kinds: tuple[str, ...] = ("text", "image", "audio", "speech")
    tower: str | None = None
    own_media: bool = False
    rounds_inputs: bool = False


# What they read is said by the formats.
ENGINES: dict[str, Engine] = {
    "transformers": Engine(),
    # In float16 vLLM keeps the scales as they are stored.
    "vllm": Engine(
        dtype="float16", kinds=("text", "image", "speech"), own_media=True, rounds_inputs=True
    ),
    "llamacpp": Engine(kinds=("text", "image"), own_media=True),
    "mlx": Engine(kinds=("text", "image")),
    "openvino": Engine(kinds=("text", "image"), tower="openvino_vision_embeddings_model.xml"),
}


def reads(engine: str) -> list[str]:
    """The formats that an engine reads."""
    return [name for name, fmt in FORMATS.items() if engine in fmt.engines]


@dataclass(frozen=True)
class EngineResult:
    """The answer of one engine on one checkpoint.

    quantized: number of layers, None if the engine does not tell. logits: for each input a float32
    tensor (1, t, vocabulary) of its last t positions. tokens: for each input (1, n) greedy tokens,
    if asked for.

    llama.cpp gives no logits. logprobs: for each input {token id: log probability} of the most
    likely next tokens. answers: for each question {"text", "prompt_tokens", "logprobs" of its first
    token}. Its dtype is "q8_0" if it rounds the inputs of layers in that way.

    seconds: that generating took, None if it does not tell.
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
    logprobs: Sequence[Mapping[int, float]] = field(default=(), repr=False)
    answers: Sequence[Mapping[str, Any]] = field(default=(), repr=False)
    seconds: float | None = None


def root() -> Path:
    """Where `.engines` lies: here, or in the checkout that this package belongs to."""
    return Path() if FOLDER.is_dir() else Path(__file__).parents[2]


def worker(engine: str) -> Path:
    """The program that an engine's interpreter runs."""
    return program(f"engine_{engine}")


def interpreter(format_name: str, root: Path = Path(), engine: str | None = None) -> Path:
    """The Python in which ``engine``, or the first that can, reads the format; it may not exist
    yet."""
    readers = FORMATS[format_name].engines
    environment = readers[engine or next(each for each in ENGINES if each in readers)]
    return Path(sys.executable) if environment is None else python_of(environment, root)


def python_of(environment: str, root: Path = Path()) -> Path:
    """The Python of an environment that `scripts/engines.sh` builds. It may not exist."""
    return root / FOLDER / environment / "bin" / "python"


def not_installed(python: Path) -> str | None:
    """What to do about a missing interpreter; None if it is there."""
    if python.is_file():
        return None
    name = python.parent.parent.name
    return f"the engine {name} is not installed: bash scripts/engines.sh {name}"


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

    Never raises for a fault of the engine: a crash, a time-out or a missing environment is a result
    with an error.
    """
    if problem := not_installed(python):
        return EngineResult(False, problem)
    with tempfile.TemporaryDirectory() as folder:
        paths = {key: str(Path(folder) / f"{key}.safetensors") for key in ("inputs", "output")}
        flat = {
            f"{i}.{key}": t.contiguous().clone()
            for i, kwargs in enumerate(inputs)
            for key, t in kwargs.items()
        }
        save_file(flat, paths["inputs"])
        request = {"model": str(checkpoint_dir.resolve()), **asked, **paths}
        answer = _answer(worker(engine), request, python, Path(folder), timeout)
        stored = load_file(paths["output"]) if Path(paths["output"]).is_file() else {}
    made = {
        what: [stored[key] for i in range(len(inputs)) if (key := f"{i}.{what}") in stored]
        for what in MADE
    }
    return _result(answer | made)


def run_llamacpp(
    checkpoint_dir: Path,
    *,
    prompts: Sequence[Sequence[int] | str] = (),
    questions: Sequence[Mapping[str, Any]] = (),
    python: Path,
    top: int = 20,
    template: str | None = None,
    timeout: float = 600,
    context: int = 1024,
) -> EngineResult:
    """Next-token log probabilities of prompts, and greedy answers, by llama.cpp in its interpreter.

    prompts: token ids, or text that llama.cpp tokenizes. questions: {"content": [text or {"image":
    file}], "max_tokens"}. top: number of most likely tokens. template: of the conversation; None is
    the file's own. context: tokens that it has room for. Never raises for a fault of the engine.
    """
    if problem := not_installed(python):
        return EngineResult(False, problem)
    models = sorted(checkpoint_dir.glob("model-*.gguf"))
    towers = sorted(checkpoint_dir.glob("mmproj-*.gguf"))
    if not models:
        return EngineResult(False, f"{checkpoint_dir} holds no model-*.gguf")
    request: dict[str, Any] = {
        "model": str(models[0].resolve()),
        "prompts": list(prompts),
        "questions": list(questions),
        "top": top,
        "template": template,
        "context": context,
    }
    tokenizer = checkpoint_dir / "tokenizer.json"
    if tokenizer.is_file():
        request["filler"] = (
            Tokenizer.from_file(str(tokenizer)).encode("a", add_special_tokens=False).ids[-1]
        )
    request["mmproj"] = str(towers[0].resolve()) if towers else None
    with tempfile.TemporaryDirectory() as folder:
        answer = _answer(worker("llamacpp"), request, python, Path(folder), timeout)
    return _result(answer)


def _result(answer: Mapping[str, Any]) -> EngineResult:
    known = {key: answer[key] for key in EngineResult.__dataclass_fields__ if key in answer}
    known["logprobs"] = [
        {int(key): value for key, value in found.items()} for found in answer.get("logprobs", ())
    ]
    return EngineResult(**known)


def _answer(
    program: Path, request: Mapping[str, Any], python: Path, folder: Path, timeout: float
) -> dict[str, Any]:
    """The worker's answer; {"ok": False, "error": ..} if there is none."""
    request_file = folder / "request.json"
    request_file.write_text(strict.dumps(request), encoding="utf-8")
    # In an empty folder, and -P: the worker must find neither this package's modules nor those of
    # the caller's folder.
    command = [str(python.absolute()), "-P", str(RUNNER), str(program), str(request_file)]
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=OFFLINE,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"ok": False, "error": f"no answer after {timeout:.0f} s"}
    tail = (done.stderr.strip().splitlines() or ["no output"])[-1]
    answer = answer_of(done.stdout) or {
        "ok": False,
        "error": f"the engine died (exit {done.returncode}): {tail}",
    }
    counts = {kind: int(count) for kind, count in LOADED.findall(done.stderr)}
    if counts:
        answer |= {
            "classes": counts,
            "dtype": "float32" if counts.keys() <= {"f32", "f16", "bf16"} else "q8_0",
        }
    return answer
