"""What `ask` prints: answers as they come, with their speed; several folders side by side."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from rich.table import Column, Table

from auto_mmround.errors import UserError
from auto_mmround.printing import Telling, console, notices, quiet_libraries, show, show_json
from auto_mmround.run.out_of_memory import phase
from auto_mmround.verify.answers import Answer, Question, Way, ask_folder, check_engine


@phase("answering", "use --device cpu, or a larger machine")
def ask_and_show(flags: argparse.Namespace) -> int:
    """Ask every folder in turn. Raises UserError before the first answer for one that is not there
    or that the engine does not read."""
    quiet_libraries(Telling(quiet=flags.engine is not None))  # weights are not loaded here then
    folders, text = _split(flags.words, bool(flags.audio))
    question = Question(text, flags.image, flags.audio, flags.video, flags.max_tokens)
    for file in (*flags.image, *flags.audio, *flags.video):
        if not Path(file).is_file():
            raise UserError(f"{file} is no file: name a picture, a sound or a film")
    way = Way(flags.engine, flags.device, flags.trust_remote_code, flags.timeout)
    answers = []
    if way.engine:
        check_engine(folders, question, way)
    for folder in folders:
        if flags.json:
            answers.append(ask_folder(folder, question, way))
            continue
        if len(folders) > 1:
            console.print(f"{folder}:", soft_wrap=True)
        answers.append(_aloud(folder, question, way))
        if len(folders) == 1:
            console.print(answers[-1].speed(), style="dim", soft_wrap=True)
    if flags.json:
        show_json([asdict(answer) for answer in answers])
    elif len(answers) > 1:
        show(_side_by_side(answers))
    return 0


def _split(words: Sequence[str], heard: bool) -> tuple[Sequence[str], str]:
    """(folders, question). Raises UserError where one of them is missing."""
    folders, text = words[:-1], words[-1]
    if text == "demo" or Path(text).is_dir():
        folders, text = words, ""
    if not folders:
        raise UserError(f"{text!r} is no folder: name a checkpoint before the question")
    missing = [name for name in folders if name != "demo" and not Path(name).is_dir()]
    if missing:
        raise UserError(f"{missing[0]} is no folder; put the question in quotes, after all folders")
    if not text.strip() and not heard:
        raise UserError(f'a question is missing: ask {folders[-1]} "What do you see?"')
    return folders, text


def _aloud(folder: str, question: Question, way: Way) -> Answer:
    """The answer, printed as it comes. On a terminal a line says what is waited for before."""
    waiting = notices.status(f"loading {Path(folder).name} in {way.engine or 'our loader'}")

    def say(text: str) -> None:
        waiting.stop()
        sys.stdout.write(text)
        sys.stdout.flush()

    with waiting if notices.is_terminal else nullcontext():
        answer = ask_folder(folder, question, way, say)
    say("\n")
    return answer


def _side_by_side(answers: Sequence[Answer]) -> Table:
    columns = (Column(Path(answer.folder).name, overflow="fold") for answer in answers)
    table = Table(*columns, show_lines=True)
    table.add_row(*(answer.text for answer in answers))
    table.add_row(*(answer.speed() for answer in answers))
    return table
