"""What tests ask of the stand-in, asked of a real device."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import chosen_device
import torch

from auto_mmround.model import devices

MODULE = torch.get_device_module(chosen_device.NAME)
ROW = devices.TABLE[chosen_device.NAME]
_before: Counter[int] = Counter()


def counts(device: int = 0) -> tuple[int, int, int, int]:
    """Bytes used, the most of them, the limit (none), and allocations since the peak was
    forgotten."""
    made = MODULE.memory_stats(device).get("allocation.all.allocated", 0)
    used, peak = MODULE.memory_allocated(device), MODULE.max_memory_allocated(device)
    return used, peak, 0, made - _before[device]


def forget_peak(device: int = 0) -> None:
    """Measure from now on."""
    MODULE.reset_peak_memory_stats(device)
    _before[device] += counts(device)[-1]


@contextmanager
def limited(more: int, device: int = 0) -> Iterator[None]:
    """About so many bytes more than now, then torch.OutOfMemoryError."""
    MODULE.empty_cache()
    whole = MODULE.get_device_properties(device).total_memory
    MODULE.set_per_process_memory_fraction((MODULE.memory_reserved(device) + more) / whole, device)
    try:
        yield
    finally:
        MODULE.set_per_process_memory_fraction(1.0, device)
