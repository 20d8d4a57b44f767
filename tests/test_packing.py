"""Bit streams against an independent slow decoder, golden words, and both layouts against their
definitions."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from auto_mmround.export import auto_awq
from auto_mmround.export.auto_gptq import pack_gptq, unpack_gptq
from auto_mmround.export.formats import FORMATS
from auto_mmround.export.packing import pack_awq, pack_bits, unpack_awq, unpack_bits
from auto_mmround.export.shards import ShardWriter
from auto_mmround.numerics.grids import Codes, dequantize
from auto_mmround.recipe.schemes import Scheme
from auto_mmround.run.record import checksum


def slow_decode(words: list[int], bits: int, n: int) -> list[int]:
    """The definition, bit by bit: value k is bits k*b .. k*b+b-1 of the little-endian stream."""
    stream = "".join(format(word & 0xFFFFFFFF, "032b")[::-1] for word in words)
    return [int(stream[k * bits : (k + 1) * bits][::-1], 2) for k in range(n)]


def random_codes(
    out: int, groups: int, group: int, bits: int, sym: bool, seed: int, min_zero: int = 0
) -> Codes:
    gen = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 2**bits, (out, groups * group), generator=gen).to(torch.uint8)
    scale = torch.randn(out, groups, generator=gen).half()  # half of them negative
    zero = torch.randint(min_zero, 2**bits, (out, groups), generator=gen).to(torch.uint8)
    return Codes(
        q, scale, torch.full_like(zero, 2 ** (bits - 1)) if sym else zero, bits, group, sym
    )


def same(left: Codes, right: Codes) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left[:3], right[:3])) and left[3:] == right[3:]


@settings(deadline=None, max_examples=150)
@given(
    bits=st.integers(1, 8), n=st.integers(1, 131), rows=st.integers(1, 4), seed=st.integers(0, 999)
)
def test_stream_round_trip_and_oracle(bits: int, n: int, rows: int, seed: int) -> None:
    values = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )
    words = pack_bits(values, bits)
    assert words.dtype == torch.int32 and words.shape == (rows, -(-n * bits // 32))
    assert [slow_decode(row, bits, n) for row in words.tolist()] == values.tolist()
    assert torch.equal(unpack_bits(words, bits, n), values)


@settings(deadline=None, max_examples=60)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    sym=st.booleans(),
    out=st.integers(1, 5),
    groups=st.integers(1, 3),
    group=st.sampled_from([16, 32, 64]),
    offset=st.integers(0, 1),
    seed=st.integers(0, 999),
)
def test_gptq_round_trip(
    bits: int, sym: bool, out: int, groups: int, group: int, offset: int, seed: int
) -> None:
    group *= 2  # in * bits is a multiple of 32
    codes = random_codes(out, groups, group, bits, sym, seed, min_zero=offset)
    tensors = pack_gptq("m", codes, zero_offset=offset, g_idx=True)
    assert same(unpack_gptq("m", tensors, Scheme(bits, group, sym), zero_offset=offset), codes)
    column = tensors["m.qweight"][:, 0].tolist()
    assert slow_decode(column, bits, codes.q_OI.shape[1]) == codes.q_OI[0].tolist()
    zeros = slow_decode(tensors["m.qzeros"][0].tolist(), bits, out)
    assert [zero + offset for zero in zeros] == codes.zero_OG[:, 0].tolist()


def test_gptq_in_activation_order() -> None:
    codes = random_codes(32, 3, 32, 4, False, 0, min_zero=1)
    g_idx = torch.arange(3).repeat_interleave(32)[
        torch.randperm(96, generator=torch.Generator().manual_seed(1))
    ]
    tensors = pack_gptq("m", codes, zero_offset=1, g_idx=True) | {"m.g_idx": g_idx.int()}
    wanted = (codes.q_OI.float() - codes.zero_OG.float()[:, g_idx]) * codes.scale_OG.float()[
        :, g_idx
    ]
    assert torch.equal(
        dequantize(unpack_gptq("m", tensors, Scheme(4, 32, False), zero_offset=1)), wanted
    )


@settings(deadline=None, max_examples=40)
@given(
    sym=st.booleans(), eights=st.integers(1, 4), groups=st.integers(1, 3), seed=st.integers(0, 999)
)
def test_awq_round_trip(sym: bool, eights: int, groups: int, seed: int) -> None:
    codes = random_codes(8 * eights, groups, 32, 4, sym, seed)
    tensors = auto_awq.pack("m", codes)
    assert same(auto_awq.unpack("m", tensors, Scheme(4, 32, sym)), codes)
    nibble_of_column = [0, 4, 1, 5, 2, 6, 3, 7]
    word = tensors["m.qweight"][0, 0].item() & 0xFFFFFFFF
    assert [word >> 4 * nibble_of_column[j] & 15 for j in range(8)] == codes.q_OI[:8, 0].tolist()


def test_golden_words_of_symmetric_zero_points() -> None:
    def words(bits: int, offset: int) -> set[int]:
        codes = random_codes(32, 1, 32, bits, True, 0)
        return {
            w & 0xFFFFFFFF
            for w in pack_gptq("m", codes, zero_offset=offset, g_idx=False)["m.qzeros"][0].tolist()
        }

    assert words(4, 1) == {0x77777777}
    assert words(3, 1) == {0xDB6DB6DB, 0xB6DB6DB6, 0x6DB6DB6D}
    assert words(2, 1) == {0x55555555}
    assert words(8, 1) == {0x7F7F7F7F}
    assert words(4, 0) == {0x88888888}
    assert {w & 0xFFFFFFFF for w in pack_awq(torch.full((1, 8), 8)).flatten().tolist()} == {
        0x88888888
    }


def test_awq_golden_order() -> None:
    assert pack_awq(torch.arange(8)[None]).item() & 0xFFFFFFFF == 0x75316420
    assert unpack_awq(pack_awq(torch.arange(8)[None])).tolist() == [list(range(8))]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        pack_bits(torch.tensor([0, 16]), 4)
    with pytest.raises(ValueError, match="do not fit"):
        pack_bits(torch.tensor([-1, 3]), 4)
    with pytest.raises(ValueError, match="words"):
        unpack_bits(torch.zeros(2, dtype=torch.int32), 4, 8)
    with pytest.raises(ValueError, match="9 bits"):
        pack_bits(torch.zeros(3), 9)
    with pytest.raises(ValueError, match="multiple"):
        pack_awq(torch.zeros(2, 12))
    zero = random_codes(32, 2, 32, 4, False, 0)
    zero.zero_OG[0, 0] = 0
    with pytest.raises(ValueError, match="zero point"):
        pack_gptq("m", zero, zero_offset=1, g_idx=False)
    with pytest.raises(ValueError, match="float16"):
        auto_awq.pack("m", zero._replace(scale_OG=zero.scale_OG.float()))
    tensors = pack_gptq("m", random_codes(32, 2, 32, 4, True, 0), zero_offset=1, g_idx=True)
    with pytest.raises(ValueError, match="contradicts"):
        unpack_gptq("m", tensors, Scheme(4, 64), zero_offset=1)
    with pytest.raises(ValueError, match="every group 32 inputs"):
        unpack_gptq(
            "m",
            tensors | {"m.g_idx": torch.zeros_like(tensors["m.g_idx"])},
            Scheme(4, 32),
            zero_offset=1,
        )


@pytest.mark.parametrize("outputs", [1, 2, 6])
@pytest.mark.parametrize("inputs", [5, 40])
def test_few_rows_in_one_group_reach_the_file(outputs: int, inputs: int, tmp_path: Path) -> None:
    """Their zero points are one word, whose strides torch leaves as they come: it could not be
    written. Qwen3.5's gates are so small in tiny models."""
    fmt, scheme = FORMATS["compressed_tensors"], Scheme(5, -1, False)
    codes = random_codes(outputs, 1, inputs, 5, False, 0)
    writer = ShardWriter(tmp_path)
    writer.add(fmt.pack("gate", codes))
    writer.finish()
    assert same(fmt.unpack("gate", load_file(tmp_path / "model.safetensors"), scheme), codes)
    for lying in (
        torch.arange(10).view(2, 5).T[:1, :1],
        torch.arange(5.0)[None, :1],
        torch.ones(()),
    ):
        assert checksum(lying) == checksum(lying.clone(memory_format=torch.contiguous_format))
