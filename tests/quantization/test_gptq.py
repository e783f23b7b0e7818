"""GPTQ against a plain optimal brain surgeon, and what must hold whatever its inputs are."""

from __future__ import annotations

import pytest
import torch

from mixllm_compiler.errors import WeightError
from mixllm_compiler.formats.row_format import FAMILIES
from mixllm_compiler.quantizers.encode import encode
from mixllm_compiler.quantizers.gptq import quantize_gptq
from mixllm_compiler.quantizers.hessian import damp, factorize
from tests.quantization.support import MIXED, losses, matrix, second_moment, widths

BOTH = pytest.mark.parametrize("family", FAMILIES)


def gptq(w, bits, h, group, family, **settings):
    factor = factorize(h, group, "w")
    return quantize_gptq(w, bits, h, factor, group, family, **settings)


@BOTH
@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sweeps", [0, 4])
def test_it_beats_nearest_codes_on_correlated_inputs(family, bits, sweeps):
    w, h = matrix(32, 128), second_moment(128)
    wide = widths(32, bits)
    nearest = encode(w, wide, 64, family, importance=h.diagonal()).dequantize()
    ours = gptq(w, wide, h, 64, family, sweeps=sweeps).dequantize()
    assert losses(w, ours, h).sum() < 0.6 * losses(w, nearest, h).sum()


@BOTH
@pytest.mark.parametrize("group", [0, 32])
def test_it_is_the_optimal_brain_surgeon(family, group):
    """Codes of the grids that it chose, worked out with explicit inverses in float64."""
    w, h, bits = matrix(12, 112), second_moment(112), widths(12, *MIXED)
    factor = factorize(h, group, "w")
    coded = encode(w, bits, group, family, factor=factor)
    inverse = torch.linalg.inv(damp(h, 0.01))
    left = (w / coded.scale[:, None]).double()
    per_weight = [
        torch.cat(
            [
                v[:, g, None].expand(-1, len(range(112)[coded.columns(g)]))
                for g in range(v.shape[1])
            ],
            1,
        ).double()
        for v in (coded.step, coded.offset, coded.top)
    ]
    codes = torch.empty(w.shape, dtype=torch.float64)
    for j in factor.columns.tolist():
        step, offset, top = (v[:, j] for v in per_weight)
        q = ((left[:, j] - offset) / step).round().clamp(min=0).minimum(top)
        codes[:, j] = q
        error = (left[:, j] - offset - step * q) / inverse[j, j]
        left -= torch.outer(error, inverse[j])
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    same = (codes == coded.codes.double()).all(1)  # one tie in a row changes all that follow
    assert same.float().mean() > 0.8
    assert (codes == coded.codes.double()).float().mean() > 0.97


@BOTH
@pytest.mark.parametrize("group", [0, 32])
def test_uncorrelated_inputs_leave_nothing_to_correct(family, group):
    """Nearest codes, then: whatever the order of groups, codes are in the model's columns."""
    w, h = matrix(16, 150), torch.diag(torch.linspace(0.1, 3, 150))
    factor = factorize(h, group, "w")
    if group:
        assert factor.groups == (3, 4, 2, 1, 0)  # by falling importance; group 4 is short
    bits = widths(16, *MIXED)
    ours = encode(w, bits, group, family, factor=factor)
    nearest = encode(w, bits, group, family, importance=h.diagonal())
    assert torch.equal(ours.codes, nearest.codes)
    assert torch.equal(ours.dequantize(), nearest.dequantize())


@BOTH
@pytest.mark.parametrize("k, group", [(200, 64), (33, 128), (1, 16), (130, 128), (100, 0)])
def test_short_last_groups(family, k, group):
    w, h = matrix(8, k), second_moment(k)
    coded = gptq(w, widths(8, 6, 8), h, group, family)
    stored = coded.stored()
    stored.check()
    assert (stored.n, stored.k) == (8, k)
    assert losses(w, coded.dequantize(), h).sum() < 0.01 * losses(w, torch.zeros(8, k), h).sum()


@BOTH
def test_rows_do_not_depend_on_each_other(family):
    w, h, bits = matrix(40, 128), second_moment(128), widths(40, *MIXED)
    together = gptq(w, bits, h, 32, family)
    some = torch.tensor([3, 4, 5, 11, 17, 30, 39])
    alone = gptq(w[some], bits[some], h, 32, family)
    # A product of fewer rows may round differently in its last bit, which can decide a tie.
    same = (alone.codes == together.codes[some]).all(1)
    assert same.sum() >= len(some) - 1
    ours, theirs = losses(w[some], alone.dequantize(), h), losses(w, together.dequantize(), h)
    assert torch.allclose(ours, theirs[some], rtol=0.05)


@BOTH
def test_siblings_below_each_other_are_as_good_as_apart(family):
    h = second_moment(128)
    q, v = matrix(24, 128, seed=1), matrix(8, 128, seed=2) * 30
    bits = widths(32, 4, 3, 8)
    parts = gptq(torch.cat([q, v]), bits, h, 32, family).split([24, 8])
    for w, wide, part in ((q, bits[:24], parts[0]), (v, bits[24:], parts[1])):
        alone = gptq(w, wide, h, 32, family)
        assert (part.codes == alone.codes).float().mean() > 0.98
        assert torch.allclose(
            losses(w, part.dequantize(), h).sum(),
            losses(w, alone.dequantize(), h).sum(),
            rtol=0.02,
        )


@BOTH
def test_the_same_inputs_give_the_same_bytes(family):
    w, h, bits = matrix(16, 128), second_moment(128), widths(16, *MIXED)
    first, second = (gptq(w.clone(), bits, h.clone(), 32, family).stored() for _ in range(2))
    for b, rows in first.rows.items():
        for one, other in zip(rows.tensors(), second.rows[b].tensors(), strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


@BOTH
def test_the_arguments_stay_as_they_were(family):
    w, h, bits = matrix(8, 64), second_moment(64), widths(8, 4)
    copies = w.clone(), h.clone(), bits.clone()
    gptq(w, bits, h, 32, family)
    assert all(map(torch.equal, (w, h, bits), copies))


@BOTH
@pytest.mark.parametrize("dead", [slice(3, 20), slice(32, 64), slice(0, 96)])
def test_inputs_that_never_move(family, dead):
    """One column, a whole group, or all of them: no NaN, and the living ones lose nothing."""
    w, h = matrix(16, 96), second_moment(96)
    h[dead], h[:, dead] = 0, 0
    coded = gptq(w, widths(16, 4, 8), h, 32, family)
    coded.stored().check()
    found = coded.dequantize()
    assert found.isfinite().all()
    nearest = encode(w, widths(16, 4, 8), 32, family, importance=h.diagonal()).dequantize()
    assert losses(w, found, h).sum() <= losses(w, nearest, h).sum()


# -- the factor ----------------------------------------------------------------------------------


def test_the_factor_is_of_the_damped_inverse_in_its_order():
    h = second_moment(100)
    factor = factorize(h, 32, "w")
    assert sorted(factor.columns.tolist()) == list(range(100))
    sums = [float(h.diagonal()[g * 32 : (g + 1) * 32].sum()) for g in factor.groups]
    assert sums == sorted(sums, reverse=True)
    assert torch.equal(factor.upper, factor.upper.triu())
    damped = h.double() + 0.01 * h.double().diagonal().mean() * torch.eye(100)
    ordered = damped[factor.columns][:, factor.columns]
    upper = factor.upper.double()
    assert torch.allclose(upper.t() @ upper @ ordered, torch.eye(100).double(), atol=1e-4)
    assert torch.equal(factor.diagonal, h.diagonal())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_no_numbers_name_the_layer(value):
    h = second_moment(32)
    h[4, 4] = value
    with pytest.raises(WeightError, match=r"inputs of layers\.3\.q are NaN or infinite"):
        factorize(h, 32, "layers.3.q")


@pytest.mark.parametrize("off", [3.0, float("nan")])
def test_a_matrix_that_is_no_second_moment_names_the_layer(off):
    h = torch.eye(32)
    h[1, 0] = h[0, 1] = off
    with pytest.raises(WeightError, match=r"Hessian of layers\.3\.q is not positive definite.*rtn"):
        factorize(h, 32, "layers.3.q")


def test_too_few_tokens_need_the_damping():
    x = torch.randn(5, 64)
    h = x.t() @ x / 5
    factorize(h, 32, "w")
    with pytest.raises(WeightError, match="calibrate on more text"):
        factorize(h, 32, "w", damping=0.0)
