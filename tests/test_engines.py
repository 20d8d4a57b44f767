"""The subprocess protocol: whatever a worker does, the parent gets an answer."""

import re
import sys
import time
from pathlib import Path

import pytest
import torch

from auto_mmround.readers import ENGINES
from auto_mmround.verify import engines
from auto_mmround.verify.engines import EngineResult, ask

WORKERS = {
    "import of a missing package": (
        "import no_such_package\n",
        "ModuleNotFoundError: No module named",
    ),
    "error with lines": (
        "def answer(request):\n    raise ValueError('two\\n  lines')\n",
        "ValueError: two lines",
    ),
    "no answer at all": ("import os\nos._exit(3)\n", "the engine died (exit 3): no output"),
    "death with a word": (
        "import os\nos.write(2, b'out of memory')\nos._exit(1)\n",
        "(exit 1): out of memory",
    ),
    "death behind a number": (
        "import os\nprint(7, flush=True)\nos._exit(3)\n",
        "the engine died (exit 3): no output",
    ),
    "too slow": ("import time\ntime.sleep(60)\n", "no answer after 1 s"),
    "too slow, and a process of its own holds the pipe": (
        "import subprocess, time\nsubprocess.Popen(['sleep', '30'])\ntime.sleep(60)\n",
        "no answer after 1 s",
    ),
}


def asked(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **options) -> EngineResult:
    worker = folder / "engine_test.py"
    worker.write_text(code)
    monkeypatch.setattr(engines, "worker", lambda engine: worker)
    inputs = [{"input_ids": torch.tensor([[1, 2]])}]
    return ask("mlx", folder, inputs, {"new_tokens": 2}, python=Path(sys.executable), **options)


@pytest.mark.parametrize("case", WORKERS)
def test_every_failure_is_an_answer(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, message = WORKERS[case]
    began = time.monotonic()
    result = asked(code, tmp_path, monkeypatch, timeout=1 if "too slow" in case else 60)
    assert not result.ok and message in str(result.error)
    assert "too slow" not in case or time.monotonic() - began < 20


def test_a_worker_gets_the_request_and_finds_none_of_our_modules(
    tmp_path: Path, monkeypatch
) -> None:
    code = """
import importlib.util
from safetensors.torch import load_file, save_file

def answer(request):
    ids = load_file(request["inputs"])["0.input_ids"]
    save_file({"0.tokens": ids.repeat(1, request["new_tokens"])}, request["output"])
    ours = [name for name in ("metrics", "engines", "verify") if importlib.util.find_spec(name)]
    return {"ok": True, "missing": ours, "logprobs": [{7: -1.5}], "not a field": 1}
"""
    monkeypatch.delenv("PYTHONPATH", raising=False)  # of those who run the tests
    result = asked(code, tmp_path, monkeypatch)
    assert result.ok and result.missing == [] and result.logprobs == [{7: -1.5}]
    assert result.tokens[0].tolist() == [[1, 2, 1, 2]] and result.logits == []


def test_an_environment_does_not_see_the_callers_packages(tmp_path: Path, monkeypatch) -> None:
    """Our own interpreter does: some of its packages may lie there."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    code = "import os\ndef answer(request):\n    return {'ok': True, 'dtype': f'{os.environ}'}\n"
    assert asked(code, tmp_path, monkeypatch).ok
    other = tmp_path / "other"
    other.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    other.chmod(0o755)
    seen = [ask("mlx", tmp_path, [], {}, python=p).dtype for p in (Path(sys.executable), other)]
    assert ["PYTHONPATH" in variables for variables in seen] == [True, False]
    assert all("'HF_HUB_OFFLINE': '1'" in variables for variables in seen)


def test_pieces_arrive_before_the_answer(tmp_path: Path, monkeypatch) -> None:
    """The worker goes on only when the parent has heard the piece, and stops with the parent."""
    heard = tmp_path / "heard"
    code = f"""
import sys
import time
from pathlib import Path
sys.path.append({str(engines.RUNNER.parent)!r})
from engine_main import say

def answer(request):
    print("a library's line")
    for i, piece in enumerate(["a word", 7]):
        say(piece)
        while Path({str(heard)!r}).read_text().count("x") <= i:
            time.sleep(0.01)
    return {{"ok": True, "answers": [{{"ids": [7]}}]}}
"""
    heard.write_text("")
    pieces = []

    def on_piece(piece):
        pieces.append(piece)
        heard.write_text("x" * len(pieces))

    result = asked(code, tmp_path, monkeypatch, timeout=20, on_piece=on_piece)
    assert result.ok and pieces == ["a word", 7] and result.answers == [{"ids": [7]}]

    def on_interrupt(piece):
        raise KeyboardInterrupt

    heard.write_text("")
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        asked(code, tmp_path, monkeypatch, timeout=20, on_piece=on_interrupt)
    assert time.monotonic() - began < 10


def test_every_engine_has_a_worker() -> None:
    assert all(engines.worker(name).is_file() for name in ENGINES)


# what skips or changes where an engine's environment is missing
NEEDS = re.compile(r"python_of\(|/ \"\.engines\"|scripts/engines\.sh")


def test_make_test_engines_runs_every_slow_test_that_asks_an_engine() -> None:
    tests = Path(__file__).parent
    listed = (tests.parent / "Makefile").read_text().partition("ENGINE_TESTS := ")[2]
    named = {f"test_{name}" for name in re.findall(r"(\w+\.py)", listed.partition("\n\n")[0])}
    assert named <= {path.name for path in tests.glob("test_*.py")}
    missing = {
        path.name
        for path in tests.glob("test_*.py")
        if "mark.slow" in (text := path.read_text()) and NEEDS.search(text)
    } - named
    # it makes an environment of its own from the package index, as the README does
    assert missing == {"test_new_user.py"}
