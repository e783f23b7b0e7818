"""`plain.v1` gives back every matrix exactly, whatever its shape and mix of widths."""

from __future__ import annotations

import hypothesis.strategies as st
import torch
from hypothesis import given

from mixllm_compiler.formats.layout import Layout, pack, unpack
from mixllm_compiler.formats.row_format import WIDTHS, RowFormat, width_bytes
from mixllm_compiler.quantizers.rtn import quantize_rtn


@st.composite
def quantized(draw):
    n, k = draw(st.integers(1, 40)), draw(st.integers(1, 200))
    group = draw(st.sampled_from((16, 32, 48, 128)))
    mix = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=6))
    seed = draw(st.integers(0, 2**32))
    generator = torch.Generator().manual_seed(seed)
    widths = torch.tensor(mix, dtype=torch.uint8)[
        torch.randint(len(mix), (n,), generator=generator)
    ]
    w = torch.randn(n, k, generator=generator)
    return quantize_rtn(w, widths, group, draw(st.sampled_from(("", "hadamard:16"))))


@given(quantized())
def test_round_trip(weight):
    packed = pack(weight, "plain.v1")
    again = unpack(packed)
    assert (again.n, again.k, again.group) == (weight.n, weight.k, weight.group)
    assert (again.family, again.transform) == (weight.family, weight.transform)
    assert torch.equal(again.widths, weight.widths)
    assert again.rows.keys() == weight.rows.keys()
    for bits, rows in weight.rows.items():
        assert torch.equal(again.rows[bits].codes, rows.codes)
        assert torch.equal(again.rows[bits].scales, rows.scales)
        assert (again.rows[bits].zeros is None) == (rows.zeros is None)
        if rows.zeros is not None:
            assert torch.equal(again.rows[bits].zeros, rows.zeros)
    assert torch.equal(again.dequantize(), weight.dequantize())


@given(quantized())
def test_the_same_weight_packs_into_the_same_bytes(weight):
    assert torch.equal(pack(weight, "plain.v1").blob, pack(weight, "plain.v1").blob)


@given(quantized())
def test_the_layout_says_what_is_in_the_blob(weight):
    layout = Layout.parse(str(pack(weight, "plain.v1").layout))
    assert layout == Layout.of(weight, "plain.v1")
    assert (layout.n, layout.k) == (weight.n, weight.k)


@given(quantized())
def test_bytes_follow_from_widths_alone(weight):
    rows = sum(RowFormat(int(b), weight.group).row_bytes(weight.k) for b in weight.widths.tolist())
    assert weight.true_bytes() == rows + width_bytes(weight.n)
