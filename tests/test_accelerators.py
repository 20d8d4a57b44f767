"""Several stand-ins: a model spread over two by the command line, processes with one each; and a
process that is killed."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import accelerator
import pytest
from accelerator import NAME, memory

from auto_mmround import cli
from auto_mmround.model import devices

pytestmark = [accelerator.NEEDED, accelerator.STRICT]
HERE = Path(__file__).parent
OPTIONS = dict(model="demo", dataset="demo", iters=1, nsamples=4, seqlen=32, device=NAME)


def words(**options):
    return [part for key, value in options.items() for part in (f"--{key}", str(value))]


def measured(folder):
    """Block -> held-out error at the end."""
    run = json.loads((folder / "run.json").read_text())
    return {block["name"]: block["end"] for block in run["blocks"]}


def test_the_command_line_spreads_a_model_over_two_devices(tmp_path, monkeypatch):
    monkeypatch.setitem(devices.TABLE, NAME, accelerator.ROW)
    with accelerator.shown():
        assert cli.main(words(**OPTIONS, output_dir=tmp_path / "one")) == 0
        for device in range(2):
            accelerator.forget_peak(device)
        spread = words(**OPTIONS, output_dir=tmp_path / "two", device_map="auto")
        assert cli.main(spread) == 0
        assert memory(0).count > 1000 and memory(1).count > 1000
    one, two = (next((tmp_path / name).iterdir()) for name in ("one", "two"))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (one, two)]
    assert weights[0] == weights[1]


def started(*arguments, **variables):
    command = [sys.executable, "-m", "accelerator", *arguments]
    return subprocess.Popen(
        command,
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": f"{HERE}:{HERE.parent}"} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_processes_with_one_device_each_give_what_one_gives(tmp_path):
    alone = started(*words(**OPTIONS, output_dir=tmp_path / "one"))
    assert alone.wait(300) == 0, alone.stdout.read()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    both = [
        started(
            *words(**OPTIONS, output_dir=tmp_path / "two"),
            **group,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    one, two = (measured(next((tmp_path / name).iterdir())) for name in ("one", "two"))
    assert one.keys() == two.keys() and len(one) == 5
    for name, end in one.items():
        assert two[name] == pytest.approx(end, rel=0.1)


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_bits(tmp_path):
    whole = started(*words(**OPTIONS, output_dir=tmp_path / "whole"))
    assert whole.wait(300) == 0, whole.stdout.read()
    command = words(**OPTIONS, output_dir=tmp_path / "killed")
    killed, deadline = started(*command), time.monotonic() + 300
    while len(list((tmp_path / "killed").glob("*.unfinished/*.safetensors"))) < 2:
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    again = started(*command)
    assert again.wait(300) == 0, again.stdout.read()
    one, two = (next((tmp_path / name).iterdir()) for name in ("whole", "killed"))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (one, two)]
    assert weights[0] == weights[1]
