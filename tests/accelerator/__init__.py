"""A strict stand-in accelerator for tests, the device `accel`: built once by the machine's C++
compiler, then loaded.

Tensors of it and of the processor (or of two stand-ins) do not meet; its memory is counted and can
be limited; every launch, wait of the host and copy is told with the line of the project that made
it. See accelerator.cpp. With `pytest --accelerator cuda` the tests run on a real device instead,
see real.py.
"""

import ctypes
import fcntl
import gc
import hashlib
import os
import shutil
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import chosen_device
import pytest
import torch

from auto_mmround.model.devices import Traits

HERE = Path(__file__).parent
SOURCE = HERE / "accelerator.cpp"
TORCH = Path(torch.__file__).parent
HEADERS = (TORCH / "include", TORCH / "include" / "torch" / "csrc" / "api" / "include")
OURS = "accel"
NAME = chosen_device.NAME
GROUP = "host_copies"  # of several processes, see __main__
DEVICES = 2
KINDS = ("launch", "wait", "to host", "to device")
Listener = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_int64)
SILENCE = ctypes.cast(None, Listener)
torch.utils.rename_privateuse1_backend(OURS)  # torch.device(OURS) can be written
# what torch asks: no device, until the library is there and shows some
MODULE = types.ModuleType(f"torch.{OURS}")
vars(MODULE).update(
    is_available=lambda: False, device_count=lambda: 0, _is_in_bad_fork=lambda: False,
    manual_seed_all=lambda seed: None
)  # fmt: skip
torch._register_device_module(OURS, MODULE)


def compiler() -> str | None:
    """The machine's C++ compiler, chosen as by torch.utils.cpp_extension. That one isn't imported:
    it warns of a missing GPU."""
    return shutil.which(os.environ.get("CXX", "c++"))


def build() -> Path:
    """The library, compiled anew (half a minute) where the source, torch or the command is another
    than last time."""
    command = [str(compiler()), "-O1", "-w", "-std=c++20", "-fPIC", "-shared"]
    command += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    command += [f"-isystem{path}" for path in HEADERS]
    libraries = [f"-L{TORCH / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu"]
    text = b"".join(path.read_bytes() for path in sorted([*HERE.glob("*.h"), SOURCE]))
    key = hashlib.sha256(
        text + f"{torch.__version__} {command} {sys.platform}".encode()
    ).hexdigest()[:16]
    made = HERE / "build" / f"{key}.so"
    made.parent.mkdir(exist_ok=True)
    with (made.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # workers of one test run start together
        if not made.exists():
            fresh = made.with_suffix(".partial")
            done = subprocess.run([*command, str(SOURCE), *libraries, "-o", str(fresh)],
                                  capture_output=True, text=True, check=False)  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"the stand-in does not compile: {done.stderr[-3000:]}")
            for old in made.parent.glob("*.so"):
                old.unlink()
            os.replace(fresh, made)
    return made


@cache
def library() -> ctypes.CDLL:
    """The loaded library. torch knows the device from now on, but none is to be seen before
    `shown`."""
    path = build()
    torch.ops.load_library(path)
    made = ctypes.CDLL(str(path))
    made.accel_limit.argtypes = [ctypes.c_int, ctypes.c_int64]
    made.accel_seed.argtypes = [ctypes.c_uint64]
    made.accel_listen.argtypes = [Listener]
    made.accel_register()
    vars(MODULE).update(_answers(made))
    torch.utils.generate_methods_for_privateuse1_backend(
        for_tensor=True, for_module=True, for_storage=False
    )
    return made


def _index(device: object) -> int:
    if isinstance(device, int):
        return device
    found = torch.device(device).index if device is not None else None
    return library().accel_current() if found is None else found


def _answers(made: ctypes.CDLL) -> dict[str, Callable[..., object]]:
    """The functions of `torch.accel`, as far as torch asks for them."""
    return dict(
        is_available=lambda: made.accel_shown() > 0,
        is_initialized=lambda: True,
        _lazy_init=lambda: None,
        _is_in_bad_fork=lambda: False,
        device_count=made.accel_shown,
        current_device=made.accel_current,
        manual_seed=made.accel_seed,
        manual_seed_all=made.accel_seed,
        get_rng_state=lambda device=None: torch.ops.accel.random_state(_index(device)),
        set_rng_state=lambda state, device=None: torch.ops.accel.set_random_state(
            _index(device), state
        ),
        reset_peak_memory_stats=forget_peak,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one device, and how many allocations there were since the peak was forgotten. limit:
    0 means none."""

    used: int
    peak: int
    limit: int
    count: int


def memory(device: object = 0) -> Memory:
    """What one device holds."""
    if NAME != OURS:
        return Memory(*real.counts(_index(device)))
    found = (ctypes.c_int64 * 4)()
    library().accel_memory(_index(device), found)
    return Memory(*found)


def forget_peak(device: object = 0) -> None:
    """Measure from now on."""
    if NAME != OURS:
        return real.forget_peak(_index(device))
    library().accel_forget_peak(_index(device))


@contextmanager
def limited(more: int, device: object = 0) -> Iterator[None]:
    """So many bytes more than now, then torch.OutOfMemoryError."""
    if NAME != OURS:
        with real.limited(more, _index(device)):
            yield
        return
    gc.collect()  # what an earlier test left would make room
    library().accel_limit(_index(device), memory(device).used + more)
    try:
        yield
    finally:
        library().accel_limit(_index(device), 0)


SHAPES, DOUBLES = 1, 2


@contextmanager
def refusing(what: int) -> Iterator[None]:
    """SHAPES: operations whose result's shape depends on values (nonzero, masks as indices) are
    refused meanwhile. DOUBLES: tensors in float64."""
    before = library().accel_refuse(what)
    try:
        yield
    finally:
        library().accel_refuse(before)


@dataclass
class Seen:
    """Counts of (kind, operation, line) of what the device was asked for; lines are those of the
    project."""

    events: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def count(self, kind: str, line: str = "") -> int:
        """Events of a kind, of the files and lines that contain the text."""
        return sum(
            n for (each, _, where), n in self.events.items() if each == kind and line in where
        )


def _line() -> str:
    """File and line of the innermost frame of the project; of a thread without one, that of
    autograd."""
    frame = sys._getframe(1)
    while frame is not None:
        _, mark, rest = frame.f_code.co_filename.rpartition("/auto_mmround/")
        if mark:
            return f"{rest}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


@contextmanager
def watched() -> Iterator[Seen]:
    """What the devices are asked for meanwhile; slow, since the line of each is looked up."""
    seen = Seen()

    def told(kind: int, operation: bytes, size: int) -> None:
        seen.events[KINDS[kind], operation.decode(), _line()] += 1
        seen.bytes[KINDS[kind]] += size

    listener = Listener(told)
    library().accel_listen(listener)
    try:
        yield seen
    finally:
        library().accel_listen(SILENCE)


ROW = Traits(
    backend=f"cpu:gloo,{OURS}:{GROUP}",
    count=lambda: library().accel_shown(),
    synchronize=lambda device: None,
    name=lambda: "a stand-in",
    peak=lambda device: memory(device).peak,
    free=lambda device: (memory(device).limit or 8 << 30) - memory(device).used,
)


@contextmanager
def shown() -> Iterator[None]:
    """The devices are there meanwhile; outside, other tests see a machine without them."""
    if NAME != OURS:
        yield
        return
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    # torch lets a parameter change its device in place only for devices of its own; ours are
    # swapped, ties are kept.
    torch.__future__.set_swap_module_params_on_conversion(True)
    library().accel_show(DEVICES)
    try:
        yield
    finally:
        library().accel_show(0)
        torch.__future__.set_swap_module_params_on_conversion(swaps)


if NAME != OURS:
    from . import real

    ROW = real.ROW
elif compiler():
    # before the first backward pass of the process: then the autograd engine makes its threads
    library()

NEEDED = pytest.mark.skipif(
    NAME == OURS and compiler() is None, reason="no C++ compiler: c++, or what CXX names"
)
STRICT = pytest.mark.skipif(NAME != OURS, reason="asks what only the stand-in knows")
