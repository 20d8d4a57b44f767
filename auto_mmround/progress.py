"""What a run tells while it works: a live line a stage on a terminal, a line an event elsewhere,
JSON for programs."""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import IO, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column, Table

from auto_mmround import __version__, strict
from auto_mmround.errors import UserError
from auto_mmround.printing import Telling, notices, show
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.pipeline import Watcher
from auto_mmround.run.plan import Plan
from auto_mmround.run.record import BlockReport

HEARTBEAT = 60.0  # seconds without a word, at most


class Events:
    """One line an event: for people on standard error, for programs in a file of JSON objects."""

    def __init__(self, telling: Telling | None = None, heartbeat: float = HEARTBEAT):
        """Raises UserError for a file that can't be written."""
        self.telling = telling or Telling()
        self.live = notices.is_terminal
        self._heartbeat, self._now = heartbeat, "starting"
        self._began = self._said = time.monotonic()
        self._file: IO[str] | None = None
        self._lock = threading.Lock()
        if self.telling.json_log:
            try:
                self._file = self.telling.json_log.open("w", encoding="utf-8", buffering=1)
            except OSError as error:
                raise UserError(f"json_log: {error.strerror}: {self.telling.json_log}") from None

    def happened(self, event: str, text: str = "", **facts: Any) -> None:
        """text: for people, unless they want quiet; facts: for programs."""
        self._said = time.monotonic()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        if self._file:
            with self._lock:
                self._file.write(strict.dumps({"time": stamp, "event": event, **facts}) + "\n")
        if text and not self.telling.quiet:
            notices.print(text, soft_wrap=True)

    def at(self, what: str, spoken: bool = True) -> None:
        """A part of the run begins. A terminal's live line says it by itself."""
        self._now, self._began = what, time.monotonic()
        self.happened("phase", what if spoken and not self.live else "", phase=what)

    @contextmanager
    def told(self) -> Iterator[None]:
        """From the first event to the last, with a heartbeat between, whatever happens."""
        over = threading.Event()
        beating = threading.Thread(target=self._beat, args=(over,), daemon=True)
        handler = _ToFile(self)
        logging.getLogger("auto_mmround").addHandler(handler)
        beating.start()
        self.happened("start", version=__version__)
        try:
            yield
        except BaseException as error:
            self.happened("failed", error=str(error) or type(error).__name__)
            raise
        finally:
            over.set()
            beating.join()
            logging.getLogger("auto_mmround").removeHandler(handler)
            if self._file:
                self._file.close()

    def _beat(self, over: threading.Event) -> None:
        while not over.wait(max(0.01, self._said + self._heartbeat - time.monotonic())):
            if time.monotonic() - self._said >= self._heartbeat:
                since = time.monotonic() - self._began
                text = f"still {self._now}: {since / 60:.1f} min"
                facts = {"phase": self._now, "seconds": round(since, 1)}
                self.happened("heartbeat", "" if self.live else text, **facts)


class _ToFile(logging.Handler):
    """Our log as events."""

    def __init__(self, events: Events):
        super().__init__()
        self._events = events

    def emit(self, record: logging.LogRecord) -> None:
        """Called by `logging`."""
        self._events.happened("log", level=record.levelname, message=record.getMessage())


class RunProgress:
    """The blocks of a run: a live line a stage with block, loss, time left and memory."""

    def __init__(self, plan: Plan, recipe: Recipe, events: Events | None = None):
        self.events = events or Events()
        self.steps = max(recipe.steps, 1)
        self.total = sum(stage.depth for stage in plan.stages)
        self.reports: list[BlockReport] = []
        self.started = time.perf_counter()
        quiet = self.events.telling.quiet
        live = self.events.live and not quiet
        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(),
            TextColumn("{task.fields[told]}"), console=notices, transient=True,
        )  # fmt: skip
        self.progress: Any = self._bars if live else nullcontext()
        self._stage_of = {block: stage.name for stage in plan.stages for block in stage.blocks}
        self._tasks = {
            stage.name: self._bars.add_task(stage.name, total=stage.depth, told="", start=False)
            for stage in plan.stages
        }

    def watcher(self) -> Watcher:
        """The callbacks for `quantize`."""
        return Watcher(
            captured=self._captured,
            step=self._step,
            block=self._block,
            writing=partial(self.events.at, "writing checkpoints", spoken=False),
        )

    def _captured(self, done: int, total: int) -> None:
        if done <= 1:
            self.events.at(f"capturing inputs of {total} samples")
        for task in self._tasks.values():
            self._bars.update(task, told=f"capturing {done}/{total}")

    def _step(self, block: str, step: int, total: int) -> None:
        if step <= 1:
            self.events.at(f"tuning {block}", spoken=False)
        done = len(self.reports)
        self._line(block, f"step {step}/{total}, {self._left(done + step / max(total, 1))}")

    def _left(self, done: float) -> str:
        """Time to the end, by the mean so far."""
        seconds = (time.perf_counter() - self.started) / max(done, 1e-9) * (self.total - done)
        return f"{seconds / 60:.0f} min left" if seconds > 90 else f"{seconds:.0f} s left"

    def _line(self, block: str, told: str) -> None:
        task = self._tasks.get(self._stage_of.get(block, ""))
        if task is not None:
            name = ".".join(block.split(".")[-2:])
            self._bars.update(task, told=f"{name} {told}")

    def _block(self, report: BlockReport) -> None:
        self.reports.append(report)
        done, change = len(self.reports), "rounded to nearest"
        if report.nearest is not None and report.end is not None:
            change = f"loss {report.nearest:.3e} -> {report.end:.3e}"
        if report.stage in self._tasks:
            self._bars.advance(self._tasks[report.stage])
        self._line(report.name, f"{change}, {self._left(done)}, {report.peak_gb:.1f} GB")
        text = (
            f"{report.name}: {report.weights} weights, {change}, {report.seconds:.1f} s,"
            f" {report.peak_gb:.1f} GB"
        )
        facts = {key: value for key, value in report.as_dict().items() if key != "layers"}
        spoken = not self.events.live or self.events.telling.verbose
        self.events.happened("block", text if spoken else "", done=done, total=self.total, **facts)

    def table(self) -> Table:
        """A row a stage: blocks, weights, mean loss before and after, time and memory."""
        right = [Column(title, justify="right") for title in ("blocks", "weights")]
        table = Table("stage", *right, "mean loss, nearest -> tuned", "seconds", "peak memory")
        for stage in dict.fromkeys(report.stage for report in self.reports):
            rows = [report for report in self.reports if report.stage == stage]
            table.add_row(
                stage,
                str(len(rows)),
                str(sum(row.weights for row in rows)),
                _change(rows),
                f"{sum(row.seconds for row in rows):.1f}",
                f"{max(row.peak_gb for row in rows):.1f} GB",
            )
        return table

    def show_table(self) -> None:
        """The table at the end of a run, on standard error."""
        if self.reports and not self.events.telling.quiet:
            show(self.table(), notices)


def _change(rows: Sequence[BlockReport]) -> str:
    pairs = [
        (row.nearest, row.end) for row in rows if row.nearest is not None and row.end is not None
    ]
    if not pairs:
        return "rounded to nearest"
    before, after = (sum(each) / len(pairs) for each in zip(*pairs))
    return f"{before:.3e} -> {after:.3e}"
