"""The simulated trellis: it finds the nearest sequence, and a matrix keeps its outputs."""

from __future__ import annotations

import itertools

import torch

from exl3 import codebook, quantize, viterbi

CPU = torch.device("cpu")


def test_viterbi_finds_the_nearest_of_all_sequences() -> None:
    torch.manual_seed(0)
    values = codebook(CPU, 4)  # 16 states, 2 bits a weight
    x = torch.randn(6, 4)
    found = viterbi(x, 2, values)
    tried = []
    for first, *rest in itertools.product(range(16), *[range(4)] * 3):
        states = [first]
        for new in rest:
            states.append((states[-1] << 2 | new) & 15)
        tried.append(values[states])
    error = (x[:, None] - torch.stack(tried)).square().sum(-1)
    torch.testing.assert_close((x - found).square().sum(-1), error.amin(1))


def test_more_states_lie_nearer() -> None:
    torch.manual_seed(1)
    x = torch.randn(8, 256)
    error = [float((x - viterbi(x, 3, codebook(CPU, bits))).square().mean()) for bits in (3, 6, 10)]
    assert error[0] > error[1] > error[2] > 4.0**-3  # the last is what no code goes below


def test_feedback_lowers_the_error_of_outputs() -> None:
    torch.manual_seed(2)
    x = torch.randn(1000, 128) @ torch.randn(128, 128) * torch.rand(128)
    h, w = x.t() @ x / 1000, torch.randn(32, 128)
    values = codebook(CPU, 6)

    def error(w_hat: torch.Tensor) -> float:
        return float((((w - w_hat) @ h) * (w - w_hat)).sum())

    alone = quantize(w, torch.eye(128), 3, values)
    assert error(quantize(w, h, 3, values)) < 0.8 * error(alone)
