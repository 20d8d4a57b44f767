"""Where words go: tables and lines that keep their words whole, the log, and how much is said."""

import logging
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType
from rich.logging import RichHandler
from rich.measure import Measurement
from rich.table import Table
from transformers.utils import logging as transformers_logging

from auto_mmround import strict

WIDE = 10_000  # a file has no edge at which lines must break
PADDING = 3  # characters that a column's frame takes


def width_of(terminal: bool) -> int | None:
    """Columns to print in: the terminal's own (None), or no limit in a file."""
    return None if terminal else WIDE


class _Lasting(Console):
    """Where the reader has left (`| head`), nothing more is printed, and the work goes on: its
    results are files. Rich would end the program with status 1, without a word."""

    def on_broken_pipe(self) -> None:
        """Called by rich."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())


# Lines as they are: a path may hold brackets, which are markup to rich, and colons (`:cat:`).
PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
console = _Lasting(width=width_of(sys.stdout.isatty()), **PLAIN)
notices = _Lasting(stderr=True, width=width_of(sys.stderr.isatty()), **PLAIN)


@dataclass(frozen=True)
class Telling:
    """How much is said. json_log: a file that gets one JSON object an event."""

    verbose: bool = False
    quiet: bool = False
    json_log: Path | None = None

    @property
    def level(self) -> int:
        """Of our log."""
        return logging.DEBUG if self.verbose else logging.WARNING if self.quiet else logging.INFO


class _Lines(logging.Handler):
    """A line a record; rich's own handler would fill each up to the width."""

    def emit(self, record: logging.LogRecord) -> None:
        """Called by `logging`."""
        text = f"{record.levelname:<8} {record.getMessage()}"
        notices.print(text, soft_wrap=True)


def quiet_libraries(telling: Telling | None = None) -> None:
    """Our log through rich alone, without bars or advice from the libraries."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    handler = (
        RichHandler(
            console=notices, show_time=False, show_path=False, markup=False, highlighter=None
        )
        if notices.is_terminal
        else _Lines()
    )
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("auto_mmround").setLevel((telling or Telling()).level)


def show(table: Table, to: Console = console) -> None:
    """Print a table with every word whole: columns give way between words only. Where the words
    are wider than the terminal, each row becomes lines of "column: value"."""
    widths = _widths(table, to)
    if widths is None:
        _as_lines(table, to)
        return
    for column, width in zip(table.columns, widths):
        column.width = width
    to.print(table)


def show_json(value: Any) -> None:
    """For programs, on the output, as one JSON value."""
    try:
        print(strict.dumps(value, indent=1), flush=True)
    except BrokenPipeError:
        console.on_broken_pipe()


def _widths(table: Table, to: Console) -> list[int] | None:
    """A width for each column that holds its longest word; None where that does not fit."""
    cells = [[column.header, *column.cells] for column in table.columns]
    spans = [[measured(cell, to) for cell in each] for each in cells]
    least = [max(span.minimum for span in column) for column in spans]
    most = [max(span.maximum for span in column) for column in spans]
    room = to.width - PADDING * len(least) - 1
    if sum(least) > room:
        return None
    widths, left = list(least), room - sum(least)
    # the narrowest wish first, so that short columns stay whole
    for rank, i in enumerate(sorted(range(len(most)), key=lambda i: most[i] - least[i])):
        more = min(most[i] - least[i], left // (len(most) - rank))
        widths[i], left = widths[i] + more, left - more
    return widths


def measured(cell: RenderableType, to: Console) -> Measurement:
    """Its longest word and its longest line."""
    shown = to.render_str(cell) if isinstance(cell, str) else cell
    return Measurement.get(to, to.options.update_width(WIDE), shown)


def _as_lines(table: Table, to: Console) -> None:
    if table.title:
        to.print(str(table.title), highlight=False, markup=False)
    titles = [str(column.header) for column in table.columns]
    for row in zip(*(column.cells for column in table.columns)):
        for i, (title, cell) in enumerate(zip(titles, row)):
            words = f"{'- ' if not i else '  '}{title}: {cell}"
            to.print(words, highlight=False, markup=False, overflow="ignore", crop=False)
