"""The command line: `auto-round-mllm`, also `auto_round_mllm` and `python -m auto_mmround`.

Heavy imports wait until a command needs them, so that `-h` and mistakes answer at once.
"""

import argparse
import difflib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TextIO

from auto_mmround.atomic import FULL
from auto_mmround.completion import ASKED, answer_shell, shell_code
from auto_mmround.errors import NotProved, UserError
from auto_mmround.flags import PROGRAM, normalise, parser_of, to_recipe
from auto_mmround.recipe.files import read
from auto_mmround.recipe.recipe import Recipe, from_mapping
from auto_mmround.untrusted import one_line

# What a parser of a recipe finds beside the recipe.
BESIDE = (
    "recipe_file", "eval", "lmms", "json", "verbose", "quiet", "json_log", "push_to_hub", "public",
    "hub_endpoint",
)  # fmt: skip


def quantize_command(arguments: Sequence[str]) -> int:
    """Quantize and export."""
    recipe, flags = parse_recipe(arguments, "quantize")
    from auto_mmround.console import quantize_with_progress
    from auto_mmround.printing import Telling

    telling = Telling(flags.verbose, flags.quiet, flags.json_log)
    if flags.push_to_hub is None:
        return quantize_with_progress(recipe, telling)
    from auto_mmround.publish import Place

    place = Place(flags.push_to_hub, flags.public, flags.hub_endpoint)
    place.check()
    return quantize_with_progress(recipe, telling, place)


def plan_command(arguments: Sequence[str]) -> int:
    """Print the plan and stop."""
    recipe, flags = parse_recipe(arguments, "plan")
    from auto_mmround.console import show_plan
    from auto_mmround.printing import Telling

    telling = Telling(flags.verbose, flags.quiet, flags.json_log)
    return show_plan(recipe, telling, flags.json)


def parse_recipe(
    arguments: Sequence[str], command: str = "quantize"
) -> tuple[Recipe, argparse.Namespace]:
    """The recipe of a command line: a file, if the first argument is one, under the flags."""
    words = normalise(arguments)
    parser = parser_of(command, every="--help_all" in words)
    flags = parser.parse_args(words)
    given = {key: value for key, value in vars(flags).items() if key not in BESIDE}
    if flags.eval or flags.lmms:
        raise UserError(
            "--eval and --lmms: evaluate the result with `auto-round-mllm eval --model DIR --lmms"
            " TASKS`"
        )
    file = flags.recipe_file
    if file and not Path(file).suffix:
        near = difflib.get_close_matches(file, RUN, n=1)
        hint = f"did you mean {near[0]}?" if near else f"see {parser.prog} -h"
        raise UserError(f"unknown command {file!r}; {hint}")
    base = from_mapping(read(file), f"recipe file {file}") if file else Recipe()
    return to_recipe(given, base), flags


def eval_command(arguments: Sequence[str]) -> int:
    """Measure a model, alone or against a reference."""
    _check_named(arguments)
    flags = parser_of("eval").parse_args(normalise(arguments))
    if flags.limit is not None and flags.limit < 1:
        raise UserError(f"limit = {flags.limit}: at least 1")
    flags.words = list(arguments)
    outside = [
        f"{p}:{n}"
        for p in ("lmms", "vlmeval")
        for n in (getattr(flags, p) or "").split(",")
        if n.strip()
    ]
    flags.tasks = ",".join([*([flags.tasks] if flags.tasks else []), *outside]) or None
    from auto_mmround.console import evaluate_and_show

    return evaluate_and_show(flags)


def verify_command(arguments: Sequence[str]) -> int:
    """Check a checkpoint."""
    _check_named(arguments)
    flags = parser_of("verify").parse_args(normalise(arguments))
    _check_timeout(flags.timeout)
    if flags.engine is not None and not flags.engine.strip(" ,"):
        raise UserError("engine is empty: name some, or none for the files only")
    from auto_mmround.console import verify_and_show

    return verify_and_show(flags)


def _check_named(arguments: Sequence[str]) -> None:
    """Raises UserError for an empty argument, as a script's unset variable makes it: as a path it
    would be the current folder."""
    if not all(word.strip() for word in arguments):
        raise UserError("an argument is empty: name a folder, or . for the current one")


def _check_timeout(seconds: float) -> None:
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise UserError(f"timeout = {seconds:g}: seconds above 0")


def ask_command(arguments: Sequence[str]) -> int:
    """Ask checkpoints a question."""
    flags = parser_of("ask").parse_args(normalise(arguments))
    if flags.max_tokens < 1:
        raise UserError(f"max_tokens = {flags.max_tokens}: at least 1")
    _check_timeout(flags.timeout)
    from auto_mmround.asking import ask_and_show

    return ask_and_show(flags)


def report_command(arguments: Sequence[str]) -> int:
    """Write a page on a run, or on several."""
    flags = parser_of("report").parse_args(normalise(arguments))
    _check_named(flags.folders)
    from auto_mmround.console import show_report

    return show_report(flags.folders, flags.output, flags.open)


def push_command(arguments: Sequence[str]) -> int:
    """Send a checkpoint to the Hub."""
    flags = parser_of("push").parse_args(normalise(arguments))
    from auto_mmround.publish import Place, push

    print(push(flags.folder, Place(flags.repo, flags.public, flags.hub_endpoint)))
    return 0


def formats_command(arguments: Sequence[str]) -> int:
    """List the formats."""
    parser_of("formats").parse_args(arguments)
    from auto_mmround.lists import show_formats

    return show_formats()


def families_command(arguments: Sequence[str]) -> int:
    """List the families."""
    parser_of("families").parse_args(arguments)
    from auto_mmround.lists import show_families

    return show_families()


def completion_command(arguments: Sequence[str]) -> int:
    """Print a shell's code."""
    print(shell_code(parser_of("completion").parse_args(arguments).shell))
    return 0


RUN: dict[str, Callable[[Sequence[str]], int]] = {
    "quantize": quantize_command,
    "plan": plan_command,
    "eval": eval_command,
    "verify": verify_command,
    "ask": ask_command,
    "report": report_command,
    "push": push_command,
    "formats": formats_command,
    "families": families_command,
    "completion": completion_command,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done; 1 our fault, or a wrong result; 2 wrong input (one line on stderr)."""
    _open_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    logging.getLogger("auto_mmround").setLevel(logging.INFO)
    try:
        if ASKED in os.environ:
            answer_shell()
        if sys.flags.optimize > 1 and not {"-h", "--help", "--help_all"} & {*words}:
            raise UserError("Transformers needs docstrings: leave out PYTHONOPTIMIZE=2 or -OO")
        command = RUN.get(words[0]) if words else None
        with _ended_in_order(), _flushed():
            return command(words[1:]) if command else quantize_command(words)
    except (UserError, NotProved) as error:
        _complain(one_line(str(error)))
        return 2 if isinstance(error, UserError) else 1
    except Ended as end:
        _complain(f"ended by {end.signal.name}")
        return 128 + end.signal
    except KeyboardInterrupt:
        _complain("interrupted")
        return 130
    except BrokenPipeError:
        _print_nowhere()
        return 0
    except OSError as error:
        if _is_nowhere():
            _complain("the current folder was removed: cd to another")
            return 2
        if error.errno not in FULL:
            raise
        _print_nowhere()
        # an error of `write` does not say of which file
        what = "what is printed can't be written, or a file"
        what = f"{error.filename} can't be written" if error.filename else what
        _complain(f"{what}: {error.strerror}")
        return 2 if error.filename else 1


def _complain(line: str) -> None:
    try:
        print(f"{PROGRAM}: {line}", file=sys.stderr, flush=True)
    except BrokenPipeError:  # the exit status tells
        _print_nowhere(sys.stderr)


class Ended(KeyboardInterrupt):
    """The system, a scheduler or a closed terminal asks the program to end."""

    def __init__(self, number: int):
        super().__init__(number)
        self.signal = signal.Signals(number)


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """These signals end the work as Ctrl-C does: engines end with it, temporary files go. A second
    one ends the process at once. What the caller has set otherwise (nohup) stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise Ended(number)

    asked = [number for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))]
    ours = [number for number in asked if signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _flushed() -> Iterator[None]:
    """What is printed is out before the exit status is told; a reader may leave before (`head`)."""
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _print_nowhere()


def _open_streams() -> None:
    """What the caller has closed leads nowhere; else the next file to be opened would get the
    number of the output, and what libraries print."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w" if number else "r"))  # noqa: SIM115


def _is_nowhere() -> bool:
    """Whether the current folder is gone, so that no relative path leads anywhere."""
    try:
        os.getcwd()
    except FileNotFoundError:
        return True
    return False


def _print_nowhere(stream: TextIO | None = None) -> None:
    """From now on, on the output; else Python complains of the rest when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())
