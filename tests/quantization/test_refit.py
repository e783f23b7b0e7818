"""Refit: what it recovers, what it leaves alone."""

from __future__ import annotations

import pytest
import torch

from mixllm_compiler.quantizers.refit import LAMBDAS, refit
from tests.quantization.support import generator, inputs, matrix


def moments(x_hat, x, held):
    """h, d, held_h, held_d, share of tokens [T, K]; `held` of them are held out."""
    total, out = len(x), slice(len(x) - held, len(x))
    h, d = x_hat.t() @ x_hat / total, (x - x_hat).t() @ x_hat / total
    held_h = x_hat[out].t() @ x_hat[out] / total
    held_d = (x - x_hat)[out].t() @ x_hat[out] / total
    return h, d, held_h, held_d, held / total


def distortion(k):
    """A [K, K], far from the identity and well conditioned."""
    return torch.eye(k) + 0.3 * torch.randn(k, k, generator=generator(7)) / k**0.5


def test_a_linear_distortion_of_the_inputs_is_undone():
    k = 48
    w, a, x = matrix(16, k), distortion(k), torch.randn(4000, k, generator=generator(1))
    corrected, strength = refit(w, *moments(x @ a.t(), x, 500))
    assert strength == LAMBDAS[0]
    fresh = torch.randn(1000, k, generator=generator(2))
    wanted, before = fresh @ w.t(), fresh @ a.t() @ w.t()
    after = fresh @ a.t() @ corrected.t()
    assert (after - wanted).norm() < 0.05 * (before - wanted).norm()
    exact = w @ torch.linalg.inv(a)
    assert (corrected - exact).norm() < 0.05 * (w - exact).norm()


def test_what_the_whole_text_says_is_solved_in_float64():
    k = 32
    w, x = matrix(8, k), inputs(1000, k)
    args = moments(x @ distortion(k).t(), x, 125)
    corrected, strength = refit(w, *args)
    h, d = args[0].double(), args[1].double()
    ridge = strength * h.diagonal().mean() * torch.eye(k)
    expected = w.double() + w.double() @ d @ torch.linalg.inv(h + ridge)
    assert torch.allclose(corrected.double(), expected, rtol=1e-4, atol=1e-6)


def test_equal_inputs_leave_the_weights_alone():
    w, x = matrix(8, 32), inputs(500, 32)
    corrected, strength = refit(w, *moments(x, x, 60))
    assert strength is None
    assert torch.equal(corrected, w)


def test_what_does_not_hold_on_the_held_out_tokens_is_not_done():
    """The last tokens are distorted the other way round."""
    w, x = matrix(8, 32), torch.randn(800, 32, generator=generator(3))
    by = 0.2 * torch.randn(32, 32, generator=generator(4)) / 32**0.5
    sign = torch.where(torch.arange(800) < 700, 1.0, -1.0)[:, None]
    corrected, strength = refit(w, *moments(x + sign * (x @ by), x, 100))
    assert strength is None
    assert torch.equal(corrected, w)


def test_few_noisy_tokens_ask_for_a_stronger_ridge_than_many():
    k, w = 64, matrix(16, 64)

    def chosen(tokens):
        draw = generator(5)
        x = torch.randn(tokens, k, generator=draw)
        x_hat = x @ distortion(k).t() + 0.5 * torch.randn(tokens, k, generator=draw)
        return refit(w, *moments(x_hat, x, tokens // 8))[1]

    few, many = chosen(96), chosen(20_000)
    assert many in LAMBDAS
    assert few is None or few > many


def test_rows_that_do_not_matter_have_no_vote():
    """Row 0 reads inputs on which the fit holds, row 1, much larger, those on which it fails."""
    x = torch.randn(1600, 32, generator=generator(6))
    factor = torch.full_like(x, 1.3)
    factor[1400:, 16:] = 0.7
    w = torch.zeros(2, 32)
    w[0, :16], w[1, 16:] = 1.0, 10.0
    args = moments(x * factor, x, 200)
    assert refit(w, *args)[1] is None
    corrected, strength = refit(w, *args, torch.tensor([1.0, 0.0]))
    assert strength is not None
    assert torch.allclose(corrected[0, :16], torch.full((16,), 1 / 1.3), atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_float_weights_come_back_in_fp32(dtype):
    x = inputs(300, 16)
    corrected, _ = refit(matrix(4, 16).to(dtype), *moments(x * 1.1, x, 40))
    assert corrected.dtype == torch.float32


def test_dead_inputs():
    x = inputs(300, 16)
    x[:, 3:6] = 0
    w = matrix(4, 16)
    corrected, strength = refit(w, *moments(x * 1.2, x, 40))
    assert strength is not None
    assert torch.equal(corrected[:, 3:6], w[:, 3:6])
    others = [0, 1, 2, *range(6, 16)]
    fresh = inputs(100, 16, seed=1)[:, others]
    wanted = fresh @ w[:, others].t()
    off = (1.2 * fresh @ corrected[:, others].t() - wanted).norm()
    assert off < 0.2 * (0.2 * wanted).norm()
