"""What a run writes down about itself: `run.json` in every output folder."""

import hashlib
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from auto_mmround import __version__
from auto_mmround.export.shards import values_of
from auto_mmround.model import devices
from auto_mmround.numerics.grids import Codes, dequantize
from auto_mmround.numerics.tuner import TunedWeight, TuneResult
from auto_mmround.run.plan import Plan
from auto_mmround.run.polish import Polished

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "datasets", "accelerate")


@dataclass(frozen=True)
class BlockReport:
    """What happened to a block. nearest, start, end: held-out error per element, rounded to
    nearest, at the start of the sign steps (the closed form, if there is one) and at their end; in
    units of the loss, see `fisher`."""

    name: str
    stage: str
    weights: int
    nearest: float | None
    start: float | None
    end: float | None
    best_iter: int
    seconds: float
    peak_gb: float
    # share lost of each output, `LayerErrors`
    layers: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    steps_seconds: float = 0.0  # of ``seconds``, the sign steps
    # weights that no calibration token met (experts): their scales are searched, nothing is tuned
    unreached: int = 0

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def block_report(
    device: torch.device,
    name: str,
    stage: str,
    tuned: Mapping[str, TunedWeight],
    result: TuneResult | None,
    started: float,
    nearest: float | None = None,
) -> BlockReport:
    """What happened to a block whose work began at ``started`` (`time.perf_counter`) and ends now.
    result: None for weights that were rounded to nearest."""
    devices.traits(device).synchronize(device)
    return BlockReport(
        name=name,
        stage=stage,
        weights=len(tuned),
        nearest=nearest if nearest is not None or not result else result.start,
        start=result.start if result else None,
        end=result.end if result else None,
        best_iter=result.best_iter if result else 0,
        seconds=time.perf_counter() - started,
        steps_seconds=result.seconds if result else 0.0,
        peak_gb=max(devices.peak_memory(device).values()),
    )


def checksum(tensor: Tensor) -> str:
    """16 hex digits over dtype, shape and values (row-major, little endian): BLAKE2b of 8 bytes."""
    hashed = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=8)
    hashed.update(values_of(tensor))
    return hashed.hexdigest()


def codes_record(codes: Codes, decoded: bool = False) -> dict[str, Any]:
    """The facts that a decoded checkpoint must give back for one weight: its scheme, and checksums
    that no packing changes.

    q and zero are summed as uint8 (out, in) and (out, groups), scale as float32 (out, groups), and
    what a weight has one of, global_scale and input_scale, as float32 (1,). decoded: the float32
    weight (out, in) too, its zeros positive, for formats whose files hold no such codes.
    """
    values = {
        "q": codes.q_OI.to(torch.uint8),
        "scale": codes.scale_OG.float(),
        "zero": codes.zero_OG.to(torch.uint8),
    }
    for name in ("global_scale", "input_scale"):
        if (whole := getattr(codes, name)) is not None:
            values[name] = whole.float()
    if decoded:
        values["weight"] = dequantize(codes) + 0.0  # readers differ in the sign of zero
    scheme = {"bits": codes.bits, "group_size": codes.group_size, "sym": codes.sym}
    return scheme | {name: checksum(tensor) for name, tensor in values.items()}


def machine() -> dict[str, Any]:
    """The machine and the versions that a measurement belongs to."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "accelerator": devices.accelerator_name(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def run_record(
    plan: Plan,
    blocks: Sequence[BlockReport],
    notes: Sequence[str],
    calibration: Mapping[str, Any] | None,
    mixed: Mapping[str, Any] | None = None,
    polished: Polished | None = None,
) -> dict[str, Any]:
    """Everything about a run but its recipe, which lies beside it. Equal runs differ
    under "measured" alone."""
    reports = [block.as_dict() for block in blocks]
    timing = ("seconds", "steps_seconds", "peak_gb")
    return {
        "auto_mmround": __version__,
        "notes": list(notes),
        "calibration": calibration,
        "quantized": sum(1 for weight in plan.all if weight.scheme),
        "kept": {weight.name: weight.reason for weight in plan.all if weight.reason},
        "bits_per_weight": round(plan.bits_per_weight(), 3),
        "mixed": mixed,
        "polish": {"before": polished.before, "after": polished.after} if polished else None,
        "blocks": [
            {key: value for key, value in report.items() if key not in timing} for report in reports
        ],
        "measured": {
            "seconds": sum(report["seconds"] for report in reports),
            "peak_gb": max((report["peak_gb"] for report in reports), default=0.0),
            "blocks": {report["name"]: {key: report[key] for key in timing} for report in reports},
            "machine": machine(),
        },
    }
