#!/usr/bin/env python3
"""What an accelerator makes of the project, in one command of at most nine minutes, offline.

    bench/accelerator.py [--device cuda] [--minutes 9] [--keep DIR] [--parts tests speed reading]

tests: tests/test_accelerator.py on the real device. speed: language models of the shapes of
Qwen2-VL-2B and 7B with random weights, two layers and all, by part of the run; beside auto-round,
where that can be imported, on the same blocks. reading: exported checkpoints through the reader, on
the device and on the processor. Prints Markdown; with --keep, writes it and JSON to dated files.
What the time does not suffice for is named as left out.
"""

import argparse
import datetime
import importlib.util
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from meter import Meter
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.checkpoint.loader import load_any
from auto_mmround.errors import UserError
from auto_mmround.evaluate.held_out import held_out
from auto_mmround.evaluate.metrics import logits_of
from auto_mmround.model import devices
from auto_mmround.model.chains import Chain, difference
from auto_mmround.model.loading import load
from auto_mmround.numerics import start
from auto_mmround.numerics.moments import PANEL
from auto_mmround.numerics.tuner import held_out_split, looked_at
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run import job as jobs
from auto_mmround.run import pipeline
from auto_mmround.run.finished import Finished
from auto_mmround.run.loss_weights import samples_a_step
from auto_mmround.run.plan import make_plan
from auto_mmround.run.session import Session

ROOT = Path(__file__).parents[1]
SHAPES: dict[str, dict[str, int]] = {
    "2B": dict(hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
               num_key_value_heads=2, num_hidden_layers=28, vocab_size=151936),
    "7B": dict(hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
               num_key_value_heads=4, num_hidden_layers=28, vocab_size=152064),
    "tiny": dict(hidden_size=64, intermediate_size=96, num_attention_heads=2,
                 num_key_value_heads=1, num_hidden_layers=3, vocab_size=300),
}  # fmt: skip
PRESETS = {"light": "light", "auto": "default", "best": "best"}
# (shape, samples, tokens, preset, layers or None for all), the most telling first
RUNS = [
    ("7B", 128, 2048, "auto", 2),
    ("7B", 128, 2048, "light", 2),
    ("7B", 128, 512, "auto", 2),
    ("2B", 128, 512, "auto", 2),
    ("2B", 128, 2048, "auto", 2),
    ("7B", 128, 2048, "best", 2),
    ("7B", 128, 512, "light", 2),
    ("7B", 128, 512, "best", 2),
    ("2B", 128, 2048, "light", 2),
    ("2B", 128, 2048, "best", 2),
    ("2B", 128, 512, "light", 2),
    ("2B", 128, 512, "best", 2),
    ("2B", 128, 512, "auto", None),
    ("7B", 128, 512, "auto", None),
]
TINY = [("tiny", 8, 16, preset, 2) for preset in PRESETS] + [("tiny", 8, 16, "auto", None)]
# part -> who does it, under what name
PARTS: dict[str, tuple[Any, str]] = {
    "capture": (Session, "record"),
    "Fisher": (Session, "fisher"),
    "passes": (Chain, "advanced"),
    "moments": (Session, "moments"),
    "solve": (start, "closed_forms"),
    "steps": (pipeline, "tune_block"),
}
FORMATS = "auto_round,auto_gptq,auto_awq,compressed_tensors,mlx"
# dense bf16 operations a second, by data sheets
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "GAUDI2": 432e12}
NEAR = 0.05  # of the logits: the device computes in bfloat16 or float16, the processor in float32

Progress = Callable[[str], None]


# --------------------------------------------------------------------------------------------------
# speed


def meter_of(device: torch.device) -> Meter:
    """Peaks in GB of the device."""
    traits, module = devices.traits(device), torch.get_device_module(device)
    peak = traits.peak
    return Meter(
        partial(getattr(module, "reset_peak_memory_stats", lambda device: None), device),
        (lambda: peak(device) / 1e9) if peak else (lambda: 0.0),
        lambda: traits.synchronize(device),
    )


def model_of(shape: Mapping[str, int], layers: int | None, device: torch.device) -> Any:
    """A language model with random weights, made on the device."""
    config = Qwen2Config(**{**shape, **({"num_hidden_layers": layers} if layers else {})})
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16)
    return model.to(device).eval().requires_grad_(False)


def rows_of(words: int, samples: int, tokens: int) -> torch.Tensor:
    """Random ids, (samples, tokens)."""
    draw = torch.Generator().manual_seed(0)
    return torch.randint(3, words, (samples, tokens), generator=draw)


def inputs_of(rows_ST: torch.Tensor) -> list[ModelInput]:
    """The rows as calibration samples."""
    text_T = torch.zeros(rows_ST.shape[1], dtype=torch.int8)
    return [
        ModelInput(str(i), {"input_ids": row_T[None]}, text_T, torch.ones_like(text_T).bool())
        for i, row_T in enumerate(rows_ST)
    ]


def operations(
    shape: Mapping[str, int], recipe: Recipe, tokens: int, session: Session, blocks: int
) -> dict[str, float]:
    """By part of the block loop: products with the weights, attention, second moments; three times
    where gradients are taken, but for q, k and v, whose input needs none. The solve's are left
    out."""
    width, hidden = shape["hidden_size"], shape["intermediate_size"]
    narrow = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    weights = 2 * width * width + 2 * width * narrow + 3 * width * hidden
    one = tokens * (2.0 * weights + 4.0 * tokens * width)  # of a sample through a block
    first = 2.0 * tokens * width * (width + 2 * narrow)  # q, k, v
    squares = 2.0 * tokens * (3 * products(width) + products(hidden))  # q, o, gate, down read these
    looks = 1 + sum(looked_at(step, recipe.steps) for step in range(1, recipe.steps + 1))
    held_out = len(held_out_split(len(session.used))[1])
    each = samples_a_step(recipe, tokens)
    return {
        "passes": one * len(session.used) * (2 * blocks - 1),  # the last block's student gives none
        "moments": (one + squares) * len(session.sampled) * blocks,
        "steps": ((3 * one - first) * each * recipe.steps + one * held_out * looks) * blocks,
    }


def products(columns: int) -> int:
    """Numbers that a token adds up in second moments: panels on and above the diagonal."""
    return sum(min(PANEL, columns - i) * (columns - i) for i in range(0, columns, PANEL))


def rate(device: torch.device, size: int) -> float:
    """Operations a second of bf16 products of so many rows and columns; the best of ten."""
    a, found = torch.randn(size, size, device=device).bfloat16(), []
    for _ in range(12):
        meter = meter_of(device)
        with meter.part(""):
            torch.mm(a, a)
        found.append(2 * size**3 / meter.seconds[""])
    return max(found[2:])


def ours(
    shape: str, samples: int, tokens: int, preset: str, layers: int | None, device: torch.device
) -> dict[str, Any]:
    """One run of ours."""
    sizes = SHAPES[shape]
    group = 128 if sizes["hidden_size"] % 128 == 0 else 32
    recipe = Recipe(preset=PRESETS[preset], nsamples=samples, seqlen=tokens, group_size=group)
    model = model_of(sizes, layers, device)
    plan, meter = make_plan(model, recipe), meter_of(device)
    inputs, finished = inputs_of(rows_of(sizes["vocab_size"], samples, tokens)), Finished()
    started = time.perf_counter()
    with meter.watching(PARTS):
        pipeline.quantize(model, recipe, plan, inputs, finished)
    devices.traits(device).synchronize(device)
    took, count = time.perf_counter() - started, len(finished.reports)
    work = operations(sizes, recipe, tokens, Session(model, recipe, plan, inputs), count)
    loop = sum(meter.seconds[part] for part in (*work, "solve"))
    return {
        "seconds": took,
        "parts": meter.seconds,
        "peaks": meter.peaks,
        "peak_gb": max(meter.peaks.values()),
        "operations": work,
        "rate": work["steps"] / meter.seconds["steps"],
        "loop_rate": sum(work.values()) / loop,
        "better": all(r.end <= r.nearest for r in finished.reports.values()),
    }


def peers(shape: str, samples: int, tokens: int, layers: int | None, device: torch.device) -> Any:
    """auto-round with its defaults on the same blocks; None where it is not there."""
    if importlib.util.find_spec("auto_round") is None:
        return None
    from auto_round import AutoRound

    words = {f"w{i}": i for i in range(SHAPES[shape]["vocab_size"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w3")), pad_token="w0"
    )
    rows_ST = rows_of(SHAPES[shape]["vocab_size"], samples, tokens)
    model, meter = model_of(SHAPES[shape], layers, torch.device("cpu")), meter_of(device)
    with meter.part("all"):
        AutoRound(
            model, tokenizer, dataset=[row[None] for row in rows_ST], nsamples=samples,
            seqlen=tokens, device_map=str(device),
        ).quantize()  # fmt: skip
    return {"seconds": meter.seconds["all"], "peak_gb": meter.peaks["all"]}


def speed(
    runs: Sequence[tuple[str, int, int, str, int | None]],
    device: torch.device,
    deadline: float,
    say: Progress,
) -> list[dict[str, Any]]:
    """Every run that the time suffices for, by the time of those before it; all layers take as many
    times longer."""
    found: list[dict[str, Any]] = []
    spent: dict[tuple[str, int, str], float] = {}
    peer: dict[tuple[str, int, int | None], Any] = {}
    for shape, samples, tokens, preset, layers in runs:
        row: dict[str, Any] = dict(
            shape=shape, samples=samples, tokens=tokens, preset=preset, layers=layers or "all"
        )
        known = spent.get((shape, tokens, preset), 0.0)
        needed = known * (1.2 if layers else SHAPES[shape]["num_hidden_layers"] / 2)
        if time.monotonic() + needed > deadline:
            row["left_out"] = "no time"
        else:
            say(f"{shape}, {samples} x {tokens}, {preset}, {layers or 'all'} layers")
            started = time.monotonic()
            try:
                row |= ours(shape, samples, tokens, preset, layers, device)
            except UserError as error:
                row["left_out"] = str(error)
            devices.release_cache()
            spent[shape, tokens, preset] = time.monotonic() - started
            key = shape, tokens, layers
            if key not in peer and "seconds" in row and time.monotonic() + 60 < deadline:
                peer[key] = peers(shape, samples, tokens, layers, device)
                devices.release_cache()
            row["auto_round"] = peer.get(key)
        found.append(row)
    return found


# --------------------------------------------------------------------------------------------------
# tests, and what is read back


def tested(device: torch.device, seconds: float) -> dict[str, Any]:
    """How many tests of the accelerator pass on the device."""
    command = [sys.executable, "-m", "pytest", "tests/test_accelerator.py", "-q", "-m", "not slow"]
    command += ["--accelerator", device.type, "-p", "no:cacheprovider", "--tb", "line"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=seconds
        )
        said = done.stdout
    except subprocess.TimeoutExpired as stopped:
        said = (stopped.stdout or b"").decode() + "\nstopped: no time"
    lines = said.strip().splitlines()
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped)", lines[-1])}
    return counts | {"said": [line for line in lines[-20:] if "FAILED" in line or "stopp" in line]}


def read_back(device: torch.device) -> dict[str, Any]:
    """Format -> largest relative difference of the logits of an exported checkpoint, read on the
    device and on the processor."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Recipe(
            model="demo", dataset="demo", iters=2, nsamples=8, seqlen=32, group_size=64,
            device=str(device), format=FORMATS, output_dir=scratch,
        )  # fmt: skip
        job = jobs.prepare(recipe, jobs.load_model(recipe))
        samples = held_out(load("demo"), "demo", limit=1)
        for name, folder in zip(recipe.formats, jobs.run(job), strict=True):
            logits = []
            for place in (device, devices.HOST):
                model = load_any(str(folder), device=place).model
                logits.append([logits_of(model, sample.kwargs).cpu() for sample in samples])
            gaps = [difference(here, there) for here, there in zip(*logits, strict=True)]
            found[name] = {"difference": max(gaps), "right": max(gaps) <= NEAR}
    return found


# --------------------------------------------------------------------------------------------------
# what is printed


def peak_of(name: str) -> float | None:
    """bf16 operations a second by the data sheet; None for a card that is not in `PEAKS`."""
    words = re.split(r"[ -]", name.upper())
    return next((peak for card, peak in PEAKS.items() if card in words), None)


def table(record: Mapping[str, Any]) -> str:
    """The record as Markdown."""
    head = ["shape", "tokens", "layers", "preset", "seconds", *PARTS, "peak GB", "TFLOP, loop",
            "TFLOP/s, steps", "TFLOP/s, loop", "of matmul", "of peak", "auto-round s", "GB",
            "ratio"]  # fmt: skip
    peak = peak_of(record["device"])
    lines = [f"{record['device']}, torch {record['torch']}, transformers {record['transformers']}"]
    lines += ["", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for row in record.get("speed", []):
        cells = [row["shape"], f"{row['samples']} x {row['tokens']}", row["layers"], row["preset"]]
        if "seconds" not in row:
            cells += [f"left out: {row['left_out']}", *[""] * (len(head) - 5)]
        else:
            peer = row.get("auto_round") or {}
            cells += [f"{row['seconds']:.2f}"]
            cells += [f"{row['parts'].get(part, 0.0):.2f}" for part in PARTS]
            cells += [f"{row['peak_gb']:.2f}", f"{sum(row['operations'].values()) / 1e12:.3g}"]
            cells += [f"{row[key] / 1e12:.3g}" for key in ("rate", "loop_rate")]
            cells += [f"{row['loop_rate'] / record['matmul']:.0%}"]
            cells += [f"{row['loop_rate'] / peak:.0%}" if peak else "-"]
            cells += [f"{peer[key]:.2f}" if peer else "-" for key in ("seconds", "peak_gb")]
            cells += [f"{row['seconds'] / peer['seconds']:.3f}" if peer else "-"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    if "tests" in record:
        counts = {key: value for key, value in record["tests"].items() if key != "said"}
        lines += ["", f"tests on the device: {counts}", *record["tests"]["said"]]
    for name, read in record.get("reading", {}).items():
        verdict = "right" if read["right"] else "WRONG"
        lines += ["", f"{name} read back on the device: {verdict} ({read['difference']:.2g})"]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if nothing was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--keep", type=Path, help="folder for the table and the JSON")
    parts = ("tests", "speed", "reading")
    parser.add_argument("--parts", nargs="+", default=parts, choices=parts)
    parser.add_argument("--tiny", action="store_true", help="shapes of a few channels")
    given = parser.parse_args(arguments)
    deadline = time.monotonic() + 60 * given.minutes - 20
    device = devices.resolve(given.device)
    record: dict[str, Any] = {
        "device": devices.accelerator_name() or platform.processor() or device.type,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "matmul": rate(device, 256 if given.tiny else 8192),
    }
    say: Progress = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    if "reading" in given.parts:
        record["reading"] = read_back(device)
    if "tests" in given.parts:
        say("tests")
        record["tests"] = tested(device, max(30.0, 0.35 * (deadline - time.monotonic())))
    if "speed" in given.parts:
        record["speed"] = speed(TINY if given.tiny else RUNS, device, deadline, say)
    print(table(record))
    if given.keep:
        given.keep.mkdir(parents=True, exist_ok=True)
        file = given.keep / f"accelerator-{datetime.date.today()}"
        file.with_suffix(".json").write_text(json.dumps(record, indent=1))
        file.with_suffix(".md").write_text(table(record) + "\n")
    wrong = record.get("tests", {}).get("failed", 0) or not all(
        read["right"] for read in record.get("reading", {}).values()
    )
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
