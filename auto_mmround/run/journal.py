"""What a run writes down about itself: `run.json` in every output folder."""

import hashlib
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from auto_mmround import __version__
from auto_mmround.numerics.grids import Codes, dequantize
from auto_mmround.run.pipeline import BlockReport
from auto_mmround.run.plan import Plan

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "datasets", "accelerate")


def checksum(tensor: Tensor) -> str:
    """16 hex digits over dtype, shape and values (row-major, little endian): BLAKE2b of 8 bytes."""
    hashed = hashlib.blake2b(f"{tensor.dtype} {tuple(tensor.shape)}".encode(), digest_size=8)
    hashed.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def codes_record(codes: Codes, decoded: bool = False) -> dict[str, Any]:
    """What a decoded checkpoint must give back for one weight: its scheme, and checksums that no packing changes.

    q and zero are summed as uint8 (out, in) and (out, groups), scale as float32 (out, groups). decoded: the float32
    weight (out, in) too, for formats whose files hold no such codes.
    """
    values = {"q": codes.q_OI.to(torch.uint8), "scale": codes.scale_OG.float(), "zero": codes.zero_OG.to(torch.uint8)}
    if decoded:
        values["weight"] = dequantize(codes)
    scheme = {"bits": codes.bits, "group_size": codes.group_size, "sym": codes.sym}
    return scheme | {name: checksum(tensor) for name, tensor in values.items()}


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
    plan: Plan,
    blocks: Sequence[BlockReport],
    notes: Sequence[str],
    calibration: Mapping[str, Any] | None,
    mixed: Mapping[str, Any] | None = None,
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
        "mixed": mixed,
        "blocks": [{key: value for key, value in report.items() if key not in timing} for report in reports],
        "measured": {
            "seconds": sum(report["seconds"] for report in reports),
            "peak_gb": max((report["peak_gb"] for report in reports), default=0.0),
            "blocks": {report["name"]: {key: report[key] for key in timing} for report in reports},
            "machine": machine(),
        },
    }
