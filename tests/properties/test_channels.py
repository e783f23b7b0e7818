"""Scales and shifts of channels: invisible in x Wᵀ + b, finite for channels that are dead."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mixllm_compiler.calibration.statistics import ChannelStatistics
from mixllm_compiler.transforms.channels import (
    InputChannels,
    awq_scale,
    best_alpha,
    centre,
    smooth_scale,
    static_scale,
)

SEEDS = st.integers(0, 2**32)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(SEEDS, st.floats(0, 1), st.sampled_from(("awq", "smooth", "static")))
def test_the_product_stays_and_dead_channels_are_finite(seed, alpha, method):
    x, w, b = draw(seed, 7, 12).exp() * 3, draw(seed + 1, 5, 12), draw(seed + 2, 5)
    x[:, 4] = 0
    z = centre(x.amin(0), x.amax(0))
    s = {
        "awq": awq_scale(x.abs().mean(0), alpha),
        "smooth": smooth_scale(x.abs().amax(0), w.abs().amax(0), alpha),
        "static": static_scale(x.amin(0) - z, x.amax(0) - z),
    }[method]
    assert bool((s > 0).all() & s.isfinite().all())
    assert s.log().mean() == pytest.approx(0, abs=1e-9)
    got = InputChannels(s, z)(x) @ (w * s).t() + b + w @ z
    assert torch.allclose(got, x @ w.t() + b, rtol=1e-9, atol=1e-9)


@given(SEEDS)
def test_static_scales_of_centred_channels_give_one_symmetric_range(seed):
    x = draw(seed, 9, 6) * draw(seed + 1, 6).exp() + draw(seed + 2, 6)
    z = centre(x.amin(0), x.amax(0))
    y = InputChannels(static_scale(x.amin(0) - z, x.amax(0) - z), z)(x)
    assert torch.allclose(y.amax(0), y.amax().expand(6))
    assert torch.allclose(y.amin(0), -y.amax().expand(6))


def test_the_exponent_of_least_error_is_taken():
    mean = torch.tensor([1.0, 4.0, 16.0])
    wanted = awq_scale(mean, 0.7)
    found = best_alpha(lambda a: awq_scale(mean, a), lambda s: float((s - wanted).abs().sum()))
    assert torch.equal(found, wanted)


@given(SEEDS, st.integers(1, 20))
def test_statistics_of_parts_are_those_of_the_whole(seed, first):
    x = draw(seed, 21, 6)
    seen = ChannelStatistics(6, x.device, sample=4)
    seen.add(x[:first])
    seen.add(x[first:].view(1, -1, 6))
    assert seen.tokens == 21
    assert torch.allclose(seen.mean_abs, x.abs().mean(0))
    assert torch.equal(seen.max_abs, x.abs().amax(0))
    assert torch.equal(seen.low, x.amin(0))
    assert torch.equal(seen.high, x.amax(0))
    assert 2 <= len(seen.sample) <= 8
