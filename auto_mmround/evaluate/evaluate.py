"""One evaluation: load the models, run the tasks, keep the record beside the checkpoint."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from auto_mmround.checkpoint.loader import load_any
from auto_mmround.errors import UserError
from auto_mmround.evaluate import tasks
from auto_mmround.evaluate.prompts import Data
from auto_mmround.model import devices
from auto_mmround.model.loading import Loaded
from auto_mmround.report import report
from auto_mmround.run.record import machine

WIDTHS = {torch.bfloat16: "BF16", torch.float16: "FP16", torch.float32: "FP32"}


class HowLoaded(NamedTuple):
    """How models are loaded. stream: read blocks when their turn comes; None: of models that take
    most of the free memory. dtype: as `load` has it, of all models; None: each model's own."""

    device: str = "0"
    remote_code: bool = False
    stream: bool | None = None
    dtype: str | None = None


def evaluate(
    model: str,
    data: Data,
    *,
    reference: str | None = None,
    baseline: str | None = None,
    names: str | None = None,
    way: HowLoaded | None = None,
    progress: Callable[[str, int, int], None] = lambda title, done, total: None,
) -> tuple[tasks.Measured, dict[str, Any]]:
    """What the tasks found, and the record of it.

    names: a comma list; default is ppl, and kl if there is a reference. reference: the model before
    quantization. baseline: another checkpoint to compare with. Raises UserError for unknown tasks,
    models or sets, for sets without a row that a task needs, and for tasks that can't be streamed.
    """
    way = way or HowLoaded()
    with_it = reference is not None
    wanted = tasks.parse(names or ("kl,ppl" if with_it else "ppl"), with_it)
    outside = [name for name in wanted if name not in tasks.TASKS]
    if outside and way.stream:
        raise UserError(f"task {outside[0]} needs the whole model in memory: leave --stream out")
    stream = False if outside else way.stream
    started = time.perf_counter()
    place = devices.resolve(way.device)
    named = {"reference": reference, "baseline": baseline, "quantized": model}
    models = {
        role: load_any(
            name, dtype=way.dtype, device=place, remote_code=way.remote_code, stream=stream
        )
        for role, name in named.items()
        if name is not None
    }
    measured = tasks.run(wanted, tasks.Setting(models, data, progress))
    seconds = time.perf_counter() - started
    return measured, record(measured, named, models, data, wanted, seconds, way.dtype)


def record(
    measured: tasks.Measured,
    names: Mapping[str, str | None],
    models: Mapping[str, Loaded],
    data: Data,
    wanted: Sequence[str],
    seconds: float,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Measured with what they belong to, as plain values. names and models: by role.
    dtype: that was asked for."""
    reference = models.get("reference")
    return {
        "model": names["quantized"],
        "reference": names.get("reference"),
        "baseline": names.get("baseline"),
        "model_dtype": dtype,
        "reference_dtype": WIDTHS.get(reference.model.dtype) if reference else None,
        "dataset": data.dataset,
        "limit": data.limit,
        "language": data.language,
        "tasks": list(wanted),
        "seconds": seconds,
        "machine": machine(),
        **measured.as_dict(),
    }


def keep(folder: Path, made: Mapping[str, Any]) -> Path | None:
    """Store the record in a result of ours and write its report again.

    None for any other folder, or a read-only one.
    """
    if not report.ours(folder):
        return None
    report.keep_evaluation(folder, made)
    return report.write(folder)
