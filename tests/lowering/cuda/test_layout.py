"""Packing `cuda64.v1`: an exact inverse for any matrix, bytes where the kernels' lanes look.

The reader below decodes a blob as a lane does: its own loads, and the expressions of the generated
source for fragments.
"""

from __future__ import annotations

import re

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from mixllm_compiler.errors import LoweringError
from mixllm_compiler.formats.layout import Layout, PackedWeight, pack, unpack
from mixllm_compiler.formats.neutral import QuantizedWeight
from mixllm_compiler.formats.row_format import WIDTHS, RowFormat
from mixllm_compiler.lowering.cuda import generate
from mixllm_compiler.lowering.cuda import layout as tiles
from mixllm_compiler.lowering.cuda.lanes import LANES
from tests.lowering.two_level import random_weight
from tests.properties.support import weights


@settings(max_examples=40)
@given(weights(("two-level",), (128,)))
def test_unpack_is_the_inverse_of_pack(weight):
    packed = pack(weight, tiles.NAME)
    again = unpack(PackedWeight(packed.blob, Layout.parse(str(packed.layout))))
    assert torch.equal(again.widths, weight.widths)
    assert (again.n, again.k, again.group, again.family, again.transform) == (
        *(weight.n, weight.k, weight.group, weight.family, weight.transform),
    )
    assert list(again.rows) == list(weight.rows)
    for bits in weight.rows:
        pairs = zip(again.rows[bits].tensors(), weight.rows[bits].tensors(), strict=True)
        for one, other in pairs:
            assert one.dtype == other.dtype
            assert torch.equal(one, other)


@given(
    bits=st.sampled_from(WIDTHS),
    lead=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_lanes_hold_every_code(bits, lead, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (lead, 16, 4), generator=generator).to(torch.uint8)
    packed = LANES[bits].pack(codes)
    assert packed.shape == (lead, 2 * bits, 4)  # not one bit is wasted
    assert torch.equal(LANES[bits].unpack(packed), codes)


def fragments(bits: int, words: np.ndarray) -> np.ndarray:
    """u32 [4 k-steps, 4 registers, ...] by the generated `Code<bits>::fragment`."""
    source = generate._width(bits)
    found = np.zeros((4, 4, *words.shape[1:]), np.uint32)
    lines = re.findall(r"if \(j == (\d)\) \{ (.*) \}", source)
    assert len(lines) == 4
    for j, line in lines:
        for q, expression in re.findall(r"a\[(\d)\] = (.*?);", line):
            text = re.sub(r"(0x[0-9a-f]+)u", r"np.uint32(\1)", expression)
            found[int(j), int(q)] = eval(text, {"w": words, "np": np})
    return found


def read_as_lanes(blob: np.ndarray, layout: Layout, tile: int, width: int) -> np.ndarray:
    """int32 [64, K']: t·q + c − 128 of one tile, by the loads of all lanes."""
    bits = layout.widths[width][0]
    first, block_bytes = tiles.first_bytes(layout)[width], tiles.block_bytes(bits)
    out = np.zeros((64, layout.padded_k), np.int32)
    whole = 2 * bits // 4
    for group in range(layout.groups):
        at = first + (tile * layout.groups + group) * block_bytes
        assert at % 128 == 0
        block = blob[at : at + block_bytes]
        for warp in range(4):
            codes = block[warp * 256 * bits :]
            for lane in range(32):
                g, t = lane >> 2, lane & 3
                loads = [codes[i * 512 + lane * 16 :][:16] for i in range(whole)]
                if 2 * bits % 4:
                    loads.append(codes[whole * 512 + lane * 8 :][:8])
                words = np.concatenate(loads).view(np.uint32)
                a = fragments(bits, words)
                if bits < 8:
                    meta = block[1024 * bits + warp * 32 + g * 4 :][:4].astype(np.uint32)
                    for half in range(2):
                        step, offset = meta[2 * half], meta[2 * half + 1] * np.uint32(0x01010101)
                        a[:, half::2] = a[:, half::2] * step + offset  # one multiply-add of 32 bits
                code = a.astype("<u4").reshape(4, 4, 1).view(np.uint8).astype(np.int32) - 128
                for j in range(4):
                    for q in range(4):
                        k = group * 128 + 32 * j + 16 * (q >> 1) + 4 * t
                        out[16 * warp + g + 8 * (q & 1), k : k + 4] = code[j, q]
    return out


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_lane_reads_its_rows_and_columns(bits):
    n, k = 75, 200  # two tiles and two groups, the last of each short
    weight = random_weight(n, k, torch.full((n,), bits))
    packed = pack(weight, tiles.NAME)
    blob = packed.blob.numpy()
    expected = weight.row_codes(bits).integers().numpy()
    found = np.concatenate([read_as_lanes(blob, packed.layout, tile, 0) for tile in range(2)])
    assert np.array_equal(found[:n, :k], expected)


def test_rows_scales_and_the_order_of_tiles_stand_in_front():
    widths = torch.tensor([4, 8, 3], dtype=torch.uint8)[torch.arange(300) % 3]
    weight = random_weight(300, 128, widths)
    packed = pack(weight, tiles.NAME)
    order = packed.blob[: 6 * 256].view(torch.int32).view(6, 64)
    scales = packed.blob[6 * 256 : 12 * 256].view(torch.float32).view(6, 64)
    for i, bits in enumerate((3, 4, 8)):
        assert torch.equal(order[2 * i : 2 * i + 2].flatten()[:100].long(), weight.model_rows(bits))
        assert (order[2 * i + 1, 36:] == tiles.PADDING).all()
        assert torch.equal(scales[2 * i : 2 * i + 2].flatten()[:100], weight.row_codes(bits).scales)
        assert (scales[2 * i + 1, 36:] == 0).all()
    turns = packed.blob[12 * 256 :][: 6 * 4].view(torch.int32)
    assert turns.tolist() == [0, 1, 2, 3, 4, 5]


def test_tiles_take_turns_by_window_and_inside_by_width():
    widths = torch.tensor([4, 8], dtype=torch.uint8).repeat_interleave(512).repeat(3)
    packed = pack(random_weight(3072, 128, widths), tiles.NAME)
    turns = packed.blob[2 * 256 * 48 :][: 4 * 48].view(torch.int32).view(3, 2, 8).tolist()
    for window, (fours, eights) in enumerate(turns):
        assert fours == list(range(8 * window, 8 * window + 8))
        assert eights == [24 + tile for tile in fours]


@pytest.mark.parametrize("n, odd", [(300, False), (450, True)])
def test_outputs_of_two_tiles_stand_in_ascending_order(n, odd):
    widths = torch.tensor([4, 8, 3], dtype=torch.uint8)[torch.arange(n) % 3]
    if odd:
        widths[-1], widths[-2] = 4, 4
    packed = pack(random_weight(n, 128, widths), tiles.NAME)
    count = sum(tiles.tiles(rows) for _, rows in packed.layout.widths)
    order = packed.blob[: 256 * count].view(torch.int32).view(-1, 64)
    schedule = packed.blob[512 * count :][: 4 * count].view(torch.int32).long()
    pairs = (count + 1) // 2
    at = tiles.header_bytes(count)
    places = packed.blob[at - 128 * pairs : at].view(pairs, 128).long()
    for p, found in enumerate(places):
        assert sorted(found.tolist()) == list(range(128))
        two = torch.full((128,), tiles.PADDING, dtype=torch.int32)
        here = order[schedule[2 * p : 2 * p + 2]].flatten()
        two[: len(here)] = here
        rows = two[found][: int((two >= 0).sum())]
        assert (rows >= 0).all() and (rows.diff() > 0).all()


def test_other_families_and_groups_are_refused():
    with pytest.raises(LoweringError, match=r"rows in groups of 128, not .* groups of 64"):
        pack(random_weight(64, 128, torch.full((64,), 4), group=64), tiles.NAME)


@pytest.mark.parametrize("cut", [-1, -128, 128])
def test_a_blob_of_another_size_is_refused(cut):
    packed = pack(random_weight(64, 128, torch.full((64,), 4)), tiles.NAME)
    blob = packed.blob[:cut] if cut < 0 else torch.cat((packed.blob, packed.blob[:cut]))
    with pytest.raises(LoweringError, match="packed for another layout"):
        unpack(PackedWeight(blob, packed.layout))


def test_padding_and_metadata_cost_less_than_a_hundredth_of_a_bit_on_a_real_shape():
    layout = Layout(4096, ((2, 128), (3, 640), (4, 1664), (5, 1088), (6, 384), (8, 192)), 128)
    layout = Layout(layout.k, layout.widths, 128, "two-level", tiles.NAME)
    bits = 8 * tiles.first_bytes(layout)[-1] / (layout.n * layout.k)
    true = sum(n * RowFormat(b, 128, "two-level").row_bytes(layout.k) for b, n in layout.widths)
    assert 0 < bits - 8 * true / (layout.n * layout.k) < 1e-2


def test_eight_bit_rows_have_no_metadata():
    assert tiles.block_bytes(8) == 64 * 128
    weight: QuantizedWeight = random_weight(64, 128, torch.full((64,), 8))
    packed = pack(weight, tiles.NAME)
    assert packed.blob.numel() == tiles.header_bytes(1) + 64 * 128
