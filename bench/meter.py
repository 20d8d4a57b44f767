"""What parts of a run take: seconds, and peak memory. For benches, by way of the functions that do
the work."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any


class Meter:
    """Seconds and peak memory by part; parts inside others count there too.

    reset: forgets the peak so far. peak: the most since then. wait: until what was asked of a
    device is done. clock: seconds; `time.process_time` where others share the processor.
    """

    def __init__(
        self,
        reset: Callable[[], None],
        peak: Callable[[], float],
        wait: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}
        self._reset, self._peak, self._wait, self._clock = reset, peak, wait, clock
        self._open: list[str] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Adds what happens meanwhile."""
        self._wait()
        self._note()
        self._reset()
        self._open.append(name)
        started = self._clock()
        try:
            yield
        finally:
            self._wait()
            took = self._clock() - started
            self.seconds[name] = self.seconds.get(name, 0.0) + took
            self._note()
            self._open.pop()

    def _note(self) -> None:
        """Parts around have this peak too: it is forgotten when a part inside begins."""
        for name in self._open:
            self.peaks[name] = max(self.peaks.get(name, 0.0), self._peak())

    @contextmanager
    def watching(self, parts: Mapping[str, tuple[Any, str]]) -> Iterator[None]:
        """Every part is measured whenever it is called. parts: name -> who does it, under what
        name."""
        with ExitStack() as undo:
            for name, (owner, attribute) in parts.items():
                work = getattr(owner, attribute)
                undo.callback(setattr, owner, attribute, work)
                setattr(owner, attribute, self._measured(name, work))
            yield

    def _measured(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any, **named: Any) -> Any:
            with self.part(name):
                return work(*args, **named)

        return measured
