"""Every reader of files of others, fed with a few damaged ones; `make fuzz` takes ten minutes."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
INPUTS = 40  # a reader; a number, not a time, so that every machine tries the same


def test_no_reader_fails_in_another_way_than_by_one_line():
    """A process of its own: what it watches can't be unwatched, and a crash of a decoder must not
    end the tests."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, str(ROOT / "scripts" / "fuzz.py"), "--inputs", str(INPUTS)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]
    counts = {name.strip(): int(count.replace(",", "")) for name, count, *_ in rows[1:]}
    assert len(counts) >= 18 and all(counts[name] == INPUTS for name in counts if name != "all"), (
        done.stdout
    )


def test_the_fuzzer_sees_what_it_is_to_see(tmp_path):
    """A reader that does each forbidden thing is reported for each."""
    program = f"""
import sys, os, socket, subprocess, pathlib, tempfile, time
sys.path[:0] = [{str(ROOT / "scripts")!r}, {str(ROOT)!r}]
from fuzz import prepare, run
from fuzz_inputs import Target
from auto_mmround.errors import UserError
from hypothesis import strategies as st
work = pathlib.Path({str(tmp_path)!r}) / "work"
work.mkdir()
watch = prepare(work)
(work / "outside" / "secret").write_text("x")
other = work.parent / "other"
def refuse(work, data): raise UserError("no")
def lines(work, data): raise UserError("one\\ntwo")
def connect(work, data):
    with socket.socket() as line:
        line.settimeout(0.1)
        try: line.connect(("127.0.0.1", 9))
        except OSError: pass
readers = dict(
    refuse=refuse, lines=lines, connect=connect,
    ours=lambda work, data: (work / "given" / "x").write_text("x"),
    crash=lambda work, data: 1 / 0,
    write=lambda work, data: other.write_text("x"),
    make=lambda work, data: (other.with_name(f"d{{data}}")).mkdir(exist_ok=True),
    read=lambda work, data: (work / "outside" / "secret").read_text(),
    start=lambda work, data: subprocess.run(["true"]),
    slow=lambda work, data: sum(range(10**6)),
    waits=lambda work, data: time.sleep(0.01),
)
for name, read in readers.items():
    patience = 0.005 if name in ("slow", "waits") else 10
    tally = run(Target(name, st.integers(0, 3), read, patience=patience), work, watch, 0.4)
    print(name, tally.inputs > 0, *tally.problems)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True
    )
    seen = {words[0]: " ".join(words[1:]) for words in map(str.split, done.stdout.splitlines())}
    # waiting for a busy processor is not slow
    assert seen["refuse"] == seen["ours"] == seen["waits"] == "True"
    for name, word in (
        ("lines", "several lines"),
        ("crash", "ZeroDivisionError"),
        ("write", "open for writing"),
        ("make", "os.mkdir"),
        ("read", "outside the given folders"),
        ("start", "subprocess.Popen"),
        ("connect", "socket.connect"),
        ("slow", "slow"),
    ):
        assert word in seen[name], name
