"""What writing will take: bytes on disk and seconds."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from auto_mmround.checkpoint.folder import is_side_file
from auto_mmround.errors import UserError
from auto_mmround.export.format import PackedFormat
from auto_mmround.model.experts import separated
from auto_mmround.model.stored import stored_tensors
from auto_mmround.run.job import Job
from auto_mmround.run.leaves import leaves_of
from auto_mmround.run.record import checksum, codes_record

TRIAL = 2**25  # bytes written and read to see how fast the disk is


def sizes_of(job: Job) -> dict[str, int]:
    """Bytes of every folder that the run writes."""
    source, plan = job.loaded.source, job.plan
    parameters = list(job.loaded.model.parameters())  # tied ones once; streamed ones are elsewhere
    whole = sum(tensor.nbytes for tensor in parameters)
    side = 0
    if source is not None:
        whole = stored_tensors(source).nbytes()
        side = sum(path.stat().st_size for path in source.rglob("*") if is_side_file(path, source))
    count = sum(tensor.numel() for tensor in parameters)
    quantized = sum(w.out_features * w.in_features for w in plan.weights if w.scheme)
    rest = whole * (1 - quantized / max(count, 1)) + side
    packed = quantized * plan.bits_per_weight() / 8
    return {fmt.name: round(rest + packed if fmt.packs else whole + side) for fmt in plan.formats}


def writing(job: Job, clock: Callable[[], float]) -> tuple[dict[str, int], float]:
    """Sizes, and seconds to pack and write them: by the rates of one weight and of one small
    file."""
    sizes = sizes_of(job)
    planned = [weight for weight in job.plan.weights if weight.scheme]
    weight = min(planned, key=lambda w: w.out_features * w.in_features)
    block = [weight.block or ""]
    with job.loaded.holder.resident(block), separated(job.loaded.model, blocks=block):
        (leaf,) = leaves_of(job.loaded.model, [weight]).values()
        codes = leaf.rounding.codes()
    started = clock()
    codes_record(codes)
    for fmt in job.plan.formats:
        if isinstance(fmt, PackedFormat):
            fmt.pack(weight.name, codes)
    each = (clock() - started) / codes.q_OI.numel()
    blob = torch.zeros(TRIAL, dtype=torch.uint8)
    started = clock()
    checksum(blob)
    with tempfile.NamedTemporaryFile(dir=standing(Path(job.recipe.output_dir))) as file:
        file.write(blob.numpy().data)
        file.flush()
        os.fsync(file.fileno())
    rate = TRIAL / (clock() - started)
    elements = sum(w.out_features * w.in_features for w in planned)
    return sizes, each * elements + sum(sizes.values()) / rate


def standing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = folder.absolute()
    return next(path for path in (folder, *folder.parents) if path.is_dir())


def check_disk(job: Job) -> None:
    """Raises UserError before any work is done if the folders that a run writes can't fit on their
    disk."""
    where = standing(Path(job.recipe.output_dir))
    wanted, free = sum(sizes_of(job).values()), shutil.disk_usage(where).free
    if wanted > free:
        raise UserError(
            f"output_dir {job.recipe.output_dir}: the result takes {wanted / 1e6:,.1f} MB,"
            f" {free / 1e6:,.1f} MB are free there; name another folder or fewer formats"
        )
