"""A new user's transcript: README.md and the guide it names for vLLM, from installing to an
answer about a picture from vLLM's server.

The commands are the README's own, run by bash in a copy of what git would pack, with a Python
environment of its own. Two things are put in their place: the user's model and picture (the bundled
ones), and the port, which must be free.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from doc_blocks import ROOT, Block, blocks

from auto_mmround.verify.engines import python_of

DEMO = ROOT / "auto_mmround" / "demo"
VLLM = python_of("vllm", ROOT)
README = [*blocks(ROOT / "README.md"), *blocks(ROOT / "docs/guides/vllm.md")]
PATIENCE = 600  # seconds a step may take
INSTALL = 3600  # the same for installing, gigabytes on some machines

pytestmark = pytest.mark.slow


def block_with(text: str) -> Block:
    """The one block of both pages that contains the text."""
    (found,) = [block for block in README if text in block.code]
    return found


def bash(command: str, folder: Path, patience: float = PATIENCE, **options) -> str:
    """What a command prints, with the environment that the README makes; the command must
    succeed."""
    enter = ". venv/bin/activate && " if (folder / "venv").is_dir() else ""
    clean = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", enter + command], cwd=folder,
        env=clean | {"HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=patience, check=False, **options,
    )  # fmt: skip
    print(f"$ {command.rstrip()}\n{done.stdout}")
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    """What git would pack, with the README's environment, the user's model and picture beside
    it."""
    folder = tmp_path_factory.mktemp("clone")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    shutil.copytree(DEMO / "model", folder / "my-model")
    shutil.copy(DEMO / "heldout" / "images" / "0000.png", folder / "picture.png")
    # Versions that were tested, as in `make`: a new release of a package must not decide this test.
    install = block_with("python3 -m venv").code.replace("python3 ", f"{sys.executable} ", 1)
    bash(install.replace("pip install", "pip install --quiet -c constraints.txt"), folder, INSTALL)
    return folder


@pytest.fixture(scope="module")
def checkpoint(clone) -> str:
    """The folder that the README's second step leaves, as the README names it."""
    printed = bash(block_with("--model ./my-model --dataset demo").code, clone)
    assert "RIGHT" in printed.upper() and "vqa" in printed.lower()
    (found,) = set(re.findall(r"./tmp_autoround/\S+", block_with("serve_vllm.py").code))
    return found


def test_quantize_evaluate_verify(clone, checkpoint):
    folder = clone / checkpoint
    assert {
        "model.safetensors",
        "recipe.toml",
        "run.json",
        "eval.json",
        "verify.json",
        "report.html",
    } <= {path.name for path in folder.iterdir()}
    # Nothing of the checkout was used: the package is the one that pip installed.
    place = bash('cd /; python -c "import auto_mmround; print(auto_mmround.__file__)"', clone)
    assert str(clone / "venv") in place


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def answers(url: str) -> bool:
    with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
        return urllib.request.urlopen(url, timeout=5).status == 200
    return False


@contextlib.contextmanager
def serving(command: list[str], folder: Path, port: int) -> Iterator[None]:
    """A server in a process group of its own, which ends with this block whatever happens in it."""
    log = folder / "server.log"
    with log.open("w") as sink:
        server = subprocess.Popen(
            command, cwd=folder, stdout=sink, stderr=sink, start_new_session=True
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None, f"the server ended: {log.read_text()[-4000:]}"
            assert time.monotonic() < deadline, (
                f"no answer after {PATIENCE} s: {log.read_text()[-4000:]}"
            )
            time.sleep(2)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait(20)


def test_an_answer_from_vllm(clone, checkpoint, capsys):
    if not VLLM.is_file():
        pytest.skip("scripts/engines.sh vllm builds the server's environment, 3.5 GB")
    port = free_port()
    build, serve = block_with("serve_vllm.py").commands()
    assert build == ["bash", "scripts/engines.sh", "vllm"]  # stands already
    words = [word.replace("8000", str(port)) for word in serve]
    assert words[0] == ".engines/vllm/bin/python" and str(port) in words
    with serving([str(VLLM), *words[1:], "--max-model-len", "512"], clone, port):
        ask = block_with("chat/completions").code.replace(":8000/", f":{port}/")
        answer = bash("python -", clone, input=ask)
    with capsys.disabled():
        print(f"\nvLLM on the picture: {answer.strip()}")
    assert answer.strip() == "The digit is purple."
    assert not answers(f"http://127.0.0.1:{port}/health")
