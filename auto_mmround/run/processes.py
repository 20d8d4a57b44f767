"""Several processes on one run: each has its share of the samples, all of them hold the same
weights.

A launcher (torchrun, accelerate, mpirun) starts the processes; `joined` makes them a group. What
they measure on their samples is added up: second moments, Fisher information, gradients, held-out
errors. So every process takes the same decisions, which `Processes.agree` checks block by block.
The first one writes.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from auto_mmround.errors import UserError
from auto_mmround.export.shards import values_of
from auto_mmround.model import devices
from auto_mmround.model.chains import Chain
from auto_mmround.model.structure import Stage
from auto_mmround.numerics.grids import Codes
from auto_mmround.numerics.moments import Moments

T = TypeVar("T")
# How launchers number their processes: torchrun and accelerate, Intel MPI, Open MPI.
VARIABLES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
     "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
)  # fmt: skip
PATIENCE = timedelta(minutes=30)  # the others wait while the first one writes


@dataclass(frozen=True)
class Processes:
    """This process among all of a run. rank: 0 to count - 1; local_rank: the same on this machine
    alone. local_count: processes on this machine, 0 where the launcher does not tell."""

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 0

    @property
    def here(self) -> int:
        """Processes that share this machine's memory."""
        return self.local_count or self.count

    @property
    def first(self) -> bool:
        """Whether this is the one that writes, prints and logs."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """What of ``items`` is this process's part: every ``count``-th."""
        return list(items[self.rank :: self.count])

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes, in place, equal bits everywhere."""
        if self.count > 1:
            with self._together():
                for tensor in tensors:
                    torch.distributed.all_reduce(tensor)

    def gather(self, value: T) -> list[T]:
        """The value of every process, in order of their ranks."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        with self._together():
            torch.distributed.all_gather_object(values, value)
        return values

    def add_named(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """Sums over the processes by name. A name that a process lacks, since none of its samples
        came by, is zero."""
        shapes = _first_wins(
            self.gather({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})
        )
        whole = {}
        for name, (shape, dtype) in shapes.items():
            whole[name] = (
                tensors[name] if name in tensors else torch.zeros(shape, dtype=dtype, device=device)
            )
            self.add_up([whole[name]])
        return whole

    def add_moments(
        self, moments: Mapping[str, Moments], device: torch.device
    ) -> dict[str, Moments]:
        """Second moments over the samples of all processes; layers that share an input go on
        sharing."""
        owner: dict[int, str] = {}
        mine = {
            name: (owner.setdefault(id(m), name), m.features, m.crossed)
            for name, m in moments.items()
        }
        every = _first_wins(self.gather(mine))
        whole: dict[str, Moments] = {}
        for name, features, cross in dict.fromkeys(every.values()):
            whole[name] = (
                moments[name] if name in moments else Moments(features, cross=cross, device=device)
            )
            self.add_up(whole[name].sums())
        return {name: whole[shared] for name, (shared, *_) in every.items()}

    def complete(self, chains: Mapping[str, Chain], stages: Sequence[Stage]) -> dict[str, Chain]:
        """A chain, perhaps without samples, for every stage that any process reached; live where
        one found it so."""
        every = self.gather({path: (chain.live, chain.batched) for path, chain in chains.items()})
        reached = {
            stage.path: [part[stage.path] for part in every if stage.path in part]
            for stage in stages
        }
        return {
            stage.path: replace(
                chains.get(stage.path, Chain(stage)),
                live=any(live for live, _ in reached[stage.path]),
            )
            for stage in stages
            if reached[stage.path]
        }

    def numbered(self, chain: Chain) -> tuple[int, dict[int, int]]:
        """Number of entries of a chain over all processes, and number of each of this process's ->
        place in it.

        Entries are numbered as one process would, by sample.
        """
        every = [
            (sample, rank)
            for rank, samples in enumerate(self.gather(chain.sample))
            for sample in samples
        ]
        mine = [number for number, (_, rank) in enumerate(sorted(every)) if rank == self.rank]
        return len(every), {number: place for place, number in enumerate(mine)}

    def agree(self, block: str, codes: Mapping[str, Codes]) -> None:
        """Raises UserError where the processes hold different codes for a block."""
        if self.count == 1:
            return
        sums = self.gather(codes_checksum(codes))
        odd = [rank for rank, own in enumerate(sums) if own != sums[0]]
        if odd:
            raise UserError(
                f"{block}: process {odd[0]} rounds it otherwise than process 0; run all processes"
                " on machines with the same processor or accelerator and the same versions"
            )

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch has no class of its own for a lost peer
            if devices.out_of_memory(error):
                raise
            reason = " ".join(str(error).split("] ")[-1].split())[:120]
            raise UserError(
                f"another process has ended or answers no more ({reason}); look "
                "for its own message, then start the same command again"
            ) from None


ALONE = Processes()


def codes_checksum(codes: Mapping[str, Codes]) -> str:
    """Over the integers, scales and zero points of some weights."""
    hashed = hashlib.blake2b(digest_size=8)
    for name, weight in codes.items():
        hashed.update(name.encode())
        for part in weight:
            if isinstance(part, Tensor):
                hashed.update(values_of(part))
    return hashed.hexdigest()


def _first_wins(parts: Sequence[Mapping[str, T]]) -> dict[str, T]:
    """One mapping of several; of a name that several have, the first one's value."""
    merged: dict[str, T] = {}
    for part in parts:
        merged = {**merged, **{name: value for name, value in part.items() if name not in merged}}
    return merged


def launched() -> Processes:
    """What a launcher's variables say about this process; `ALONE` without any."""
    for names in VARIABLES:
        if int(os.environ.get(names[1], "1")) > 1:
            return Processes(*(int(os.environ.get(name, "0")) for name in names))
    return ALONE


@contextmanager
def joined(device: torch.device, patience: timedelta = PATIENCE) -> Iterator[Processes]:
    """The group of the processes that a launcher started, over the device's backend. Raises
    UserError if the others can't be reached; a process that ends, or is silent for longer than
    ``patience``, ends the others with one line."""
    processes = launched()
    if processes.count == 1:
        yield ALONE
        return
    try:
        torch.distributed.init_process_group(
            devices.traits(device).backend,
            rank=processes.rank,
            world_size=processes.count,
            timeout=patience,
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"process {processes.rank} of {processes.count} can't reach the others: {reason}"
        ) from None
    try:
        yield processes
    except UserError as error:
        raise (
            error if processes.first else UserError(f"process {processes.rank}: {error}")
        ) from None
    finally:
        torch.distributed.destroy_process_group()
