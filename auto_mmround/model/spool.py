"""Tensors that the system may write out when it needs the room."""

import os
from pathlib import Path

import torch
from torch import Tensor


class Spool:
    """Puts tensors into files of a folder, mapped into memory.

    A file loses its name at once, so its room on the disk is free when its tensor is, however the
    process ends.
    """

    def __init__(self, folder: Path):
        self._folder, self._count = folder, 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """The same values in a file, on the host. Raises OSError if the disk has no room for
        them."""
        path = self._folder / f"state-{os.getpid()}-{self._count}"
        self._count += 1
        size = tensor.numel() * tensor.element_size()
        if not size:
            return tensor.cpu()
        handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_EXCL, 0o600)
        try:
            # a mapped file that finds no room would end the process
            os.posix_fallocate(handle, 0, size)
            mapped = torch.from_file(
                str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype
            )
        finally:
            os.close(handle)
            path.unlink()
        return mapped.view(tensor.shape).copy_(tensor.detach())
