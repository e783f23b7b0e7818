"""Trellis rows: the code's rule, the search, and what they gain."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mixllm_compiler.quantizers.gptq import quantize_gptq
from mixllm_compiler.quantizers.grid import Grid
from mixllm_compiler.quantizers.hessian import factorize
from mixllm_compiler.quantizers.list_search import (
    Code,
    levels_of,
    quantize_by_search,
    quantize_trellis,
    search,
)

CPU = torch.device("cpu")


def all_levels(size: int, states: int) -> Tensor:
    """Every sequence of levels 0 … 7 that a code allows: [4^size, size]."""
    bits = torch.tensor(list(itertools.product((0, 1), repeat=size)))
    return torch.cat([levels_of(bits, u.expand(len(bits), size), states) for u in bits])


@pytest.mark.parametrize("states", [4, 8, 16])
def test_viterbi_finds_the_best_sequence(states: int) -> None:
    torch.manual_seed(states)
    y = torch.rand(20, 6) * 16 - 4
    grid = Grid(torch.full((20,), 2.0), torch.full((20,), -3.0), torch.full((20,), 7.0))
    upper = torch.diag(torch.rand(6) + 0.5)  # no feedback: Viterbi's algorithm is exact
    levels, left = search(y, grid, upper, Code.trellis(states, 1, CPU))
    tried = ((y[:, None] - 2 * all_levels(6, states) + 3) / upper.diagonal()).square().sum(-1)
    torch.testing.assert_close(left.square().sum(1), tried.amin(1))
    torch.testing.assert_close(((y - 2 * levels + 3) / upper.diagonal()), left)


@pytest.mark.parametrize("survivors", [1, 3])
def test_fed_back_residuals_add_up_to_the_error(survivors: int) -> None:
    torch.manual_seed(survivors)
    a = torch.randn(40, 40)
    h = a @ a.t() / 40 + 0.5 * torch.eye(40)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    y = torch.rand(30, 40) * 16 - 4
    grid = Grid(torch.full((30,), 2.0), torch.full((30,), -3.0), torch.full((30,), 7.0))
    levels, left = search(y, grid, upper, Code.trellis(4, survivors, CPU))
    error = y - 2 * levels + 3
    quadratic = ((error @ h) * error).sum(1)
    torch.testing.assert_close(left.square().sum(1), quadratic, rtol=1e-4, atol=1e-4)


def bits_of(levels: Tensor) -> Tensor:
    """u of four states: the next level's parity; of a group's last weight from its own level."""
    u = torch.zeros_like(levels)
    u[:, :-1] = levels[:, 1:] % 2
    u[:, -1] = (levels[:, -1] // 2 % 2) ^ u[:, -3]
    return u


def test_rows_obey_the_code_and_beat_plain_ones() -> None:
    torch.manual_seed(0)
    x = torch.randn(2000, 256) @ torch.randn(256, 256) * torch.rand(256)
    h, w = x.t() @ x / 2000, torch.randn(48, 256)
    widths = torch.tensor([2, 3, 4], dtype=torch.uint8).repeat(16)
    factor = factorize(h, 128, "w")
    coded = quantize_trellis(w, widths, h, factor, 128, survivors=2)
    for g in range(2):
        levels = coded.codes[:, coded.columns(g)].long()
        assert bool((levels < 2 ** (widths[:, None] + 1)).all())
        assert torch.equal(levels_of(levels // 4, bits_of(levels)), levels)
        assert bool((coded.values(g).abs() <= 127).all())
    plain = quantize_gptq(w, widths, h, factor, 128, "two-level")

    def error(w_hat: Tensor) -> float:
        return float((((w - w_hat) @ h) * (w - w_hat)).sum())

    assert error(coded.dequantize()) < 0.95 * error(plain.dequantize())


def test_the_search_serves_plain_rows_too() -> None:
    """With enough survivors nothing is lost: the best of all codes."""
    torch.manual_seed(1)
    a = torch.randn(5, 5)
    h = a @ a.t() + 0.1 * torch.eye(5)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    y = torch.rand(20, 5) * 8 - 3
    grid = Grid(torch.full((20,), 2.0), torch.full((20,), -3.0), torch.full((20,), 3.0))
    levels, _ = search(y, grid, upper, Code.plain(64, CPU))
    codes = torch.tensor(list(itertools.product(range(4), repeat=5))).float()

    def error(tried: Tensor) -> Tensor:
        left = y[:, None] - (2 * tried - 3)
        return ((left @ h) * left).sum(-1)

    best = error(codes[None]).amin(1)
    assert bool((levels <= 3).all())
    assert float((error(levels[:, None])[:, 0] / best).mean()) < 1.05


def test_searched_rows_beat_those_of_gptq() -> None:
    torch.manual_seed(2)
    x = torch.randn(2000, 200) @ torch.randn(200, 200) * torch.rand(200)
    h, w = x.t() @ x / 2000, torch.randn(60, 200)
    widths = torch.tensor([2, 3, 4, 5, 6, 8], dtype=torch.uint8).repeat(10)
    factor = factorize(h, 128, "w")
    searched = quantize_by_search(w, widths, h, factor, 128)
    plain = quantize_gptq(w, widths, h, factor, 128, "two-level")
    searched.stored().check()
    assert torch.equal(searched.widths, widths)

    def error(w_hat: Tensor) -> Tensor:
        return (((w - w_hat) @ h) * (w - w_hat)).sum(1)

    before, after = error(plain.dequantize()), error(searched.dequantize())
    for bits in (2, 3, 4, 5, 6):
        rows = widths == bits
        assert float(after[rows].sum()) < 0.99 * float(before[rows].sum()), bits
    torch.testing.assert_close(after[widths == 8], before[widths == 8])


def test_only_rows_of_8_bits_or_none_of_them() -> None:
    torch.manual_seed(3)
    x = torch.randn(300, 64)
    h, w = x.t() @ x / 300, torch.randn(5, 64)
    factor = factorize(h, 32, "w")
    for bits in (3, 8):
        widths = torch.full((5,), bits, dtype=torch.uint8)
        quantize_by_search(w, widths, h, factor, 32).stored().check()
