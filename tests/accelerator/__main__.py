"""The command line on stand-ins: `python -m accelerator [ARGUMENTS]`, also as one of several
processes."""

import sys
from datetime import timedelta

import torch.distributed as dist

from auto_mmround import cli
from auto_mmround.model import devices

from . import GROUP, NAME, ROW, shown


class ByHost(dist.ProcessGroup):
    """Gloo, which takes no tensor of a stand-in: those go by way of host memory."""

    def __init__(self, store: dist.Store, rank: int, size: int, patience: timedelta):
        super().__init__(rank, size)
        self._inner = dist.ProcessGroupGloo(store, rank, size, patience)

    def allreduce(self, tensors, options=None):
        """Every tensor becomes its sum over the processes."""
        copies = [tensor.cpu() for tensor in tensors]
        work = self._inner.allreduce(copies, options or dist.AllreduceOptions())
        work.wait()
        for tensor, copy in zip(tensors, copies, strict=True):
            tensor.copy_(copy)
        return work

    def allgather(self, lists, tensors, options=None):
        """Of tensors in host memory."""
        return self._inner.allgather(lists, tensors, options or dist.AllgatherOptions())

    def getBackendName(self) -> str:
        """As torch asks for it."""
        return GROUP


def main() -> int:
    """What the command line returns."""
    dist.Backend.register_backend(GROUP, ByHost, devices=[NAME])
    with shown():
        devices.TABLE[NAME] = ROW
        return cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
