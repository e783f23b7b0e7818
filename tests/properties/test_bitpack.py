"""Bit packing: exact for every width and every length."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import torch
from hypothesis import given

from mixllm_compiler.formats.bitpack import pack_bits, unpack_bits


@given(
    bits=st.integers(1, 8),
    lead=st.lists(st.integers(0, 4), max_size=2),
    k=st.integers(1, 300),
    seed=st.integers(0, 2**32),
)
def test_unpacking_gives_back_what_was_packed(bits, lead, k, seed):
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (*lead, k), generator=draw, dtype=torch.uint8)
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*lead, math.ceil(k * bits / 8))
    assert torch.equal(unpack_bits(packed, bits, k), codes)


@given(bits=st.integers(1, 8), values=st.lists(st.integers(0, 255), min_size=1, max_size=40))
def test_a_row_is_one_little_endian_integer(bits, values):
    values = [v % 2**bits for v in values]
    packed = pack_bits(torch.tensor([values], dtype=torch.uint8), bits)
    whole = int.from_bytes(bytes(packed[0].tolist()), "little")
    assert whole == sum(v << (i * bits) for i, v in enumerate(values))
