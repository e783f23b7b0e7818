"""Descent: no row ever gets worse, codes stay legal, and it is worth its time."""

from __future__ import annotations

import copy

import pytest
import torch

from mixllm_compiler.formats.row_format import WIDTHS
from mixllm_compiler.quantizers.descent import descend
from mixllm_compiler.quantizers.encode import encode
from mixllm_compiler.quantizers.hessian import damp, factorize
from tests.quantization.support import MIXED, losses, matrix, second_moment, widths


def descended(w, coded, h, sweeps):
    after = copy.deepcopy(coded)
    descend(w, after, h, sweeps)
    return after


@pytest.mark.parametrize("start", ["nearest", "gptq"])
@pytest.mark.parametrize("group, k", [(32, 150), (0, 90), (64, 128)])
@pytest.mark.parametrize("seed", [0, 1])
def test_no_row_ever_loses(start, group, k, seed):
    """In tr(E H Eᵀ) of the damped H that it minimizes, after every sweep."""
    w, h, bits = matrix(24, k, seed), second_moment(k, seed), widths(24, *MIXED)
    factor = factorize(h, group, "w") if start == "gptq" else None
    coded = encode(w, bits, group, "two-level", factor=factor)
    damped = damp(h, 0.01)
    before = losses(w, coded.dequantize(), damped)
    for _ in range(3):
        descend(w, coded, h, 1)
        after = losses(w, coded.dequantize(), damped)
        assert (after <= before * (1 + 1e-4)).all()
        coded.stored().check()
        stored = coded.stored().dequantize()
        assert (stored - coded.dequantize()).abs().max() <= 1e-6 * w.abs().max()
        before = after


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_width_gains_after_gptq(bits):
    w, h = matrix(32, 128), second_moment(128)
    coded = encode(w, widths(32, bits), 64, "two-level", factor=factorize(h, 64, "w"))
    before = losses(w, coded.dequantize(), h).sum()
    after = losses(w, descended(w, coded, h, 4).dequantize(), h).sum()
    assert after < 0.97 * before


def test_codes_stay_within_their_widths():
    w, h = matrix(24, 150), second_moment(150)
    bits = widths(24, *MIXED)
    coded = encode(w, bits, 32, "two-level", factor=factorize(h, 32, "w"))
    after = descended(w, coded, h, 4)
    largest = after.codes.amax(1)
    assert (largest <= torch.where(bits == 8, 254, 2 ** bits.int() - 1)).all()
    eight = bits == 8
    assert (after.step[eight] == 1).all()
    assert (after.offset[eight] == -127).all()
    assert torch.equal(after.step, after.step.round())
    assert torch.equal(after.offset, after.offset.round())


def test_the_largest_integers_stay_legal():
    """Rows of ±127 have no room: neither step, offset nor code may leave it."""
    w = torch.where(torch.rand(12, 64) < 0.5, -1.0, 1.0) * (1 + 0.05 * torch.rand(12, 64))
    h = second_moment(64)
    coded = encode(w, widths(12, *MIXED), 32, "two-level", factor=factorize(h, 32, "w"))
    after = descended(w, coded, h, 6)
    after.stored().check()
    for bits in WIDTHS:
        assert after.stored().row_codes(bits).integers().abs().max() <= 127


@pytest.mark.parametrize("kind", ["zero row", "one value", "dead inputs"])
def test_degenerate_rows_stay_finite(kind):
    w, h = matrix(8, 64), second_moment(64)
    if kind == "zero row":
        w[3] = 0
    elif kind == "one value":
        w[3] = 0.25
    else:
        h[:40], h[:, :40] = 0, 0
    coded = encode(w, widths(8, 2, 4, 6, 8), 32, "two-level", factor=factorize(h, 32, "w"))
    after = descended(w, coded, h, 3)
    after.stored().check()
    assert after.dequantize().isfinite().all()
    if kind == "zero row":
        assert (after.dequantize()[3] == 0).all()


def test_no_sweeps_still_fit_the_scale_of_the_row():
    w, h = matrix(8, 64), second_moment(64)
    coded = encode(w, widths(8, 3), 32, "two-level")
    coded.scale *= 1.1
    after = descended(w, coded, h, 0)
    assert torch.equal(after.codes, coded.codes)
    damped = damp(h, 0.01)
    best = losses(w, after.dequantize(), damped)
    for factor in (0.99, 1.01):
        assert (losses(w, after.dequantize() * factor, damped) >= best).all()


def test_rows_do_not_depend_on_each_other():
    w, h, bits = matrix(24, 128), second_moment(128), widths(24, *MIXED)
    coded = encode(w, bits, 32, "two-level")
    some = torch.tensor([1, 2, 9, 20])
    alone = encode(w[some], bits[some], 32, "two-level")
    together, apart = descended(w, coded, h, 2), descended(w[some], alone, h, 2)
    # A product of fewer rows may round differently in its last bit, which can decide a tie.
    assert (together.codes[some] == apart.codes).float().mean() > 0.98
