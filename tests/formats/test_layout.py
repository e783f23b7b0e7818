from __future__ import annotations

import pytest
import torch

from mixllm_compiler.errors import OptionError
from mixllm_compiler.formats.layout import Layout, Packing, pack, packing, register_packing
from mixllm_compiler.formats.plain import row_order
from mixllm_compiler.quantizers.rtn import quantize_rtn

WIDTHS = torch.tensor([8, 4, 2, 4, 8], dtype=torch.uint8)


def weight(transform=""):
    return quantize_rtn(torch.randn(5, 70), WIDTHS, 32, transform)


def test_its_text():
    layout = Layout(768, ((4, 704), (8, 64)), 128)
    assert str(layout) == "k768 w4:704 w8:64 g128 asym plain.v1"
    assert (layout.n, layout.padded_k, layout.groups) == (768, 768, 6)


def test_a_transform_is_part_of_it():
    layout = pack(weight("hadamard:32"), "plain.v1").layout
    assert str(layout).endswith("plain.v1 hadamard:32")
    assert Layout.parse(str(layout)) == layout


def test_packed_rows_lie_by_width_and_then_in_model_order():
    packed = pack(weight(), "plain.v1")
    assert packed.layout.widths == ((2, 1), (4, 2), (8, 2))
    assert row_order(packed.blob, packed.layout).tolist() == [2, 1, 3, 0, 4]


def test_sections_of_the_plain_blob_begin_at_16_bytes():
    packed = pack(weight(), "plain.v1")
    # order 20, then codes, scales, zeros of 1 row w2, 2 rows w4, 2 rows w8 (without zeros)
    parts = [20, 18, 6, 1, 70, 12, 4, 140, 12]
    assert packed.blob.numel() == sum(-(-size // 16) * 16 for size in parts)


@pytest.mark.parametrize("text", ["", "w4:3 g128", "k8 w8:1 w4:1 g16 asym plain.v1"])
def test_other_text(text):
    with pytest.raises(OptionError, match=r"is no layout|not in ascending order"):
        Layout.parse(text)


def test_an_unknown_packing_names_the_nearest():
    with pytest.raises(OptionError, match=r"unknown packing 'plain.v9'. Did you mean 'plain.v1'\?"):
        packing("plain.v9")


def test_a_packing_of_ones_own(monkeypatch):
    from mixllm_compiler.formats import layout

    monkeypatch.setattr(layout, "_PACKINGS", dict(layout._PACKINGS))
    plain = packing("plain.v1")
    register_packing(Packing("mine.v1", plain.pack, plain.unpack))
    assert pack(weight(), "mine.v1").layout.packing == "mine.v1"
