#!/usr/bin/env python3
"""What an accelerator is asked for: launches, waits, copies and operations of a block, by preset.

    bench/counts.py [--methods "auto light" auto "auto best" auto-round] [--keep DIR]

Counted on the stand-in of the tests, on a miniature: Qwen2-VL-7B's language model with 128 samples
of 2,048 tokens, where every width, the words, the tokens and each bound on tokens are a sixteenth,
and bounds on elements a 256th. So each part takes the same share of the operations, and starts the
same kernels. But sweeps round blocks of 128 columns whatever the width: their launches are
multiplied by 16, and their operations, counted with 128 and 64 columns, go on to 8 on a line. The
first table is of one block, from the teacher's pass to its codes in host memory; waits are numbers
and tensors that the host reads, copies go to the device. The second is of 28 layers, from one and
two; auto-round has its default (200 steps) on the same miniature on the processor, from 4 and 8.
The unit of operations is one forward pass of all samples through the blocks.
"""

import importlib
import json
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import kept
import operations
from operations import OURS, PEER

SMALL, DEPTH, SAMPLES = 16, 28, 128
LENGTH = 2048 // SMALL
SHAPE = {"hidden_size": 3584 // SMALL, "intermediate_size": 18944 // SMALL,
         "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064 // SMALL,
         "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
# bounds on tokens, outputs and columns; on elements
BOUNDS = {
    SMALL: (("run.loss_weights", "TEXT_SAMPLE"), ("run.session", "TOKENS"), ("run.layers", "ROWS"),
            ("numerics.moments", "PANEL")),
    SMALL**2: (("numerics.rounding", "CHUNK_THERE"), ("numerics.sweeps", "MOST"),
               ("numerics.start", "MOST"), ("numerics.scale_search", "CHUNK")),
}  # fmt: skip
AT = operations.PARTS.index("solve") + 1
PARTS = (*operations.PARTS[:AT], "sweeps", *operations.PARTS[AT:])
LOOP = ("teacher, student", "moments", "solve", "sweeps", "held out", "steps", "rest")
COUNTS = ("launches", "waits", "copies")
Block = dict[str, Counter[str]]  # part -> what -> how often


@contextmanager
def in_miniature(columns: int) -> Iterator[None]:
    """Every bound as small as the model. columns: that the solve rounds together."""
    from auto_mmround.model.fisher import FisherPasses
    from auto_mmround.numerics import sweeps
    from auto_mmround.run import session

    with ExitStack() as undo:
        for divisor, names in BOUNDS.items():
            for module, name in names:
                owner = importlib.import_module(f"auto_mmround.{module}")
                undo.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, getattr(owner, name) // divisor)
        undo.callback(setattr, sweeps, "BLOCK", sweeps.BLOCK)
        sweeps.BLOCK = columns
        undo.callback(setattr, session, "FisherPasses", FisherPasses)
        enough = FisherPasses.__dataclass_fields__["enough"].default // SMALL
        session.FisherPasses = partial(FisherPasses, enough=enough)  # type: ignore[misc,assignment]
        yield


@contextmanager
def swept(counted: operations.Counted) -> Iterator[None]:
    """The parts of the solve that round columns are counted by themselves; fits of scales, as many
    as there are groups, are not among them."""
    from auto_mmround.numerics.descent import Descent
    from auto_mmround.numerics.sweeps import Sweeping

    with ExitStack() as undo:
        for owner, name, part in (
            (Sweeping, "__call__", "sweeps"),
            (Descent, "__call__", "sweeps"),
            (Descent, "_refit", "solve"),
        ):
            work = getattr(owner, name)
            undo.callback(setattr, owner, name, work)
            setattr(owner, name, counted.named(part, work))
        yield


def worker(job: dict[str, Any]) -> None:
    """Some runs of one method in this process; prints what each asked for, by part."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    print(json.dumps([counted_run(job | run) for run in job["runs"]]))


def counted_run(job: dict[str, Any]) -> Block:
    """What one run asked for. layers: of the model. iters: steps of the peer. columns: that our
    solve rounds together. first_block: count that one alone."""
    import torch

    model, tokenizer = operations.made(job["layers"], SHAPE)
    generator = torch.Generator().manual_seed(1)
    shape = SAMPLES, LENGTH
    rows = torch.randint(SHAPE["vocab_size"], shape, generator=generator)  # type: ignore[call-overload]
    if job["method"] == PEER:
        with operations.counting() as counted:
            operations.by_auto_round(job, model, tokenizer, rows)
        return counted.by_part
    import accelerator

    from auto_mmround import AutoRoundMLLM
    from auto_mmround.model import devices

    devices.TABLE[accelerator.NAME] = accelerator.ROW
    with accelerator.shown(), accelerator.watched() as seen, in_miniature(job["columns"]):

        def asked() -> dict[str, int]:
            waits = seen.count("wait") + seen.count("to host")
            numbers = seen.count("launch"), waits, seen.count("to device")
            return dict(zip(COUNTS, numbers, strict=True))

        with operations.counting(asked) as counted, swept(counted):
            made = AutoRoundMLLM(
                model, tokenizer, dataset=[{"input_ids": row.tolist()} for row in rows],
                nsamples=SAMPLES, seqlen=LENGTH, device=accelerator.NAME, bits=4,
                group_size=128 // SMALL, **OURS[job["method"]],
            )  # fmt: skip
            if job.get("first_block"):
                return block_of(made, counted)
            made.quantize()
    return counted.by_part


class Done(BaseException):
    """The first block is finished."""


def block_of(made: Any, counted: operations.Counted) -> Block:
    """What the first block asks for, from the begin of the loop until it is finished."""
    from auto_mmround.run.pipeline import Watcher
    from auto_mmround.run.session import Session

    marks: list[Block] = []
    walk = Session.walk

    def mark(report: Any = None) -> None:
        with counted.part("rest"):  # so that all before is counted
            marks.append({part: Counter(each) for part, each in counted.by_part.items()})
        if report:
            raise Done

    def marked(*args: Any, **named: Any) -> None:
        mark()
        walk(*args, **named)

    with ExitStack() as undo, suppress(Done):
        undo.callback(setattr, Session, "walk", walk)
        Session.walk = marked  # type: ignore[method-assign]
        made.quantize(Watcher(block=mark))
    before, after = marks
    return {part: after[part] - before.get(part, Counter()) for part in after}


def answers(method: str, *runs: dict[str, int]) -> list[Block]:
    """What a worker counted in each run."""
    base = {"samples": SAMPLES, "length": LENGTH} | kept.scheme(f"W4g{128 // SMALL}")
    found: Any = kept.answer(__file__, base | {"method": method, "runs": runs})
    if "error" in found:
        sys.exit(f"{method}: {found['error']}")
    return [{part: Counter(each.get(part, {})) for part in PARTS} for each in found]


def line(one: Block, two: Block, far: float) -> Block:
    """From ``one`` on, ``far`` times as far as ``two`` is."""
    return {
        part: Counter({
            what: round(one[part][what] + far * (two[part][what] - one[part][what]))
            for what in ("operations", *COUNTS)
        })
        for part in PARTS
    }  # fmt: skip


@cache
def too_many() -> int:
    """Operations of a block's sweeps that come from rounding 128 columns together instead of 8; the
    same for every preset."""
    runs = answers("gptq", *({"layers": 1, "columns": columns} for columns in (128, 64)))
    wide, less = (run["sweeps"]["operations"] for run in runs)
    return (wide - less) * (128 - 128 // SMALL) // (128 - 64)


def of_model(method: str) -> int:
    """Operations of all layers."""
    if method == PEER:
        runs = answers(PEER, *({"layers": n, "iters": i} for n in (1, 2) for i in (4, 8)))
        one, two = (line(four, eight, 196 / 4) for four, eight in (runs[:2], runs[2:]))
    else:
        one, two = answers(method, *({"layers": n, "columns": 128} for n in (1, 2)))
        for layers, block in ((1, one), (2, two)):
            block["sweeps"]["operations"] -= layers * too_many()
    return sum(part["operations"] for part in line(one, two, DEPTH - 1).values())


def of_block(method: str) -> Block:
    """What the block loop asks for in one block."""
    (block,) = answers(method, {"layers": 2, "columns": 128, "first_block": True})
    block["sweeps"]["launches"] *= SMALL
    return block


def main() -> None:
    """Two tables: of a block, and operations of the model."""
    parser = kept.options(__doc__)
    parser.add_argument("--worker", type=json.loads)
    parser.add_argument("--methods", nargs="+", default=["auto light", "auto", "auto best", PEER])
    parser.add_argument("--tables", nargs="+", default=["block", "model"])
    found = parser.parse_args()
    if found.worker:
        worker(found.worker)
        return
    tables: list[object] = []
    if "block" in found.tables:
        tables.append(table := kept.Table("of a block", "method", *LOOP, "together"))
        for method in found.methods:
            block = of_block(method) if method != PEER else {}
            for what in COUNTS if block else ():
                numbers = [block[part][what] for part in LOOP]
                table.add(what, method, *(f"{n:,}" for n in [*numbers, sum(numbers)]))
    if "model" in found.tables:
        unit = operations.forward_pass(SAMPLES, LENGTH, DEPTH, SHAPE)
        whole = {method: of_model(method) for method in found.methods}
        tables.append(table := kept.Table("method", "operations, in passes", "x auto-round"))
        for method, count in whole.items():
            share = f"{count / whole[PEER]:.3f}" if PEER in whole else ""
            table.add(method, f"{count / unit:.2f}", share)
    title = f"What an accelerator is asked for, 7B's shape, {SAMPLES} x 2048 tokens"
    kept.keep(found.keep, "counts", title, *tables, (__doc__ or "").split("\n\n", 2)[2])


if __name__ == "__main__":
    main()
