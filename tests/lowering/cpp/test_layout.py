"""Packing `panels64.v1`: an exact inverse for any matrix, bytes where kernels look for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mixllm_compiler.lowering  # noqa: F401  registers the packing
from mixllm_compiler.errors import LoweringError
from mixllm_compiler.formats.layout import Layout, PackedWeight, pack, unpack
from mixllm_compiler.formats.row_format import RowFormat
from mixllm_compiler.lowering.cpp import layout as panels
from mixllm_compiler.lowering.cpp import packer
from mixllm_compiler.lowering.cpp.lanes import LANES
from tests.lowering.cases import ALL_WIDTHS, mix, random_weight, unit_weight
from tests.lowering.test_tiles_layout import assert_same_weight
from tests.properties.support import weights


@settings(max_examples=40)
@given(weights(groups=(32, 64, 128, 256)))
def test_unpack_is_the_inverse_of_pack(weight):
    packed = pack(weight, panels.NAME)
    assert packed.blob.numel() == panels.blob_bytes(packed.layout)
    assert_same_weight(unpack(packed), weight)


@pytest.mark.parametrize("family", ["asym", "two-level"])
def test_many_panels_of_every_width(family):
    weight = random_weight(900, 200, mix(900, ALL_WIDTHS), 64, family)
    packed = pack(weight, panels.NAME)
    assert_same_weight(unpack(packed), weight)


@settings(max_examples=40)
@given(weights(groups=(32, 64, 96, 128, 256)))
def test_without_a_compiler_the_same_bytes_come_out(weight):
    natively = pack(weight, panels.NAME).blob
    assert packer._library() is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packer, "_library", lambda: None)
        assert torch.equal(pack(weight, panels.NAME).blob, natively)


def test_large_matrices_are_packed_in_pieces(monkeypatch):
    weight = random_weight(300, 128, mix(300, (4, 8)), 64)
    monkeypatch.setattr(packer, "_library", lambda: None)
    whole = pack(weight, panels.NAME).blob
    monkeypatch.setattr(panels, "_CHUNK", 128 * 64)
    assert torch.equal(pack(weight, panels.NAME).blob, whole)


def test_the_layouts_text_finds_the_packing():
    weight = random_weight(70, 200, mix(70, (4, 8)), 128)
    packed = pack(weight, panels.NAME)
    again = unpack(PackedWeight(packed.blob, Layout.parse(str(packed.layout))))
    assert_same_weight(again, weight)


def test_lanes_use_every_bit_of_every_byte_once():
    for bits, lanes in LANES.items():
        used = np.zeros((lanes.words, 8), int)
        for fields in lanes.fields:
            for field in fields:
                used[field.word, field.at : field.at + field.count] += 1
            # The fields of a code are its bits, each once.
            assert sum(field.mask for field in fields) == 2**bits - 1
        assert (used == 1).all()
        assert lanes.steps * bits == 8 * lanes.words


def test_four_neighbouring_k_of_a_row_are_one_dword():
    weight = unit_weight(64, 128, mix(64, (4,)), 128)
    blob = pack(weight, panels.NAME).blob
    codes = weight.row_codes(4).codes
    block = blob[256 + 384 + 192 :].view(16, 64, 4)  # units, rows, bytes
    steps = codes.view(64, 16, 2, 4)
    assert torch.equal(block & 15, steps[:, :, 0].transpose(0, 1))
    assert torch.equal(block >> 4, steps[:, :, 1].transpose(0, 1))


def test_eight_bit_codes_are_unsigned():
    weight = unit_weight(64, 128, mix(64, (8,)), 128)
    blob = pack(weight, panels.NAME).blob
    found = blob[256 + 384 + 128 :].view(32, 64, 4).transpose(0, 1).reshape(64, 128)
    assert torch.equal(found.int() - 128, weight.row_codes(8).codes.int())


def entries_of(blob: torch.Tensor, count: int) -> np.ndarray:
    raw = blob[count * 256 : count * (256 + panels.ENTRY)]
    return raw.numpy().view(panels._ENTRY)


def test_panels_run_in_order_of_their_columns():
    widths = torch.tensor([8] * 64 + [4] * 64 + [2] * 64 + [8] * 64, dtype=torch.uint8)
    blob = pack(unit_weight(256, 128, widths, 128), panels.NAME).blob
    assert entries_of(blob, 4)["bits"].tolist() == [8, 4, 2, 8]


@settings(max_examples=30)
@given(st.integers(1, 400), st.sampled_from([(4,), (4, 8), ALL_WIDTHS]), st.integers(0, 2**31))
def test_lines_write_every_row_to_its_column(n, kinds, seed):
    torch.manual_seed(seed)
    weight = unit_weight(n, 32, mix(n, kinds), 32)
    blob = pack(weight, panels.NAME).blob
    count = panels.panel_count(Layout.of(weight, panels.NAME))
    rows = blob[: 256 * count].view(torch.int32).view(count, 64).numpy()
    for entry in entries_of(blob, count):
        order = rows[entry["panel"]]
        if entry["lines"] == 0:
            spanned = order[order >= 0]
            assert spanned[-1] // 16 - spanned[0] // 16 >= panels.LINES
            continue
        padded = np.concatenate([order, np.full(16, -2)])
        written = []
        for line in range(entry["lines"]):
            source = 16 * entry["source"][line]
            for place in range(16):
                if entry["mask"][line] >> place & 1:
                    row = padded[source + entry["index"][line][place]]
                    assert row == entry["column"] + 16 * line + place
                    written.append(row)
        assert written == order[order >= 0].tolist()


@pytest.mark.parametrize("cut", [-1, -128, 128])
def test_a_blob_of_another_size_is_refused(cut):
    packed = pack(random_weight(64, 128, mix(64, (4,)), 128), panels.NAME)
    blob = packed.blob[:cut] if cut < 0 else torch.cat((packed.blob, packed.blob[:cut]))
    with pytest.raises(LoweringError, match="packed for another layout"):
        unpack(PackedWeight(blob, packed.layout))


@pytest.mark.parametrize("family", ["asym", "two-level"])
def test_padding_and_entries_cost_less_than_a_tenth_of_a_bit_on_a_real_shape(family):
    layout = Layout(4096, ((3, 1024), (4, 2688), (8, 384)), 128, family, panels.NAME)
    bits = 8 * panels.blob_bytes(layout) / (layout.n * layout.k)
    true = sum(n * RowFormat(b, 128, family).row_bytes(layout.k) for b, n in layout.widths)
    assert bits < 8 * true / (layout.n * layout.k) + 1 / 10
