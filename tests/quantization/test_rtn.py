from __future__ import annotations

import pytest
import torch

from mixllm_compiler.errors import OptionError, WeightError
from mixllm_compiler.formats.row_format import RowFormat
from mixllm_compiler.quantizers.rtn import quantize_rows, quantize_rtn


def test_a_row_worked_out_by_hand():
    # span 7.5 − (−2.5) = 10 over 15 steps: s = 0.6667 (fp16), z = round(2.5 / s) = 4
    w = torch.tensor([[-2.5, 0.0, 1.0, 7.5]])
    rows = quantize_rows(w, RowFormat(4, 16))
    assert rows.scales.item() == torch.tensor(10 / 15).half().item()
    assert rows.zeros.tolist() == [[4]]
    assert rows.codes.tolist() == [[0, 4, 6, 15]]


def test_symmetric_rows_use_127_steps_on_both_sides():
    rows = quantize_rows(torch.tensor([[-12.7, 6.3, 0.1]]), RowFormat(8, 16))
    assert rows.zeros is None
    assert rows.codes.dtype == torch.int8
    assert rows.codes.tolist() == [[-127, 63, 1]]


def test_zero_is_always_in_the_range():
    rows = quantize_rows(torch.tensor([[5.0, 6.0, 7.0]]), RowFormat(2, 16))
    assert rows.zeros.tolist() == [[0]]
    assert rows.scales.item() == torch.tensor(7 / 3).half().item()


def test_a_mixed_matrix_keeps_model_order():
    w = torch.randn(6, 40)
    widths = torch.tensor([8, 2, 4, 8, 3, 2], dtype=torch.uint8)
    weight = quantize_rtn(w, widths, 16)
    assert weight.counts() == {2: 2, 3: 1, 4: 1, 8: 2}
    for i, bits in enumerate(widths.tolist()):
        alone = quantize_rows(w[i : i + 1], RowFormat(bits, 16)).dequantize()
        assert torch.equal(weight.dequantize()[i : i + 1], alone)
    assert weight.model_rows(8).tolist() == [0, 3]
    assert weight.order().tolist() == [1, 5, 4, 2, 0, 3]


def test_more_bits_are_closer():
    w = torch.randn(32, 256)
    errors = [
        (quantize_rows(w, RowFormat(b)).dequantize() - w).square().mean().item()
        for b in (2, 3, 4, 5, 6, 8)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] / errors[-1] > 1000


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_same_weights_same_bytes(bits):
    w, widths = torch.randn(8, 100), torch.full((8,), bits, dtype=torch.uint8)
    a, b = quantize_rtn(w, widths), quantize_rtn(w.clone(), widths)
    assert torch.equal(a.rows[bits].codes, b.rows[bits].codes)
    assert torch.equal(a.rows[bits].scales, b.rows[bits].scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_no_numbers_are_refused(bits, value, dtype):
    w = torch.randn(4, 100).to(dtype)
    w[2, 99] = value  # in the short last group
    with pytest.raises(WeightError, match="NaN or infinite"):
        quantize_rows(w, RowFormat(bits, 64))


def test_a_scale_beyond_fp16_says_which_and_what_to_do():
    with pytest.raises(WeightError, match=r"needs the scale 1e\+08.*exclude it"):
        quantize_rows(torch.full((1, 16), 1e8), RowFormat(4, 16))


def test_a_width_that_does_not_exist():
    with pytest.raises(OptionError, match="a row cannot have 7 bits"):
        quantize_rtn(torch.ones(1, 16), torch.tensor([7], dtype=torch.uint8))
