"""What a run writes down about itself: `run.json` in every output folder."""

import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch

from auto_mmround import __version__
from auto_mmround.run.pipeline import BlockReport
from auto_mmround.run.plan import Plan

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "datasets", "accelerate")


def machine() -> dict[str, Any]:
    """The machine and the versions that a measurement belongs to."""
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "packages": {name: metadata.version(name) for name in PACKAGES},
    }


def journal(
    plan: Plan, blocks: Sequence[BlockReport], notes: Sequence[str], calibration: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Everything about a run but its recipe, which lies beside it. Only ``measured`` differs between equal runs."""
    reports = [block.as_dict() for block in blocks]
    timing = ("seconds", "peak_gb")
    return {
        "auto_mmround": __version__,
        "notes": list(notes),
        "calibration": calibration,
        "quantized": len(plan.quantized),
        "kept": plan.kept,
        "bits_per_weight": round(plan.bits_per_weight(), 3),
        "blocks": [{key: value for key, value in report.items() if key not in timing} for report in reports],
        "measured": {
            "seconds": sum(report["seconds"] for report in reports),
            "peak_gb": max((report["peak_gb"] for report in reports), default=0.0),
            "blocks": {report["name"]: {key: report[key] for key in timing} for report in reports},
            "machine": machine(),
        },
    }
