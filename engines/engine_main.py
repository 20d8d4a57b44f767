"""Runs one engine's worker in that engine's interpreter.

    python -P engine_main.py WORKER.py request.json

Standard library only. WORKER.py defines `answer(request) -> dict`. The last line of standard output
is one JSON object, {"ok": true, ..} or {"ok": false, "error": ".."}. Every error of a worker
becomes such an answer, also a failed import.

A worker that answers aloud prints a line {"piece": text or token id} for each piece before that.
"""

import importlib.util
import json
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

LONGEST = 600  # characters of an error


def report_crash(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """An error of the engine is its answer."""
    traceback.print_exception(kind, error, trace)
    text = f"{kind.__name__}: {' '.join(str(error).split())}"
    print(json.dumps({"ok": False, "error": text[:LONGEST]}), flush=True)


def say(piece: str | int) -> None:
    """A part of an answer, at once."""
    print(json.dumps({"piece": piece}), flush=True)


def aloud(tokens: Iterator[int], ends: Sequence[int]) -> dict[str, object]:
    """Say every token as it comes, up to the first of ``ends``; the answer's facts."""
    started, ids = time.perf_counter(), []
    for token in tokens:
        ids.append(token)
        say(token)
        if token in ends:
            break
    return {"answers": [{"ids": ids}], "seconds": time.perf_counter() - started, "ok": True}


def main(worker: str, request: str) -> int:
    sys.excepthook = report_crash
    # behind all else: a worker's second file is found, and none passes for a package
    sys.path.append(str(Path(worker).parent))
    spec = importlib.util.spec_from_file_location(Path(worker).stem, worker)
    assert spec is not None and spec.loader is not None  # a path that ends in .py always has both
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    result = module.answer(json.loads(Path(request).read_text(encoding="utf-8")))
    print(json.dumps(result), flush=True)
    return 0 if result["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
