"""What benches share: their options, their tables, and what stays on disk of a run."""

import argparse
import datetime
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


def options(
    doc: str | None, keep: str = "folder for a dated Markdown file"
) -> argparse.ArgumentParser:
    """A parser with the text of the bench, and its option --keep."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--keep", type=Path, help=keep)
    return parser


def held_out_options(doc: str | None) -> argparse.ArgumentParser:
    """`options`, and what both calibration and held-out data are told."""
    parser = options(doc)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dataset", default="demo")
    parser.add_argument("--held_out", default="demo")
    parser.add_argument("--seqlen", type=int, default=128)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument(
        "--limit", type=int, default=48, help="held-out texts, and as many questions about images"
    )
    return parser


def held_out_values(found: argparse.Namespace) -> dict[str, Any]:
    """Keys of a recipe, of `held_out_options`."""
    values = {"model": found.model, "dataset": found.dataset, "nsamples": found.samples}
    return values | {"seqlen": found.seqlen, "device": "cpu"}


def scheme(name: str) -> dict[str, Any]:
    """Of `W4g128`, or `W4g128a` for asymmetric: the keys of a recipe. Exits where it is none."""
    found = re.fullmatch(r"W(\d)g(-?\d+)(a?)", name)
    if found is None:
        sys.exit(f"scheme {name}: W4g128 for 4 bits in groups of 128, W4g128a for asymmetric")
    return {"bits": int(found[1]), "group_size": int(found[2]), "sym": not found[3]}


def line(cells: Iterable[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def head(columns: Sequence[str]) -> list[str]:
    """The first two lines of a Markdown table."""
    return [line(columns), "|" + "---|" * len(columns)]


class Table:
    """A Markdown table, printed line by line as it grows."""

    def __init__(self, *columns: str) -> None:
        self.lines = head(columns)
        print(self, flush=True)

    def add(self, *cells: object) -> None:
        self.lines.append(line(cells))
        print(self.lines[-1], flush=True)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def kl_cells(figures: Any) -> list[str]:
    """KL on text and on images, `-` where there are none, and perplexity."""
    kinds = ("text", "image")
    kl = [f"{figures.kl[kind]:.5f}" if kind in figures.kl else "-" for kind in kinds]
    return [*kl, f"{figures.perplexity:.3f}"]


def answer(program: str, job: Mapping[str, Any]) -> dict[str, Any]:
    """What `program --worker` prints last in a process of its own; {"error": its last line of
    complaint} where it fails, and all that it said on standard error."""
    command = [sys.executable, program, "--worker", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        print(done.stderr, file=sys.stderr)
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:200]}
    return json.loads(lines[-1])


def result(
    program: str, job: Mapping[str, Any], environment: Mapping[str, str] | None = None
) -> Any:
    """What is in the file `job["result"]`; where it is missing, `program --worker` writes it first,
    in a process of its own."""
    path = Path(job["result"])
    if not path.is_file():
        command = [sys.executable, program, "--worker", json.dumps(job)]
        subprocess.run(command, check=True, env=environment)
    return json.loads(path.read_text())


def work_folder(asked: argparse.Namespace, *choices: str) -> Path:
    """`asked.work`, made. Exits where it holds results of other options.

    choices: options that only say which cells are run.
    """
    path, skipped = asked.work / "options.json", {"keep", "work", "worker", *choices}
    asked.work.mkdir(parents=True, exist_ok=True)
    before = json.loads(path.read_text()) if path.is_file() else {}
    given = {k: v for k, v in vars(asked).items() if k not in skipped and v is not None}
    now = json.loads(json.dumps(given, default=str))
    for name, value in now.items():
        if before.get(name) not in (None, value):
            sys.exit(
                f"{asked.work} holds results with another {name} ({before[name]}, now {value}):"
                " give --work another folder"
            )
    path.write_text(json.dumps(before | now, indent=1))
    return asked.work


def peak_gb() -> float:
    """Largest resident set of this process so far."""
    from auto_mmround.model import devices

    return devices.peak_memory(devices.HOST)["process"]


def keep(folder: Path | None, name: str, title: str, *parts: object, section: str = "") -> None:
    """NAME-DATE.md, if there is a folder: the title with the date, the parts, the machine and the
    command, a paragraph each. A section is added to what the file of the day has."""
    if folder is None:
        return
    from auto_mmround.run.record import machine

    today = datetime.date.today()
    path, head = folder / f"{name}-{today}.md", f"# {title}, {today}"
    if section:
        head = path.read_text().rstrip() if path.is_file() else head
        parts = (f"## {section}", *parts)
    folder.mkdir(parents=True, exist_ok=True)
    facts = (json.dumps(machine()), f"Command: `{' '.join(sys.argv)}`")
    path.write_text("\n\n".join(map(str, (head, *parts, *facts))) + "\n")
