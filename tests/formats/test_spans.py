"""Rows whose groups share steps and offsets: stored once, alike to everything that reads them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixllm_compiler.errors import OptionError, WeightError
from mixllm_compiler.formats.layout import pack, unpack
from mixllm_compiler.formats.neutral import QuantizedWeight
from mixllm_compiler.formats.row_format import RowFormat, width_bytes
from mixllm_compiler.formats.spans import SPANS, shared, spread_out
from mixllm_compiler.options import Options
from mixllm_compiler.quantizers.rtn import quantize_rtn


def spread_rows(n: int, choices, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.tensor(choices, dtype=torch.uint8)[
        torch.randint(len(choices), (n,), generator=generator)
    ]


def quantized(n: int = 37, k: int = 700, seed: int = 0) -> QuantizedWeight:
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    widths, spans = spread_rows(n, (2, 4, 5, 8), seed), spread_rows(n, SPANS, seed + 1)
    spans[widths == 8] = 1
    return quantize_rtn(w, widths, 128, "", "two-level", clip=True, spans=spans)


@given(st.data())
def test_sharing_is_exactly_undone(data):
    n, groups = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 11))
    spans = torch.tensor(data.draw(st.lists(st.sampled_from(SPANS), min_size=n, max_size=n)))
    values = torch.randint(1, 255, (n, groups), dtype=torch.uint8)
    alike = spread_out(shared(values, spans), spans, groups)
    for row, span in enumerate(spans.tolist()):
        assert torch.equal(alike[row], values[row][torch.arange(groups) // span * span])
    assert torch.equal(shared(alike, spans), shared(values, spans))


def test_a_row_with_a_span_is_a_row_with_longer_groups():
    weight = quantized()
    w = torch.randn(37, 700, generator=torch.Generator().manual_seed(0))
    for row, (bits, span) in enumerate(
        zip(weight.widths.tolist(), weight.spans.tolist(), strict=True)
    ):
        alone = quantize_rtn(
            w[row : row + 1], weight.widths[row : row + 1], 128 * span, "", "two-level", clip=True
        )
        assert torch.equal(alone.dequantize(), weight.dequantize()[row : row + 1]), (bits, span)


def test_true_bytes_are_those_of_the_formats():
    weight = quantized()
    rows = sum(
        RowFormat(bits, 128 * span, "two-level").row_bytes(weight.k)
        for bits, span in zip(weight.widths.tolist(), weight.spans.tolist(), strict=True)
    )
    assert weight.true_bytes() == rows + width_bytes(weight.n)
    assert weight.expanded().true_bytes() > weight.true_bytes()


def test_packings_see_every_group_and_spans_come_back():
    weight = quantized()
    there = unpack(pack(weight, "plain.v1"))
    assert there.spans is None
    assert torch.equal(there.dequantize(), weight.dequantize())
    again = there.sharing(weight.spans)
    assert again.true_bytes() == weight.true_bytes()
    assert torch.equal(again.dequantize(), weight.dequantize())


def test_groups_that_differ_cannot_share():
    weight = quantized().expanded()
    weight.rows[4].steps[0, 1] = weight.rows[4].steps[0, 0] ^ 3
    with pytest.raises(WeightError, match="share a step"):
        weight.sharing(torch.full((weight.n,), 4, dtype=torch.uint8))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"spans": (2,)}, "choose 1 and others"),
        ({"spans": (1, 3)}, "choose 1 and others"),
        ({"spans": (1, 2), "family": "asym"}, "need two-level rows"),
        ({"spans": (1, 2), "group": 0}, "need two-level rows"),
        ({"spans": (1, 4), "group": 512}, "at most 1024 weights, not .* in groups of 512"),
    ],
)
def test_impossible_spans_are_refused(options, message):
    with pytest.raises(OptionError, match=message):
        Options(**options)


def test_formats_are_ordered_and_eight_bits_have_no_groups():
    options = Options(widths=(4, 8, 2), spans=(1, 2))
    assert [str(f) for f in options.formats] == [
        "w2 g128 two-level",
        "w2 g256 two-level",
        "w4 g128 two-level",
        "w4 g256 two-level",
        "w8 g128 two-level",
    ]
