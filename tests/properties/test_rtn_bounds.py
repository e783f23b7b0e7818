"""Round-to-nearest: how far a stored value can be from the float one, in every format."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mixllm_compiler.errors import WeightError
from mixllm_compiler.formats.row_format import WIDTHS, RowFormat
from mixllm_compiler.quantizers.rtn import quantize_rows, quantize_rtn

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TINY = 2.0**-24


@st.composite
def matrices(draw):
    """(W [n, k], group): random values with a few groups that are extreme in one way."""
    n, k = draw(st.integers(1, 6)), draw(st.integers(1, 300))
    group = draw(st.sampled_from((16, 64, 128)))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    w = torch.randn(n, k, generator=generator).double() * 2.0 ** draw(st.integers(-26, 10))
    for row in range(n):
        start = group * draw(st.integers(0, (k - 1) // group))
        part = w[row, start : start + group]
        match draw(st.sampled_from(("as is", "zero", "one sign", "outlier", "far from zero"))):
            case "zero":
                part.zero_()
            case "one sign":
                part.abs_()
            case "outlier":
                part[0] = 30_000
            case "far from zero":
                part.add_(1000)
    return w.to(dtype), group


@given(matrices(), st.sampled_from(WIDTHS))
def test_error_is_half_a_step_and_what_the_fp16_scale_loses(matrix, bits):
    w, group = matrix
    fmt = RowFormat(bits, group)
    rows = quantize_rows(w, fmt)
    error = (rows.dequantize(torch.float64) - w.double()).abs()
    assert rows.codes.min() >= fmt.qmin
    assert rows.codes.max() <= fmt.qmax
    for g, part in enumerate(w.double().split(group, 1)):
        lo, hi = part.amin(1), part.amax(1)
        short = part.shape[1] < group
        constant = lo == hi
        if fmt.symmetric:
            span, steps = part.abs().amax(1), 127
        else:
            span, steps = hi.clamp_min(0) - lo.clamp_max(0), fmt.qmax
        steps = torch.where(constant, 1, steps)
        ideal, s = span / steps, rows.scales[:, g].double()
        # fp16 keeps 11 bits, subnormal numbers fewer; a scale is never zero.
        off = torch.where(span > 0, (s - ideal).abs(), 0)
        assert (off <= ideal * 2.0**-11 + TINY).all(), short
        allowed = s / 2 + (span - steps * s).clamp_min(0)
        worst = error[:, g * group : (g + 1) * group].amax(1)
        assert (worst <= allowed * (1 + 1e-4)).all()


@given(matrices(), st.sampled_from(WIDTHS))
def test_zero_groups_are_exact(matrix, bits):
    w, group = matrix
    w[:, :group] = 0
    assert (quantize_rows(w, RowFormat(bits, group)).dequantize()[:, :group] == 0).all()


@given(
    value=st.floats(width=16, allow_nan=False, allow_infinity=False),
    bits=st.sampled_from(WIDTHS),
    n=st.integers(1, 3),
    k=st.integers(1, 70),
    dtype=st.sampled_from((torch.float16, torch.float32, torch.float64)),
)
def test_a_group_of_one_fp16_number_is_exact(value, bits, n, k, dtype):
    w = torch.full((n, k), value, dtype=dtype)
    assert torch.equal(quantize_rows(w, RowFormat(bits, 32)).dequantize(), w.double())


@given(st.sampled_from(DTYPES), st.sampled_from(WIDTHS), st.floats(1e-300, 1e-9))
def test_values_below_fp16_are_stored_within_its_smallest_number(dtype, bits, value):
    w = torch.tensor([[value, -value, value / 3]], dtype=torch.float64).to(dtype)
    error = quantize_rows(w, RowFormat(bits)).dequantize() - w.double()
    assert error.abs().max() <= TINY


@given(st.sampled_from(WIDTHS), st.sampled_from((1e8, 1e30, -3e38, float("inf"))))
def test_values_beyond_fp16_are_refused(bits, value):
    w = torch.zeros(2, 40)
    w[1, 7] = value
    with pytest.raises(WeightError):
        quantize_rows(w, RowFormat(bits, 16))


@given(matrices(), st.data())
def test_rows_do_not_depend_on_their_neighbours(matrix, data):
    w, group = matrix
    mix = st.lists(st.sampled_from(WIDTHS), min_size=len(w), max_size=len(w))
    widths = torch.tensor(data.draw(mix), dtype=torch.uint8)
    whole = quantize_rtn(w, widths, group).dequantize()
    for i, bits in enumerate(widths.tolist()):
        alone = quantize_rows(w[i : i + 1], RowFormat(bits, group)).dequantize()
        assert torch.equal(whole[i : i + 1], alone)
