"""Where the work runs: `cpu`, `cuda`, `hpu`, and what differs between them."""

import contextlib
import importlib.util
import re
import resource
import sys

import torch

from auto_mmround.errors import UserError


def resolve(name: str) -> torch.device:
    """The device for a name as the command line knows them: "0", "cuda", "cuda:1", "cpu", "hpu", "auto".

    A bare number, the original's default, means that accelerator if the machine has one and the processor otherwise.
    Raises UserError for names it does not know and for devices that are not there.
    """
    if name in ("auto", "0"):
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("hpu" if _has_gaudi() else "cpu")
    if name == "hpu" and not _has_gaudi():
        raise UserError("device hpu: the package habana-frameworks is missing; install it or use --device cpu")
    if name in ("cpu", "hpu"):
        return torch.device(name)
    numbered = re.fullmatch(r"(?:cuda:?)?(\d*)", name)
    if numbered is None:
        raise UserError(f"device {name!r} is unknown: use auto, cpu, hpu, cuda or the number of a CUDA device")
    index, count = int(numbered[1] or 0), torch.cuda.device_count()
    if index >= count:
        raise UserError(f"device {name}: this machine has {count} CUDA devices; use --device cpu")
    return torch.device("cuda", index)


def _has_gaudi() -> bool:
    return importlib.util.find_spec("habana_frameworks") is not None


def autocast(device: torch.device, dtype: torch.dtype, amp: bool) -> contextlib.AbstractContextManager:
    """Compute in bfloat16 where the model is stored wider; a bfloat16 model needs no help.

    Without the cache of cast weights: tuning changes weights in place, and the cache would go on serving old ones.
    """
    if amp and dtype != torch.bfloat16:
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    return contextlib.nullcontext()


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory so far in GB: of the process and, on CUDA, of the device."""
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss counts bytes there, kilobytes on Linux
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9}
    if device.type == "cuda":
        peak["device"] = torch.cuda.max_memory_allocated(device) / 1e9
    return peak
