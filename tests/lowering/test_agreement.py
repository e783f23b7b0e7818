"""What a quantizer behind a norm may do differently from its definition, and what not."""

from __future__ import annotations

import pytest
import torch

from mixllm_compiler.lowering.agreement import disagreement
from mixllm_compiler.lowering.lowered import expand_quantize_activation


def quantized(m=200, k=512):
    return expand_quantize_activation(torch.randn(m, k), "token", 128, 0, "cuda.v1")


def with_codes(expected, rows, columns, by):
    codes = expected[0].clone()
    codes[rows, columns] = (codes[rows, columns].int() + by).to(torch.int8)
    return codes, expected[1], codes.sum(-1, keepdim=True, dtype=torch.int32)


def test_equal_results_agree():
    expected = quantized()
    assert disagreement(expected, expected) == ""
    assert disagreement(quantized(0), quantized(0)) == ""


def test_a_few_codes_may_be_off_by_one():
    expected = quantized()
    some = torch.arange(100)
    at = expected[0][some].abs().argmin(-1)  # stays in range
    assert disagreement(with_codes(expected, some, at, 1), expected) == ""


def test_no_code_may_be_off_by_two():
    expected = quantized()
    at = expected[0][7].abs().argmin()
    assert "off by 2.00" in disagreement(with_codes(expected, 7, at, 2), expected)


def test_many_codes_may_not_differ():
    expected = quantized()
    codes = expected[0].clone()
    codes[:, ::50] = (codes[:, ::50].int() - 1).clamp(-127).to(torch.int8)
    found = codes, expected[1], codes.sum(-1, keepdim=True, dtype=torch.int32)
    assert "codes of 102400 differ" in disagreement(found, expected)


def test_a_maximum_that_is_rounded_otherwise_moves_its_token_only():
    x = torch.randn(200, 512)
    expected = expand_quantize_activation(x, "token", 128, 0, "cuda.v1")
    x[3] *= torch.where(x[3].abs() == x[3].abs().max(), 1.004, 1.0)
    moved = expand_quantize_activation(x, "token", 128, 0, "cuda.v1")
    assert int((moved[0] != expected[0]).sum()) > 50
    assert disagreement(moved, expected) == ""


@pytest.mark.parametrize(
    "rows, says", [(slice(None), "tokens have another scale"), (0, "off by 5")]
)
def test_scales_are_those_of_the_definition(rows, says):
    expected = quantized()
    scales = expected[1].clone()
    scales[rows] *= 1.004 if rows != 0 else 1.05
    assert says in disagreement((expected[0], scales, expected[2]), expected)


def test_sums_are_those_of_the_codes():
    codes, scales, sums = quantized()
    assert disagreement((codes, scales, sums + 1), (codes, scales, sums)) != ""
