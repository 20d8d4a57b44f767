"""GGUF's block types of 32 weights: pure packing of our integer codes, exact in both directions.

A row of a weight is a run of blocks along the inputs; shapes are (out, bytes of a row) uint8,
little endian. A block holds a float16 scale d, for the asymmetric types a float16 minimum m, and
the codes n: W = d * (n - M) or d * n + m.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from auto_mmround.numerics.grids import Codes

BLOCK = 32


class BlockType(NamedTuple):
    """One ggml type. group: columns that share a scale. columns: of a block (256: a super-block of
    groups)."""

    name: str
    bits: int
    sym: bool
    group: int = BLOCK
    columns: int = BLOCK


TYPES: Mapping[str, BlockType] = {
    t.name: t
    for t in (
        BlockType("Q4_0", 4, True),
        BlockType("Q4_1", 4, False),
        BlockType("Q5_0", 5, True),
        BlockType("Q5_1", 5, False),
        BlockType("Q8_0", 8, True),
    )
}


def exact_type(bits: int, sym: bool) -> BlockType | None:
    """The smallest type that holds such codes exactly (3 bits fit into Q4_0), or None (asymmetric
    above 5 bits)."""
    held = (t for t in TYPES.values() if t.sym == sym and t.bits >= bits)
    return min(held, key=lambda t: t.bits, default=None)


def pack(codes: Codes, ggml: BlockType) -> Tensor:
    """Codes of any group size that is a multiple of 32 -> blocks, (out, bytes) uint8; scales repeat
    within a group.

    Raises ValueError where the image would not be exact: too many bits, another symmetry, scales
    that are not float16, columns that are no multiple of 32, or a minimum scale * zero that float16
    cannot hold.
    """
    rows, columns = codes.q_OI.shape
    if codes.bits > ggml.bits or codes.sym != ggml.sym:
        raise ValueError(
            f"{ggml.name} does not hold {codes.bits} bits, {'sym' if codes.sym else 'asym'}"
        )
    if codes.scale_OG.dtype != torch.float16:
        raise ValueError(
            f"{ggml.name}: scales are {codes.scale_OG.dtype}, the blocks store float16"
        )
    if columns % BLOCK or codes.group_size % BLOCK:
        raise ValueError(
            f"{ggml.name}: {columns} columns in groups of {codes.group_size} are not blocks of"
            f" {BLOCK}"
        )
    group_B = torch.arange(columns // BLOCK, device=codes.q_OI.device) * BLOCK // codes.group_size
    d_OB, zero_OB = codes.scale_OG[:, group_B], codes.zero_OG[:, group_B]
    n_OBg = codes.q_OI.reshape(rows, -1, BLOCK)
    parts = [_half_bytes(d_OB)]
    if ggml.sym:
        n_OBg = n_OBg + 2 ** (ggml.bits - 1) - 2 ** (codes.bits - 1)
    else:
        minimum_OB = -(d_OB.float() * zero_OB.float())
        if not torch.equal(minimum_OB.half().float(), minimum_OB):
            raise ValueError(
                f"{ggml.name}: scale * zero is not a float16 number; tune for this format"
            )
        parts.append(_half_bytes(minimum_OB))
    return torch.cat([*parts, *_code_bytes(n_OBg, ggml.bits)], -1).reshape(rows, -1)


def unpack(blocks: Tensor, ggml: BlockType) -> Codes:
    """The inverse of :func:`pack`, group size 32. Raises ValueError if a minimum is no multiple of
    its scale."""
    rows, size = blocks.shape[0], 2 + 2 * (not ggml.sym) + 4 * ggml.bits
    blocks_OBb = blocks.reshape(rows, -1, size)
    d_OB = blocks_OBb[..., :2].contiguous().view(torch.float16)[..., 0]
    n_OBg = _codes_from_bytes(blocks_OBb[..., 2 if ggml.sym else 4 :], ggml.bits)
    zero_OB = torch.full_like(d_OB, 2 ** (ggml.bits - 1), dtype=torch.float32)
    if not ggml.sym:
        minimum_OB = blocks_OBb[..., 2:4].contiguous().view(torch.float16)[..., 0].float()
        zero_OB = (-minimum_OB / d_OB.float()).round()
        if (
            not torch.equal(-(d_OB.float() * zero_OB), minimum_OB)
            or not 0 <= float(zero_OB.min()) <= 255
        ):
            raise ValueError(f"{ggml.name}: a minimum is not a multiple of its scale")
    return Codes(n_OBg.reshape(rows, -1), d_OB, zero_OB.to(torch.uint8), ggml.bits, BLOCK, ggml.sym)


def _half_bytes(x_OB: Tensor) -> Tensor:
    return x_OB.half().contiguous().unsqueeze(-1).view(torch.uint8)


def _code_bytes(n_OBg: Tensor, bits: int) -> list[Tensor]:
    """8 bits: signed bytes. Else nibbles, elements 0..15 low and 16..31 high, after the fifth bits
    as one word."""
    if bits == 8:
        return [(n_OBg.short() - 128).to(torch.int8).view(torch.uint8)]
    n_OBg = n_OBg.to(torch.uint8)
    nibbles = (n_OBg[..., :16] & 15) | ((n_OBg[..., 16:] & 15) << 4)
    if bits == 4:
        return [nibbles]
    weights_8 = 2 ** torch.arange(8, device=n_OBg.device)
    fifth = ((n_OBg >> 4).long().unflatten(-1, (4, 8)) * weights_8).sum(-1).to(torch.uint8)
    return [fifth, nibbles]


def _codes_from_bytes(data_OBb: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return (data_OBb.contiguous().view(torch.int8).short() + 128).to(torch.uint8)
    nibbles = data_OBb[..., -16:]
    n_OBg = torch.cat([nibbles & 15, nibbles >> 4], -1)
    if bits == 5:
        shifts_8 = torch.arange(8, dtype=torch.uint8, device=n_OBg.device)
        n_OBg |= ((data_OBb[..., :4, None] >> shifts_8) & 1).flatten(-2) << 4
    return n_OBg
