"""What a run prints: live on a terminal, whole lines in a file, JSON for programs."""

import io
import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.table import Table

from auto_mmround import cli
from auto_mmround.errors import UserError
from auto_mmround.printing import Telling, console, notices, show
from auto_mmround.progress import Events, RunProgress

ROOT = Path(__file__).parents[1]
RUN = ["--model", "demo", "--dataset", "demo", "--iters", "1", "--nsamples", "8", "--seqlen", "64"]
HEAD = ("model", "accuracy", "perplexity", "KL text", "same top-1 image")


@pytest.mark.parametrize("width", [30, 40, 60, 80, 200])
def test_tables_never_cut_a_word(width):
    table = Table(*HEAD, title="measured")
    table.add_row("demo-w4g128-auto_round", "98.1 %", "4.123", "0.00158", "99.9 %")
    sink = io.StringIO()
    show(table, Console(file=sink, width=width))
    words = set(re.split(r"[\s\u2500-\u257f]+", sink.getvalue().replace(":", " ")))
    assert {*" ".join(HEAD).split(), "demo-w4g128-auto_round", "0.00158"} <= words
    assert "\u2026" not in sink.getvalue()
    assert max(map(len, sink.getvalue().splitlines())) <= max(width, 40)


def test_brackets_of_a_path_are_no_markup(capsys):
    console.print("out[bold]/model", soft_wrap=True)
    assert capsys.readouterr().out == "out[bold]/model\n"


def test_a_file_gets_whole_lines_without_colours_and_a_program_json(tmp_path):
    command = [sys.executable, "-m", "auto_mmround", *RUN, "--output_dir", "o" * 60]
    done = subprocess.run(
        [*command, "--json_log", "log.jsonl"], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "COLUMNS": "80", "PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = done.stdout + done.stderr
    assert "\x1b" not in told and "\r" not in told and "\u2026" not in told
    assert "\n\n" not in told.strip()
    assert len(re.findall(r"^model\.\S+layers\.\d: .* GB$", done.stderr, re.MULTILINE)) == 5
    assert max(map(len, told.splitlines())) > 80  # nothing was broken there
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "start" and kinds[-1] == "done" and kinds.count("block") == 5
    assert {"phase", "written"} <= {*kinds} and all("time" in event for event in events)
    (block, *_) = (event for event in events if event["event"] == "block")
    assert block["done"] == 1 and block["total"] == 5 and block["end"] > 0
    last = len(kinds) - kinds[::-1].index("phase") - 1  # what heartbeats name at the end
    assert events[last]["phase"] == "writing checkpoints" and "block" not in kinds[last:]


def test_a_terminal_gets_a_live_line_and_a_table(tmp_path):
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "auto_mmround", *RUN, "--output_dir", str(tmp_path)]
    run = subprocess.Popen(
        command, stderr=theirs, stdout=subprocess.DEVNULL, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    told = b""
    try:
        while piece := os.read(mine, 65536):
            told += piece
    except OSError:  # the terminal is gone
        pass
    os.close(mine)
    assert run.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", told.decode())
    assert "left" in text and "layers." in text and "mean loss" in text
    assert not re.search(r"^model\.\S+: \d+ weights", text, re.MULTILINE)


def test_quiet_and_verbose(tmp_path, capfd):
    words = ["--model", "demo", "--iters", "0", "--overwrite", "--output_dir", str(tmp_path)]
    assert cli.main([*words, "-q"]) == 0
    said = capfd.readouterr()
    assert said.err == "" and len(said.out.splitlines()) == 1
    assert cli.main([*words, "-v"]) == 0
    assert "layers.4" in capfd.readouterr().err


def test_a_heartbeat_between_events(tmp_path, capsys):
    events = Events(Telling(json_log=tmp_path / "log"), heartbeat=0.1)
    events.live = False
    with events.told():
        events.at("solving")
        time.sleep(0.5)
    said = capsys.readouterr().err
    assert 2 <= said.count("still solving") <= 6 or notices.is_terminal
    rows = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert sum(row["event"] == "heartbeat" for row in rows) >= 2


def test_a_failure_is_the_last_event_and_a_bad_file_one_line(tmp_path, capsys):
    log = tmp_path / "log"
    words = ["--model", "demo", "--dataset", "no.json", "--output_dir", str(tmp_path / "out")]
    assert cli.main([*words, "--json_log", str(log)]) == 2
    last = json.loads(log.read_text().splitlines()[-1])
    assert last["event"] == "failed" and "no.json" in last["error"]
    capsys.readouterr()
    assert cli.main([*words, "--json_log", str(tmp_path / "no" / "log")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(UserError, match="json_log"):
        Events(Telling(json_log=tmp_path))


def test_a_step_is_told_on_the_line_of_its_own_stage():
    stages = [
        SimpleNamespace(name=name, depth=1, blocks=[f"{name}.0"]) for name in ("vision", "text")
    ]
    bar = RunProgress(SimpleNamespace(stages=stages), SimpleNamespace(steps=4))
    bar.watcher().step("text.0", 1, 4)  # no block of it is finished yet
    told = {task.description: task.fields["told"] for task in bar._bars.tasks}
    assert told["vision"] == "" and told["text"].startswith("text.0 step 1/4")
