"""Pure bit packing: dense LSB-first streams of 2 to 8 bit integers in int32 words, and the nibble
order of AWQ.

Element ``k`` of a row occupies bits ``k*bits .. k*bits + bits - 1`` of the row's little-endian bit
stream; for 3, 5, 6 and 7 bits values straddle word boundaries. Eight values of any width fill whole
bytes, so both directions go through one 64-bit register per eight values and need no case for a
width.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from auto_mmround.headers import raw_bytes

PIECE = 2**20  # values, or words of them, that are packed at a time
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of a run of 8 that sits in nibble 0, 1, ..


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """(..., n) unsigned integers below ``2**bits`` -> int32 (..., ceil(n*bits/32)); the last word
    is padded with zeros.

    Raises ValueError if a value does not fit, or for a width outside 1..8.
    """
    _check_width(bits)
    if values.numel() and (int(values.max()) >> bits or int(values.min()) < 0):
        raise ValueError(
            f"values {int(values.min())}..{int(values.max())} do not fit into {bits} bits"
        )
    return _by_rows(values, lambda part: _packed(part, bits))


def _packed(values: Tensor, bits: int) -> Tensor:
    n = values.shape[-1]
    eights = torch.nn.functional.pad(values.to(torch.uint8), (0, -n % 32)).unflatten(-1, (-1, 8))
    register = torch.zeros(eights.shape[:-1], dtype=torch.int64, device=values.device)
    for j in range(8):
        register |= eights[..., j].long() << (bits * j)
    as_bytes = torch.stack(
        [(register >> (8 * i)).bitwise_and_(255).to(torch.uint8) for i in range(bits)], dim=-1
    )
    words = as_bytes.flatten(-2).contiguous().view(torch.int32)
    return words[..., : -(-n * bits // 32)].contiguous()


def unpack_bits(words: Tensor, bits: int, n: int) -> Tensor:
    """int32 (..., ceil(n*bits/32)) -> uint8 (..., n); the inverse of :func:`pack_bits`. ValueError
    on a shape."""
    _check_width(bits)
    if words.shape[-1] != -(-n * bits // 32):
        raise ValueError(
            f"{n} values of {bits} bits take {-(-n * bits // 32)} words, not {words.shape[-1]}"
        )
    return _by_rows(words, lambda part: _unpacked(part, bits, n))


def _unpacked(words: Tensor, bits: int, n: int) -> Tensor:
    as_bytes = raw_bytes(words.to(torch.int32))
    mask = 2**bits - 1
    if 8 % bits == 0:  # no value lies in two bytes
        parts = [(as_bytes >> at).bitwise_and_(mask) for at in range(0, 8, bits)]
        return torch.stack(parts, dim=-1).flatten(-2)[..., :n].contiguous()
    groups = torch.nn.functional.pad(as_bytes, (0, -as_bytes.shape[-1] % bits)).unflatten(
        -1, (-1, bits)
    )
    register = torch.zeros(groups.shape[:-1], dtype=torch.int64, device=words.device)
    for i in range(bits):
        register |= groups[..., i].long() << (8 * i)
    values = torch.stack(
        [(register >> (bits * j)).bitwise_and_(mask).to(torch.uint8) for j in range(8)], dim=-1
    )
    return values.flatten(-2)[..., :n].contiguous()


def pack_awq(values: Tensor) -> Tensor:
    """(..., n) 4-bit values, n % 8 == 0 -> int32 (..., n/8), eight columns a word in AWQ's
    order."""
    if values.shape[-1] % 8:
        raise ValueError(f"AWQ packs runs of 8 columns; {values.shape[-1]} is not a multiple")
    return pack_bits(values.unflatten(-1, (-1, 8))[..., list(AWQ_COLUMNS)].flatten(-2), 4)


def unpack_awq(words: Tensor) -> Tensor:
    """int32 (..., n/8) -> uint8 (..., n); the inverse of :func:`pack_awq`."""
    nibbles = unpack_bits(words, 4, words.shape[-1] * 8).unflatten(-1, (-1, 8))
    order = torch.tensor(AWQ_COLUMNS, device=words.device).argsort()
    return nibbles[..., order].flatten(-2)


def _by_rows(values: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A change of rows, of some at a time: on the way a value takes several bytes."""
    rows = max(1, PIECE // max(1, values[:1].numel())) if values.ndim > 1 else 1
    if values.ndim < 2 or len(values) <= rows:
        return change(values)
    return torch.cat([change(part) for part in values.split(rows)])


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"cannot pack {bits} bits; 1 to 8 are possible")
