"""Moments of inputs against the sums that they stand for."""

from __future__ import annotations

import pytest
import torch

from mixllm_compiler.calibration.moments import Moments

CPU = torch.device("cpu")


@pytest.mark.parametrize("k", [1, 40, 512, 700])  # 700: more than one block of columns
def test_sums_over_batches_of_any_size(k):
    x_hat, x = torch.randn(90, k), torch.randn(90, k)
    found = Moments(k, CPU, cross=True)
    for at, size, held in ((0, 30, False), (30, 1, False), (31, 40, True), (71, 19, False)):
        here = slice(at, at + size)
        found.add(x_hat[here], x[here], held)
    assert (found.tokens, found.held_tokens) == (90, 40)

    a, b, out = x_hat.double(), x.double(), slice(31, 71)
    second = found.second()
    assert torch.equal(second, second.t())
    close = {"rtol": 1e-4, "atol": 1e-5}
    assert torch.allclose(second.double(), a.t() @ a / 90, **close)
    assert torch.allclose(found.cross().double(), (b - a).t() @ a / 90, **close)
    held_second, held_cross = found.held()
    assert torch.allclose(held_second.double(), a[out].t() @ a[out] / 90, **close)
    assert torch.allclose(held_cross.double(), (b - a)[out].t() @ a[out] / 90, **close)


def test_reading_changes_nothing():
    found = Moments(20, CPU, cross=True)
    found.add(torch.randn(9, 20), torch.randn(9, 20))
    found.add(torch.randn(9, 20), torch.randn(9, 20), True)
    first = (found.second(), found.cross(), *found.held())
    assert all(map(torch.equal, first, (found.second(), found.cross(), *found.held())))


def test_half_precision_is_summed_in_fp32():
    x = torch.randn(400, 8).to(torch.bfloat16)
    found = Moments(8, CPU, cross=False)
    found.add(x)
    assert found.second().dtype == torch.float32
    assert torch.allclose(found.second(), x.float().t() @ x.float() / 400, rtol=1e-5, atol=1e-6)
