"""Feed every reader of files that others wrote with damaged ones: `python scripts/fuzz.py --minutes
10`.

A reader may answer with what it read or with one line (UserError and its kin). A traceback of any
other kind, more than `Target.patience` processor seconds for one input (or STUCK by the clock,
which ends the process), a file touched outside the working folder, a read of the file that lies
just outside the given folders, a program started or a connection tried: each is a problem, reported
once for the place where it happens, with the input kept. Exit status: 0 without problems, else 1.
"""

import argparse
import contextlib
import faulthandler
import io
import logging
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))
from fuzz_inputs import Target

from auto_mmround.errors import UserError

STUCK = 120.0
BATCH = 200
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Audit events of changes to the file system -> which of their arguments are paths.
CHANGES = {
    **dict.fromkeys(
        ("os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.chown", "os.truncate", "os.utime"),
        (0,),
    ),
    **dict.fromkeys(("os.rename", "os.link", "os.symlink"), (0, 1)),
}
NEVER = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "socket.connect",
    "socket.getaddrinfo",
)


@dataclass
class Problem:
    """The first input of its kind, and how often the kind was met."""

    text: str
    data: Any
    count: int = 1


@dataclass
class Tally:
    """What became of the inputs of one reader. slowest: processor seconds."""

    inputs: int = 0
    refused: int = 0
    slowest: float = 0.0
    seconds: float = 0.0
    problems: dict[str, Problem] = field(default_factory=dict)

    def note(self, key: str, text: str, data: Any) -> None:
        """Counts a problem, and keeps its first input."""
        if key in self.problems:
            self.problems[key].count += 1
        else:
            self.problems[key] = Problem(text, data)


class Watch:
    """Sees every file that is opened for writing, removed, renamed or made, and every program and
    connection.

    An audit hook can't be taken away again, so there is one, which only looks while `active`.
    """

    def __init__(self, work: Path) -> None:
        self.work, self.secrets = os.path.realpath(work), os.path.realpath(work / "outside")
        self.active = False
        self.seen: list[str] = []
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.active:
            return
        if event in NEVER:
            self.seen.append(f"{event} {arguments[:2]!r}")
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path, flags = os.path.realpath(os.fsdecode(arguments[0])), arguments[2] or 0
            if path.startswith(self.secrets):
                self.seen.append(f"read outside the given folders: {path}")
            elif flags & WRITING and not self._ours(path):
                self.seen.append(f"open for writing {path}")
        elif event in CHANGES:
            self.seen += [
                f"{event} {path}" for path in _paths(event, arguments) if not self._ours(path)
            ]

    def _ours(self, path: str) -> bool:
        return path == os.devnull or path == self.work or path.startswith(self.work + os.sep)


def _paths(event: str, arguments: tuple[Any, ...]) -> list[str]:
    """The paths of an audit event; those that are relative to an open folder begin there."""
    folder = arguments[-1]
    relative = (
        event in ("os.remove", "os.rmdir", "os.mkdir") and isinstance(folder, int) and folder >= 0
    )
    base = os.readlink(f"/proc/self/fd/{folder}") if relative else os.getcwd()
    names = [os.fsdecode(arguments[i]) for i in CHANGES[event] if not isinstance(arguments[i], int)]
    return [os.path.realpath(os.path.join(base, name)) for name in names]


def attempt(reader: Target, data: Any, work: Path, watch: Watch, tally: Tally) -> None:
    """One input: what it leads to goes into the tally."""
    watch.seen.clear()
    begun = time.process_time()
    faulthandler.dump_traceback_later(STUCK, exit=True, file=sys.__stderr__)
    watch.active = True
    try:
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(work, data)
    except reader.accepted as error:
        tally.refused += 1
        if isinstance(error, UserError) and "\n" in str(error).strip():
            tally.note("several lines", f"an error of several lines: {str(error)[:300]!r}", data)
    except Exception as error:  # noqa: BLE001 - to find any is the purpose
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "auto_mmround" in frame.filename] or frames
        place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}"
        tally.note(
            f"{type(error).__name__} {place}", "".join(traceback.format_exception(error)[-6:]), data
        )
    finally:
        watch.active = False
        faulthandler.cancel_dump_traceback_later()
    taken = time.process_time() - begun
    tally.inputs, tally.slowest = tally.inputs + 1, max(tally.slowest, taken)
    if taken > reader.patience:
        tally.note("slow", f"{taken:.1f} processor seconds for one input", data)
    for line in dict.fromkeys(watch.seen):
        tally.note(line[:60], line, data)


class TimeIsUp(BaseException):
    """Ends hypothesis's loop: it passes on what is no Exception."""


def run(
    reader: Target,
    work: Path,
    watch: Watch,
    seconds: float,
    first_seed: int = 0,
    most: int | None = None,
) -> Tally:
    """Inputs of one reader until the time is up or there were ``most``; the same seed gives the
    same inputs."""
    tally, end, begun = Tally(), time.monotonic() + seconds, time.monotonic()
    number = first_seed
    with contextlib.suppress(TimeIsUp):
        while True:

            @seed(number)
            @settings(max_examples=BATCH, database=None, deadline=None,
                suppress_health_check=list(HealthCheck),
                      phases=(Phase.generate,))  # fmt: skip
            @given(reader.inputs)
            def batch(data: Any) -> None:
                if time.monotonic() > end or tally.inputs == most:
                    raise TimeIsUp
                attempt(reader, data, work, watch, tally)

            batch()
            number += 1
    tally.seconds = time.monotonic() - begun
    return tally


def prepare(work: Path) -> Watch:
    """A working folder whose caches are its own; to be called before the readers are imported."""
    sys.dont_write_bytecode = True
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        os.environ[name] = str(work / "cache" / name)
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.disable(logging.ERROR)
    (work / "outside").mkdir()
    (work / "given").mkdir()
    return Watch(work)


def table(tallies: dict[str, Tally]) -> str:
    """A Markdown table, a row a reader."""
    lines = [
        "| reader | inputs | refused with one line | slowest, processor s | problems |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {t.inputs:,} | {t.refused:,} | {t.slowest:.2f} | {len(t.problems)} |"
        for name, t in tallies.items()
    ]
    lines.append(
        f"| all | {sum(t.inputs for t in tallies.values()):,} |"
        f" {sum(t.refused for t in tallies.values()):,} | | |"
    )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="in all, shared by the readers (default: 10)"
    )
    parser.add_argument(
        "--inputs", type=int, help="so many a reader, however long: the same on every machine"
    )
    parser.add_argument("--readers", help="comma list; all without it")
    parser.add_argument("--seed", type=int, default=0, help="of the first batch")
    parser.add_argument(
        "--keep", type=Path, help="a folder: the input of every problem is put there"
    )
    found = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        watch = prepare(work)
        from fuzz_readers import make_readers

        readers = make_readers(work)
        names = found.readers.split(",") if found.readers else list(readers)
        tallies = {}
        seconds = found.minutes * 60 / len(names) if found.inputs is None else float("inf")
        for name in names:
            tallies[name] = run(readers[name], work, watch, seconds, found.seed, found.inputs)
            print(
                f"{name}: {tallies[name].inputs:,} inputs, {len(tallies[name].problems)} problems",
                flush=True,
            )
            for i, problem in enumerate(tallies[name].problems.values()):
                print(
                    f"  {problem.count} x {problem.text}\n  input: {str(problem.data)[:300]}",
                    flush=True,
                )
                if found.keep:
                    found.keep.mkdir(parents=True, exist_ok=True)
                    raw = (
                        problem.data
                        if isinstance(problem.data, bytes)
                        else repr(problem.data).encode()
                    )
                    (found.keep / f"{name}-{i}").write_bytes(raw)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"\n{table(tallies)}\n\npeak memory {peak:.1f} GB")
    return int(any(tally.problems for tally in tallies.values()))


if __name__ == "__main__":
    raise SystemExit(main())
