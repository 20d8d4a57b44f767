"""Which interpreter reads which format, and one subprocess for each question to an engine."""

import os
import re
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from auto_mmround import strict
from auto_mmround.export.formats import FORMATS
from auto_mmround.programs import answer_of, environment_of, piece_of, program
from auto_mmround.readers import ENGINES

# only llama.cpp's log says it
LOADED = re.compile(r"llama_model_loader: - type +(\w+): +(\d+) tensors")
MADE = ("logits", "tokens")  # results that a worker may write for each input
CONTEXT = 8192  # tokens that llama.cpp has room for when it answers
FOLDER = Path(".engines")
RUNNER = program("engine_main")

# Gets a piece of an answer as soon as it is there: text, or the id of a token.
OnPiece = Callable[[str | int], None]


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

    Of an answer aloud, answers holds {"text", "tokens"} or {"ids"}, and seconds the time it took,
    loading apart.
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
    on_piece: OnPiece = lambda piece: None,
) -> EngineResult:
    """One question to an engine's worker in its own interpreter.

    on_piece: gets the pieces that a worker says before it is done, see `engine_main.py`.
    Never raises for a fault of the engine: a crash, a time-out or a missing environment is a
    result with an error.
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
        answer = _answer(worker(engine), request, python, Path(folder), timeout, on_piece)
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
) -> EngineResult:
    """Next-token log probabilities of prompts, and greedy answers, by llama.cpp in its interpreter.

    prompts: token ids, or text that llama.cpp tokenizes. questions: {"content": [text or {"image":
    file}], "max_tokens"}. top: number of most likely tokens. template: of the conversation; None is
    the file's own. Never raises for a fault of the engine.
    """
    request: dict[str, Any] = {
        "prompts": list(prompts),
        "questions": list(questions),
        "top": top,
        "template": template,
    }
    tokenizer = checkpoint_dir / "tokenizer.json"
    if tokenizer.is_file():
        request["filler"] = (
            Tokenizer.from_file(str(tokenizer)).encode("a", add_special_tokens=False).ids[-1]
        )
    return _llamacpp(checkpoint_dir, request, python, timeout)


def ask_llamacpp_aloud(
    checkpoint_dir: Path,
    question: Mapping[str, Any],
    *,
    python: Path,
    timeout: float,
    on_piece: OnPiece,
) -> EngineResult:
    """The greedy answer to one question as in `run_llamacpp`, said piece by piece, on all cores."""
    request = {
        "questions": [question], "aloud": True, "context": CONTEXT, "threads": os.cpu_count()
    }  # fmt: skip
    return _llamacpp(checkpoint_dir, request, python, timeout, on_piece)


def _llamacpp(
    checkpoint_dir: Path,
    request: Mapping[str, Any],
    python: Path,
    timeout: float,
    on_piece: OnPiece = lambda piece: None,
) -> EngineResult:
    if problem := not_installed(python):
        return EngineResult(False, problem)
    files = {
        key: next((str(path.resolve()) for path in sorted(checkpoint_dir.glob(name))), None)
        for key, name in (("model", "model-*.gguf"), ("mmproj", "mmproj-*.gguf"))
    }
    if files["model"] is None:
        return EngineResult(False, f"{checkpoint_dir} holds no model-*.gguf")
    with tempfile.TemporaryDirectory() as folder:
        worked = worker("llamacpp"), {**request, **files}, python, Path(folder), timeout
        return _result(_answer(*worked, on_piece))


def _result(answer: Mapping[str, Any]) -> EngineResult:
    known = {key: answer[key] for key in EngineResult.__dataclass_fields__ if key in answer}
    known["logprobs"] = [
        {int(key): value for key, value in likely.items()} for likely in answer.get("logprobs", ())
    ]
    return EngineResult(**known)


def _answer(
    program: Path,
    request: Mapping[str, Any],
    python: Path,
    folder: Path,
    timeout: float,
    on_piece: OnPiece,
) -> dict[str, Any]:
    """The worker's answer; {"ok": False, "error": ..} if there is none."""
    request_file = folder / "request.json"
    request_file.write_text(strict.dumps(request), encoding="utf-8")
    # In an empty folder, and -P: the worker must find neither this package's modules nor modules
    # in the caller's folder.
    command = [str(python.absolute()), "-P", str(RUNNER), str(program), str(request_file)]
    log = folder / "log.txt"
    code, last = _run(command, log, timeout, on_piece)
    said = log.read_text(encoding="utf-8", errors="replace")
    if code is None:
        reason = f"no answer after {timeout:.0f} s; --timeout gives it longer"
        return {"ok": False, "error": reason}
    tail = (said.strip().splitlines() or ["no output"])[-1]
    answer = answer_of(last) or {"ok": False, "error": f"the engine died (exit {code}): {tail}"}
    counts = {type_name: int(count) for type_name, count in LOADED.findall(said)}
    if counts:
        answer |= {
            "classes": counts,
            "dtype": "float32" if counts.keys() <= {"f32", "f16", "bf16"} else "q8_0",
        }
    return answer


def _run(
    command: Sequence[str], log: Path, timeout: float, on_piece: OnPiece
) -> tuple[int | None, str]:
    """(exit status, None if time ran out; the last line of standard output). Standard error goes
    to the log."""
    last, end = "", time.monotonic() + timeout
    with (
        log.open("w", encoding="utf-8") as sink,
        subprocess.Popen(
            command, cwd=log.parent, env=environment_of(Path(command[0])),
            stdout=subprocess.PIPE, stderr=sink, bufsize=0,
        ) as process,
    ):  # fmt: skip
        assert process.stdout is not None  # it is a pipe
        try:
            for line in _lines(process.stdout, end):
                piece = piece_of(line)
                if piece is not None:
                    on_piece(piece)
                elif line.strip():
                    last = line
            return process.wait(max(0.0, end - time.monotonic())), last
        except (TimeoutError, subprocess.TimeoutExpired):
            process.kill()
            return None, last
        except BaseException:  # such as Ctrl-C: nobody waits for the rest
            process.kill()
            raise


def _lines(pipe: IO[bytes], end: float) -> Iterator[str]:
    """Lines as they come. Raises TimeoutError when the monotonic clock reaches ``end``, also if a
    process that the worker started holds the pipe."""
    rest, some = b"", b"-"
    with selectors.DefaultSelector() as ready:
        ready.register(pipe, selectors.EVENT_READ)
        while some:
            left = end - time.monotonic()
            if left <= 0 or not ready.select(left):
                raise TimeoutError
            some = os.read(pipe.fileno(), 2**16)
            *lines, rest = (rest + some).split(b"\n")
            yield from (line.decode(errors="replace") for line in lines)
    yield rest.decode(errors="replace")
