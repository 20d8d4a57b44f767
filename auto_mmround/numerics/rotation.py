"""A rotation that spreads each hidden state over small blocks of channels.

Engines round inputs of a layer in groups that share a scale. A channel that sticks out takes the
scale for itself. Turned, all channels of the group share what it has.
"""

import torch
from torch import Tensor

SIZE = 32  # channels of a block: the group of the MX formats


def hadamard(size: int) -> Tensor:
    """The symmetric orthogonal matrix (size, size) of Sylvester. size: a power of 2."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = (
            torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)]) / 2**0.5
        )
    return matrix


def signs(channels: int) -> Tensor:
    """Random signs (channels,), the same each time. Without them a block of equal channels would
    turn into one that sticks out."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (channels,), generator=generator).float() * 2 - 1


def turned(x: Tensor, sign_D: Tensor) -> Tensor:
    """x R of (.., D), in the dtype of x. R = diag(sign) diag(H, H, ..) with Hadamard matrices H of
    SIZE (QuaRot, arXiv 2404.00456, has one of full width)."""
    matrix = hadamard(SIZE).to(x.device)
    parts = (x.float() * sign_D.to(x.device)).unflatten(-1, (-1, SIZE))
    return (parts @ matrix).flatten(-2).to(x.dtype)


def turned_back(x: Tensor, sign_D: Tensor) -> Tensor:
    """x R^T, what `turned` does undone."""
    matrix = hadamard(SIZE).to(x.device)
    parts = x.float().unflatten(-1, (-1, SIZE)) @ matrix
    return (parts.flatten(-2) * sign_D.to(x.device)).to(x.dtype)
