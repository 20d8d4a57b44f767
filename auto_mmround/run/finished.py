"""Finished blocks: in memory, or in a folder that outlives the process, from which the same command
continues.

The folder `<model>-w4g128.unfinished` lies beside the checkpoints to be. A part file holds the
codes of blocks that were tuned together; the journal gets a line for it once the file is safe. A
line starts with its own checksum and holds that of its part. So damage by a crash, a full disk or a
bad sector is seen, and work goes on from the last block that is whole.
"""

import json
import logging
import os
import tempfile
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from auto_mmround import __version__, strict
from auto_mmround.atomic import FULL, held, write_whole
from auto_mmround.calibration.inputs import ModelInput
from auto_mmround.checkpoint.sums import content_sum, file_sum
from auto_mmround.errors import UserError
from auto_mmround.export.packing import pack_bits, unpack_bits
from auto_mmround.lazy import Lazy
from auto_mmround.model import devices
from auto_mmround.model.spool import Spool
from auto_mmround.numerics.grids import Codes
from auto_mmround.recipe.recipe import Recipe
from auto_mmround.run.polish import Polished
from auto_mmround.run.processes import ALONE, Processes
from auto_mmround.run.record import BlockReport, checksum
from auto_mmround.untrusted import weight_files

log = logging.getLogger("auto_mmround")

JOURNAL = "journal"
# tensors of `Codes`, where there are any
EXTRAS = ("global_scale", "input_scale", "min_OG", "unit_OS2")
# How the journal's first line tells `devices.fast_bf16`: taken over, not compared.
PRODUCTS = "fast bfloat16 products"
# Where a run may go on under another value: the result does not depend on it, or the files
# themselves are compared.
FREE = {
    "model", "output_dir", "overwrite", "restart", "check", "sample_generation",
    "low_gpu_mem_usage", "stream", "offload_states", "low_cpu_mem_mode", "low_cpu_mem_usage",
    "low_cpu_mem_tmp_dir",
}  # fmt: skip


class Finished:
    """Reports and codes of the blocks that are done, in memory. spool: takes what should not stay
    there."""

    def __init__(self, scratch: Path | None = None) -> None:
        self.reports: dict[str, BlockReport] = {}
        self.codes: Mapping[str, Codes] = {}
        # of the whole model, at the end; never kept, it is found again
        self.polished: Polished | None = None
        self.kv_scales: Mapping[str, Tensor] = {}
        self.spool = Spool(scratch or Path(tempfile.gettempdir()))

    def has(self, blocks: Sequence[str]) -> bool:
        """Whether these blocks are all done."""
        return all(block in self.reports for block in blocks)

    @property
    def result(self) -> Mapping[str, Codes]:
        """What goes into checkpoints."""
        return ChainMap(dict(self.polished.codes), self.codes) if self.polished else self.codes  # type: ignore[arg-type]

    def in_memory(self) -> "Finished":
        """The same without any file."""
        copy = Finished()
        copy.reports, copy.codes = dict(self.reports), dict(self.codes)
        copy.polished, copy.kv_scales = self.polished, self.kv_scales
        return copy

    def add(self, reports: Sequence[BlockReport], codes: Mapping[str, Codes]) -> None:
        """Keep what belongs to blocks that were tuned together."""
        self.codes = {**self.codes, **codes}
        self.reports |= {report.name: report for report in reports}


class Unfinished(Finished):
    """The same in a folder. Open it with `unfinished`."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]):
        super().__init__(folder)
        self.folder, self.identity = folder, dict(identity)
        self.codes: Parts = Parts()
        self.run = content_sum(json.dumps(self.identity, sort_keys=True).encode())
        self._journal = folder / JOURNAL
        lines = _valid_lines(self._journal)
        if lines:
            self._check(lines[0])
        else:
            first = self.identity | {PRODUCTS: devices.fast_bf16(devices.HOST)}
            write_whole(self._journal, _line(first))
        for number, line in enumerate(lines[1:]):
            path = folder / line["part"]
            if not path.is_file() or file_sum(path) != line["sum"]:
                log.warning("%s: %s is damaged, going on from the block before", folder, path.name)
                lines = lines[: number + 1]
                break
            self._take(path, [BlockReport(**report) for report in line["reports"]])
        if lines:
            write_whole(self._journal, b"".join(map(_line, lines)))

    def add(self, reports: Sequence[BlockReport], codes: Mapping[str, Codes]) -> None:
        """Write a part, then its line; both are on the disk on return."""
        path = self.folder / f"{len(self.codes.files):05d}.safetensors"
        write_whole(path, _encode(codes))
        line = {
            "part": path.name,
            "sum": file_sum(path),
            "reports": [asdict(report) for report in reports],
        }
        with self._journal.open("ab") as journal:
            journal.write(_line(line))
            journal.flush()
            os.fsync(journal.fileno())
        self._take(path, reports)

    def wrote(self, out: Path, checked: bool = False) -> bool:
        """Whether the checkpoint at ``out`` is this run's already; checked: and proved."""
        try:
            record = json.loads((out / "run.json").read_text())
            return (
                bool(self.reports)
                and record["run"] == self.run
                and (not checked or record["checked"])
            )
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _take(self, path: Path, reports: Sequence[BlockReport]) -> None:
        self.codes.read(path)
        self.reports |= {report.name: report for report in reports}

    def _check(self, before: Mapping[str, Any]) -> None:
        for key in dict.fromkeys([*self.identity, *before]):
            old, new = before.get(key), self.identity.get(key)
            if old != new and key != PRODUCTS:
                raise UserError(
                    f"{self.folder} holds an unfinished run with another {key} ({old!r}, now"
                    f" {new!r}): give the same command to continue it, or --restart to begin anew"
                )


@contextmanager
def unfinished(
    folder: Path, identity: Mapping[str, Any], restart: bool = False
) -> Iterator[Unfinished]:
    """The folder of a run: made, or found with what an earlier process finished; removed at the
    end.

    Where the work is cut off it stays, unless nothing was finished. Raises UserError if it belongs
    to a run that would give something else, if another process works in it, and, naming the folder,
    if the disk is full.
    """
    made = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder) as ours:
        if not ours:
            raise UserError(f"{folder}: another process is at work on this run")
        if restart:
            _empty(folder)
        run = Unfinished(folder, identity)
        if run.reports:
            log.warning("continuing: %d blocks are finished in %s", len(run.reports), folder)
        try:
            yield run
        except BaseException as error:
            if not run.reports:
                _remove(folder, made)
            if isinstance(error, OSError) and error.errno in FULL:
                text = (
                    f"{folder.parent}: {error.strerror}; make room and give the same command again"
                )
                raise UserError(text) from None
            raise
        _remove(folder, made)


def compute_alike(place: Path, restart: bool = False, processes: Processes = ALONE) -> None:
    """From now on products of bfloat16 are made as by the run that is unfinished in ``place``, in
    all processes as in the first. Before anything is computed: what is timed (`devices.timed_bf16`)
    may come out otherwise the second time, and then so do the last bits."""
    lines = [] if restart else _valid_lines(place / JOURNAL)
    kept = lines[0].get(PRODUCTS) if lines else None
    if kept is not None:
        devices.keep_bf16(kept)
    devices.keep_bf16(processes.gather(devices.fast_bf16(devices.HOST))[0])


def identity(
    recipe: Recipe, config: str, source: Path | None, inputs: Sequence[ModelInput]
) -> dict[str, Any]:
    """What a result depends on, as plain values by name: recipe, configuration (JSON), model files
    and code, samples."""
    facts: dict[str, Any] = {"auto_mmround": __version__}
    facts |= {key: value for key, value in asdict(recipe).items() if key not in FREE}
    facts["config.json"] = content_sum(config.encode())
    for path in weight_files(source) if source else ():
        status = path.stat()
        facts[path.name] = [status.st_size, status.st_mtime_ns]
    if source and recipe.trust_remote_code:
        facts |= {path.name: file_sum(path) for path in sorted(source.glob("*.py"))}
    facts["calibration samples"] = _sum_of(
        [sample.kwargs | {"kind": sample.modality_T} for sample in inputs]
    )
    plain: dict[str, Any] = json.loads(json.dumps(facts))
    return plain


def weights_sum(model: nn.Module) -> str:
    """A checksum of all that a model in memory holds."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return _sum_of(state)


class Parts(Lazy[tuple[str, Path, dict[str, Any]], Codes]):
    """Codes by weight name, read from part files when they are asked for."""

    def __init__(self) -> None:
        self.files: list[Path] = []
        # name, file, scheme and columns
        self._where: dict[str, tuple[str, Path, dict[str, Any]]] = {}
        super().__init__(self._where, self._codes)
        self._open: tuple[Path, Any] | None = None  # the file that was asked last

    def read(self, path: Path) -> None:
        """Take up a part file's weights."""
        with safe_open(path, "pt") as file:
            self._where |= {name: (name, path, facts) for name, facts in _facts(file).items()}
        self.files.append(path)

    def _codes(self, where: tuple[str, Path, dict[str, Any]]) -> Codes:
        name, path, facts = where
        if self._open is None or self._open[0] != path:
            file = safe_open(path, "pt")
            self._open = path, (file, set(file.keys()))
        file, keys = self._open[1]
        facts = dict(facts)
        columns = facts.pop("columns")
        parts = {part: file.get_tensor(f"{name}.{part}").clone() for part in ("q", "scale", "zero")}
        facts |= {
            part: file.get_tensor(key).clone()
            for part in EXTRAS
            if (key := f"{name}.{part}") in keys
        }
        q_OI = unpack_bits(parts["q"], facts["bits"], columns)
        return Codes(q_OI, parts["scale"], parts["zero"], **facts)


def _encode(codes: Mapping[str, Codes]) -> bytes:
    """A safetensors file of codes, packed densely."""
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for name, weight in codes.items():
        values = weight._asdict()
        q_OI, extras = values.pop("q_OI"), {part: values.pop(part) for part in EXTRAS}
        tensors[f"{name}.q"] = pack_bits(q_OI, weight.bits)
        tensors |= {
            f"{name}.{part}": values.pop(f"{part}_OG").contiguous() for part in ("scale", "zero")
        }
        tensors |= {f"{name}.{part}": extra for part, extra in extras.items() if extra is not None}
        facts[name] = values | {"columns": q_OI.shape[1]}
    return save(tensors, metadata={"weights": json.dumps(facts)})


def _facts(file: Any) -> dict[str, dict[str, Any]]:
    """Weight name -> scheme and columns, in the order in which they were written."""
    facts: dict[str, dict[str, Any]] = json.loads(file.metadata()["weights"])
    return facts


def _line(value: Mapping[str, Any]) -> bytes:
    text = strict.dumps(value).encode()
    return content_sum(text).encode() + b" " + text + b"\n"


def _valid_lines(path: Path) -> list[dict[str, Any]]:
    """The journal's lines up to the first that is damaged."""
    lines = []
    for raw in path.read_bytes().split(b"\n")[:-1] if path.is_file() else ():
        mark, _, text = raw.partition(b" ")
        if mark != content_sum(text).encode():
            break
        lines.append(json.loads(text))
    return lines


def _sum_of(value: Any) -> str:
    """A checksum of nested mappings and lists of tensors and plain values."""
    if isinstance(value, Tensor):
        return checksum(value)
    if isinstance(value, Mapping):
        value = sorted((str(key), _sum_of(item)) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        value = [_sum_of(item) for item in value]
    return content_sum(repr(value).encode())


def _empty(folder: Path) -> None:
    """Remove what runs put into their folder, nothing else."""
    for pattern in (f"{JOURNAL}*", "[0-9]*.safetensors*", "state-*"):
        for path in folder.glob(pattern):
            path.unlink()


def _remove(folder: Path, made: Sequence[Path]) -> None:
    """The folder, and those above that were made for it. One that holds something else stays, and a
    link with what it leads to."""
    _empty(folder)
    for path in (folder, *made):
        # another command may have put something there by now
        with suppress(OSError):
            path.rmdir()
