"""Packing `tiles64.v1`: an exact inverse for any matrix, bytes where kernels look for them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mixllm_compiler.lowering  # noqa: F401  registers the packing
from mixllm_compiler.errors import LoweringError
from mixllm_compiler.formats.layout import Layout, PackedWeight, pack, unpack
from mixllm_compiler.formats.row_format import RowFormat
from mixllm_compiler.lowering.triton import layout as tiles
from tests.lowering.cases import ALL_WIDTHS, mix, random_weight, unit_weight


def assert_same_weight(a, b):
    assert (a.n, a.k, a.group, a.family, a.transform) == (b.n, b.k, b.group, b.family, b.transform)
    assert torch.equal(a.widths, b.widths)
    assert list(a.rows) == list(b.rows)
    for bits in a.rows:
        for one, other in zip(a.rows[bits].tensors(), b.rows[bits].tensors(), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@given(
    n=st.integers(1, 200),
    k=st.integers(1, 300),
    group=st.sampled_from([16, 32, 64, 128]),
    widths=st.sets(st.sampled_from(ALL_WIDTHS), min_size=1).map(sorted),
    seed=st.integers(0, 2**31),
)
def test_unpack_is_the_inverse_of_pack(n, k, group, widths, seed):
    torch.manual_seed(seed)
    weight = unit_weight(n, k, mix(n, widths), group)
    weight.rows[weight.widths[0].item()].scales.uniform_(1e-7, 6e4)
    packed = pack(weight, tiles.NAME)
    assert packed.blob.numel() == tiles.blob_bytes(packed.layout)
    assert_same_weight(unpack(packed), weight)


def test_the_layouts_text_finds_the_packing():
    weight = random_weight(70, 200, mix(70, (4, 8)), 128)
    packed = pack(weight, tiles.NAME)
    again = unpack(PackedWeight(packed.blob, Layout.parse(str(packed.layout))))
    assert_same_weight(again, weight)


def test_blocks_are_aligned_for_wide_loads():
    for bits in ALL_WIDTHS:
        for group in (32, 64, 128):
            assert tiles.block_bytes(bits, group) % 128 == 0


def test_four_bit_rows_keep_the_first_half_of_a_group_in_low_nibbles():
    weight = unit_weight(64, 128, mix(64, (4,)), 128)
    blob = pack(weight, tiles.NAME).blob
    codes = weight.row_codes(4).codes
    block = blob[256 : 256 + 64 * 64].view(64, 64)
    assert torch.equal(block & 15, codes[:, :64])
    assert torch.equal(block >> 4, codes[:, 64:])


def test_eight_bit_rows_are_plain_int8():
    weight = unit_weight(64, 128, mix(64, (8,)), 128)
    blob = pack(weight, tiles.NAME).blob
    assert torch.equal(
        blob[256 : 256 + 64 * 128].view(torch.int8).view(64, 128), weight.row_codes(8).codes
    )


def test_metadata_is_one_word_a_row_behind_the_codes():
    weight = random_weight(64, 128, mix(64, (4,)), 128)
    meta = pack(weight, tiles.NAME).blob[256 + 4096 :].view(64, 4)
    rows = weight.row_codes(4)
    assert torch.equal(meta[:, :2].contiguous().view(torch.float16), rows.scales)
    assert torch.equal(meta[:, 2:3], rows.zeros)
    assert not meta[:, 3].any()


def test_the_last_tile_of_each_width_is_filled_with_marked_rows_of_zeros():
    weight = unit_weight(70, 128, mix(70, (4, 8), share=3 / 70), 128)
    blob = pack(weight, tiles.NAME).blob
    order = blob[: 3 * 256].view(
        torch.int32
    )  # 67 rows of 4 bits are two tiles, 3 of 8 bits are one
    assert torch.equal(order[:67].long(), weight.model_rows(4))
    assert torch.equal(order[128:131].long(), weight.model_rows(8))
    assert (order[67:128] == tiles.PADDING).all() and (order[131:] == tiles.PADDING).all()
    last = blob[3 * 256 + 2 * tiles.block_bytes(4, 128) :]
    assert not last[3 * 128 : 64 * 128].any()
    assert not last[64 * 128 + 3 * 4 :].any()


@pytest.mark.parametrize("cut", [-1, -128, 128])
def test_a_blob_of_another_size_is_refused(cut):
    packed = pack(random_weight(64, 128, mix(64, (4,)), 128), tiles.NAME)
    blob = packed.blob[:cut] if cut < 0 else torch.cat((packed.blob, packed.blob[:cut]))
    with pytest.raises(LoweringError, match="packed for another layout"):
        unpack(PackedWeight(blob, packed.layout))


def test_padding_and_metadata_cost_less_than_an_eighth_of_a_bit_on_a_real_shape():
    layout = Layout(4096, ((4, 3712), (8, 384)), 128)
    bits = 8 * tiles.blob_bytes(layout) / (layout.n * layout.k)
    true = sum(n * RowFormat(b).row_bytes(layout.k) for b, n in layout.widths)
    assert bits < 8 * true / (layout.n * layout.k) + 1 / 8
