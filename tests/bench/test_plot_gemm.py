"""The roofline plot shows every line of the results, over the limit of the same results."""

from __future__ import annotations

import pytest

from plot_gemm import Roof, plot, series

SHAPES = {name: {"n": 4096, "k": 4096} for name in ("qkv", "o", "gate_up", "down", "70b_down")}


def results(*rows, device="NVIDIA H200"):
    return {"device": device, "extra": {"matrices": SHAPES}, "rows": list(rows)}


ONE = {"linear": "sum", "tokens": 1, "gemm us": 40.0, "bf16 us": 120.0, "read us": 20.0}
MANY = {"linear": "sum", "tokens": 4096, "gemm us": 500.0, "bf16 us": 900.0, "fp8 us": 480.0}
PEER = {"linear": "sum", "peer": "some library", "quantizer": "inside", "tokens": 1, "us": 50.0}


def test_the_limit_is_the_longer_of_reading_and_multiplying():
    roof = Roof.of(results(ONE, MANY))
    operations = 4 * 2 * 4096 * 4096
    assert roof.us(1) == 20.0
    assert roof.us(4096) == pytest.approx(4096 * operations / 1.979e9)
    assert roof.tops(1, 40.0) == pytest.approx(operations / 40e-6 * 1e-12)


def test_every_line_of_the_results_is_drawn_peers_by_name():
    found = {label: (tokens, us) for label, _, _, tokens, us in series(results(MANY, ONE, PEER))}
    assert found["mixllm, model order"] == ([1, 4096], [40.0, 500.0])
    assert found["cuBLAS fp8"] == ([4096], [480.0])
    assert found["some library, quantizer inside"] == ([1], [50.0])
    speed, distance = plot(results(MANY, ONE, PEER)).axes
    assert [line.get_label() for line in speed.lines][2:] == list(found)
    assert len(distance.lines) == len(found) + 1  # and the limit


@pytest.mark.parametrize("content", [results(MANY), results(ONE, device="NVIDIA X1")])
def test_results_without_a_limit_are_refused(content):
    with pytest.raises(SystemExit, match="do not say how fast"):
        Roof.of(content)
