"""Grids and nearest codes: what is stored is what was chosen, and clipping only helps."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from mixllm_compiler.errors import WeightError
from mixllm_compiler.formats.row_format import FAMILIES, WIDTHS
from mixllm_compiler.quantizers.encode import encode
from mixllm_compiler.quantizers.hessian import factorize
from tests.quantization.support import MIXED, losses, matrix, second_moment, widths

BOTH = pytest.mark.parametrize("family", FAMILIES)


@st.composite
def encodings(draw):
    """(W, widths, group, family, clip, importance): shapes that end within a group included."""
    n, k = draw(st.integers(1, 10)), draw(st.integers(1, 200))
    mix = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=4))
    w = matrix(n, k, draw(st.integers(0, 10_000))) * 10.0 ** draw(st.integers(-4, 3))
    kind = draw(st.sampled_from(("plain", "zero row", "constant", "one sign")))
    if kind == "zero row":
        w[0] = 0
    elif kind == "constant":
        w[0] = w[0, 0]
    elif kind == "one sign":
        w = w.abs()
    importance = torch.rand(k) if draw(st.booleans()) else None
    group, family = draw(st.sampled_from((0, 16, 64, 128))), draw(st.sampled_from(FAMILIES))
    return w, widths(n, *mix), group, family, draw(st.booleans()), importance


@settings(max_examples=60)
@given(encodings())
def test_what_is_stored_is_what_was_chosen(case):
    w, bits, group, family, clip, importance = case
    coded = encode(w, bits, group, family, importance=importance, clip=clip)
    stored = coded.stored()
    stored.check()
    assert torch.equal(stored.widths, bits)
    largest = w.abs().amax(1, keepdim=True)
    off = (stored.dequantize() - coded.dequantize().double()).abs()
    assert (off <= 1e-6 * largest + 1e-12).all()


@settings(max_examples=60)
@given(encodings())
def test_every_code_is_the_nearest_of_its_grid(case):
    w, bits, group, family, clip, importance = case
    coded = encode(w, bits, group, family, importance=importance, clip=clip)
    for g in range(coded.step.shape[1]):
        columns = coded.columns(g)
        step, offset = coded.step[:, g, None], coded.offset[:, g, None]
        q = coded.codes[:, columns].float()
        assert (q <= coded.top[:, g, None]).all()
        x = w[:, columns] / coded.scale[:, None]
        here = (x - offset - step * q).abs()
        for other in (q - 1, q + 1):
            legal = (other >= 0) & (other <= coded.top[:, g, None])
            there = (x - offset - step * other).abs()
            assert (~legal | (here <= there + 1e-3 * step)).all()


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("seed", range(3))
def test_clipping_never_loses_in_any_asym_group(bits, seed):
    """In the weighted error; the whole range is one of the candidates."""
    w, importance = matrix(12, 160, seed), torch.rand(160) + 0.01
    clipped, plain = (
        encode(w, widths(12, bits), 32, "asym", importance=importance, clip=clip).dequantize()
        for clip in (True, False)
    )
    for columns in range(0, 160, 32):
        here = slice(columns, columns + 32)
        own = torch.diag(importance[here])
        better = losses(w[:, here], clipped[:, here], own)
        worse = losses(w[:, here], plain[:, here], own)
        assert (better <= worse * (1 + 1e-5)).all()


@pytest.mark.parametrize("seed", range(3))
def test_clipping_never_loses_in_any_two_level_row_of_8_bits(seed):
    w, importance = matrix(12, 160, seed), torch.rand(160) + 0.01
    clipped, plain = (
        encode(w, widths(12, 8), 32, "two-level", importance=importance, clip=clip).dequantize()
        for clip in (True, False)
    )
    own = torch.diag(importance)
    assert (losses(w, clipped, own) <= losses(w, plain, own) * (1 + 1e-5)).all()


@BOTH
@pytest.mark.parametrize("bits, gain", [(2, 0.95), (3, 0.95), (4, 0.97), (5, 1), (6, 1)])
def test_clipping_gains_where_steps_are_coarse(family, bits, gain):
    w, importance = matrix(48, 512), torch.rand(512) + 0.01
    own = torch.diag(importance)
    clipped, plain = (
        losses(
            w,
            encode(w, widths(48, bits), 128, family, importance=importance, clip=clip).dequantize(),
            own,
        ).sum()
        for clip in (True, False)
    )
    assert clipped <= gain * plain


@BOTH
def test_importance_decides_what_is_clipped(family):
    """An outlier that no input reads does not cost the others their resolution."""
    w = matrix(8, 64)
    w[:, 5] = 0.4
    unread = torch.ones(64)
    unread[5] = 1e-9
    others = torch.arange(64) != 5

    def error(importance):
        coded = encode(w, widths(8, 4), 64, family, importance=importance, clip=True)
        return (coded.dequantize() - w)[:, others].square().sum()

    assert error(unread) < 0.9 * error(torch.ones(64))


@BOTH
def test_more_bits_are_closer(family):
    w = matrix(16, 256)
    errors = [
        float((encode(w, widths(16, b), 128, family).dequantize() - w).square().sum())
        for b in WIDTHS
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 500 * errors[-1]


@BOTH
def test_rows_of_one_width_are_the_same_in_a_mix(family):
    w, bits = matrix(16, 200), widths(16, *MIXED)
    mixed = encode(w, bits, 64, family)
    for b in WIDTHS:
        rows = bits == b
        alone = encode(w[rows], bits[rows], 64, family)
        assert torch.equal(alone.dequantize(), mixed.dequantize()[rows])


@BOTH
def test_more_rows_than_are_worked_on_at_a_time(family, monkeypatch):
    w, bits = matrix(16, 100), widths(16, 8, 3, 4)
    whole = encode(w, bits, 32, family)
    monkeypatch.setattr("mixllm_compiler.quantizers.encode._ROWS", 5)
    monkeypatch.setattr("mixllm_compiler.quantizers.encode._CACHE_CHUNK", 400)
    parts = encode(w, bits, 32, family)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.dequantize(), whole.dequantize())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@BOTH
def test_weights_that_are_no_numbers_are_refused(family, value):
    w = matrix(4, 40)
    w[3, 39] = value
    with pytest.raises(WeightError, match="NaN or infinite"):
        encode(w, widths(4, 4), 32, family)


def test_a_scale_beyond_fp16_is_a_matter_of_the_asym_family():
    w = matrix(4, 40) * 1e9
    with pytest.raises(WeightError, match="fp16 holds at most 65504"):
        encode(w, widths(4, 4), 32, "asym")
    coded = encode(w, widths(4, 4), 32, "two-level")
    assert (coded.dequantize() - w).norm() < 0.2 * w.norm()


def test_as_many_widths_as_rows():
    with pytest.raises(ValueError, match=r"\[3\] widths for 4 rows"):
        encode(matrix(4, 40), widths(3, 4), 32, "asym")


@BOTH
def test_a_split_gives_back_the_matrices(family):
    w, bits = matrix(15, 100), widths(15, 8, 3, 4)
    factor = factorize(second_moment(100), 32, "w")
    coded = encode(w, bits, 32, family, factor=factor)
    parts = coded.split([4, 1, 10])
    assert [len(p.codes) for p in parts] == [4, 1, 10]
    assert torch.equal(torch.cat([p.dequantize() for p in parts]), coded.dequantize())
    assert torch.equal(parts[2].stored().dequantize(), coded.stored().dequantize()[5:])
