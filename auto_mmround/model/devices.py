"""Where the work runs: `cpu`, `cuda`, `hpu`, and what differs between them, as one table."""

import contextlib
import ctypes
import importlib
import importlib.util
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.model.products import Float32Products


def _habana(module: str) -> Any:
    """A module of Intel's package for Gaudi, which is optional; importing `core` registers the
    device in torch."""
    return importlib.import_module(f"habana_frameworks.torch.{module}")


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """torch's switch: sums in a fixed order (index_add, scatter, attention backwards ..). An
    operation that has no such kernel goes on with a warning of torch's, unless the caller has asked
    for an error."""
    settings: Any = torch.utils.deterministic
    mode, fills = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode(max(mode, 1))
    settings.fill_uninitialized_memory = False  # nothing here reads what it has not written
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fills


HOST = torch.device("cpu")
DTYPES = {"bfloat16": torch.bfloat16, "bf16": torch.bfloat16, "float16": torch.float16,
          "fp16": torch.float16, "float32": torch.float32, "fp32": torch.float32}  # fmt: skip
BF16 = ("amx_bf16", "bf16", "sve_bf16")  # instructions of x86 and ARM that are always faster
MAYBE_BF16 = "avx512_bf16"  # twice float32's speed on some processors, half of it on others
SIDE, TIMES = 512, 5  # of the products that tell, and how often


def _has_gaudi() -> bool:
    return importlib.util.find_spec("habana_frameworks") is not None


@dataclass(frozen=True)
class Traits:
    """What differs between types of devices.

    backend: of torch.distributed, for tensors there and in host memory. count: devices on this
    machine. synchronize: waits for all work. mark_step: ends a graph that gathers operations
    lazily. name: of the hardware. peak, free: bytes used at most so far, bytes that can be had.
    release: gives memory that is kept for later back. padded: shapes are compiled, so lengths are
    padded to few. doubles: computes in float64. compiler: of torch.compile. compiles: it pays off
    without being asked for. prepare: called before the device is used. repeatable: while open, the
    same work gives the same bits each time, as far as the device has kernels for that; nothing to
    do where it always does, or where nothing is known of it. alone: a process has one, always of
    number 0. absent: why there may be none.
    """

    backend: str
    count: Callable[[], int]
    synchronize: Callable[[torch.device], None] = lambda device: None
    mark_step: Callable[[], None] = lambda: None
    name: Callable[[], str | None] = lambda: None
    peak: Callable[[torch.device], int] | None = None
    free: Callable[[torch.device], int] = lambda device: psutil.virtual_memory().available
    release: Callable[[], None] = lambda: None
    padded: bool = False
    doubles: bool = True
    compiler: str | Callable[..., Any] = "inductor"
    compiles: bool = False
    prepare: Callable[[], Any] = lambda: None
    repeatable: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    alone: bool = False
    absent: str = ""


# A row more is a device more; of the accelerators the first that is there is the one that "auto"
# means.
TABLE: dict[str, Traits] = {
    "cpu": Traits("gloo", lambda: 1, alone=True),
    "cuda": Traits(
        "cpu:gloo,cuda:nccl",
        torch.cuda.device_count,
        torch.cuda.synchronize,
        name=lambda: torch.cuda.get_device_name(),
        peak=torch.cuda.max_memory_allocated,
        free=lambda device: torch.cuda.mem_get_info(device)[0],
        compiles=True,
        repeatable=_deterministic,
        release=torch.cuda.empty_cache,  # does nothing before CUDA is in use
    ),
    "hpu": Traits(
        "cpu:gloo,hpu:hccl",
        lambda: _habana("hpu").device_count() if _has_gaudi() else 0,
        lambda device: _habana("hpu").synchronize(),
        lambda: _habana("core").mark_step(),
        name=lambda: _habana("hpu").get_device_name(),
        peak=lambda device: _habana("hpu").max_memory_allocated(device),
        free=lambda device: _habana("hpu").mem_get_info(device)[0],
        padded=True,
        doubles=False,
        compiler="hpu_backend",
        compiles=True,
        prepare=lambda: [_habana("core"), _habana("distributed.hccl")],
        alone=True,
        absent="the package habana-frameworks is missing; install it or",
    ),
}


def traits(device: torch.device) -> Traits:
    """The device's row of the table; the processor's where its type has none."""
    return TABLE.get(device.type, TABLE["cpu"])


def _accelerator() -> str | None:
    return next(
        (backend for backend, row in TABLE.items() if backend != "cpu" and row.count()), None
    )


def accelerators() -> list[torch.device]:
    """The accelerators of this machine that "auto" means."""
    backend = _accelerator()
    return (
        [torch.device(backend, index) for index in range(TABLE[backend].count())] if backend else []
    )


def accelerator_name() -> str | None:
    """Of the machine's first accelerator; None without one."""
    backend = _accelerator()
    return TABLE[backend].name() if backend else None


def resolve(name: str, local_rank: int | None = None) -> torch.device:
    """The device for a name as the command line knows them: "0", "cuda", "cuda:1", "cpu", "hpu",
    "auto".

    A bare number, the original's default, means that accelerator if the machine has one and the
    processor otherwise.
    local_rank: of several processes on this machine; each takes the accelerator of its number.
    Raises UserError for names it does not know and for devices that are not there.
    """
    if name in ("auto", "0"):
        name = _accelerator() or "cpu"
    numbered = re.fullmatch(rf"(?:({'|'.join(TABLE)}):?)?(\d*)", name)
    backend = numbered and (numbered[1] or _accelerator() or "cuda")
    if numbered is None or backend is None or (TABLE[backend].alone and numbered[2]):
        known = ", ".join(["auto", *sorted(TABLE)])
        raise UserError(f"device {name!r} is unknown: use {known}, or the number of an accelerator")
    row, index = TABLE[backend], int(numbered[2] or 0)
    if row.alone:
        if not row.count():
            raise UserError(f"device {name}: {row.absent} use --device cpu")
        row.prepare()
        return torch.device(backend)
    if local_rank and index:
        raise UserError(
            f"device {name}: with several processes each takes its own; leave --device out"
        )
    index, count = local_rank or index, row.count()
    if index >= count:
        raise UserError(
            f"device {name}: this machine has {count} {backend.upper()} devices; use --device cpu"
        )
    row.prepare()
    return torch.device(backend, index)


@contextlib.contextmanager
def autocast(device: torch.device, dtype: torch.dtype, amp: bool) -> Iterator[None]:
    """While open, models compute in bfloat16 where they are stored wider, if that is faster; a
    bfloat16 model needs no help, but on a processor that is slow in it. Sums are as
    `Traits.repeatable` has them.

    Without the cache of cast weights: tuning changes weights in place, and the cache would go on
    serving old ones.
    """
    narrow = amp and dtype != torch.bfloat16 and fast_bf16(device)
    cast = (
        torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
        if narrow
        else products(device, dtype)
    )
    with traits(device).repeatable(), cast:
        yield


def products(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    """What makes products of this dtype faster without making them other ones: `Float32Products`,
    or nothing."""
    slow = dtype == torch.bfloat16 and not fast_bf16(device)
    return Float32Products() if slow else contextlib.nullcontext()


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype of this name; None for none. Raises UserError for an unknown one."""
    if name is not None and name not in DTYPES:
        raise UserError(f"model_dtype {name!r} is unknown: use one of {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


def fast_bf16(device: torch.device) -> bool:
    """Whether products in bfloat16 are no slower than in float32. A processor without the
    instructions for them takes four times as long; one that has no others than AVX-512's is timed.
    True where torch can't tell."""
    # missing in older releases
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if device.type != "cpu" or not known or any(known.get(name) for name in BF16):
        return True
    return bool(known.get(MAYBE_BF16)) and timed_bf16()


def timed_bf16() -> bool:
    """`fast_bf16` of a processor that has to be timed: once, so that a run stays alike, or what a
    run has found before that goes on now, see `keep_bf16`."""
    if not _KNOWN_BF16:
        _KNOWN_BF16.append(_bf16_keeps_up())
    return _KNOWN_BF16[0]


def keep_bf16(fast: bool) -> None:
    """What `timed_bf16` says from now on."""
    _KNOWN_BF16[:] = [fast]


_KNOWN_BF16: list[bool] = []  # one value, once it is known


def _bf16_keeps_up() -> bool:
    """Whether a product in bfloat16 takes at most a quarter more time here than in float32: the
    quickest of a few, on one core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        float32, bf16 = (
            min(_seconds(torch.ones(SIDE, SIDE, dtype=dtype)) for _ in range(TIMES))
            for dtype in (torch.float32, torch.bfloat16)
        )
    finally:
        torch.set_num_threads(threads)
    return bf16 <= 1.25 * float32


def _seconds(x_SS: Tensor) -> float:
    started = time.thread_time()
    torch.nn.functional.linear(x_SS, x_SS)
    return time.thread_time() - started


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on ``device``; out of host memory by way of pinned pages, so that nobody waits for
    the copy, and the next one can be made ready while the device works."""
    if tensor.is_cpu and device.type not in ("cpu", "meta"):
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on an accelerator, in Python, or on the host, where torch has
    no class for it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(
        error
    )


def _malloc_trim() -> Callable[[int], int]:
    """glibc's; elsewhere what does nothing."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return getattr(library, "malloc_trim", lambda kept: 0)


_trim = _malloc_trim()


def trim_heap() -> None:
    """Give freed host memory back to the system, where the C library is glibc; a matter of
    milliseconds.

    Freed pieces of up to 32 MB stay in glibc's heap, and small tensors between them hold it at
    several times its size.
    """
    _trim(0)


def release_cache() -> None:
    """Give memory that is kept for later back: to the devices, and to the system. Slow where it is
    done often."""
    trim_heap()
    for row in TABLE.values():
        row.release()


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on the device; on the host with the caches that it would give up."""
    return traits(device).free(device)


def peak_memory(device: torch.device) -> dict[str, float]:
    """Peak memory so far in GB: of the process and, on an accelerator, of the device."""
    # ru_maxrss counts bytes there, kilobytes on Linux
    scale = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e9}
    measured = traits(device).peak
    if measured:
        peak["device"] = measured(device) / 1e9
    return peak
