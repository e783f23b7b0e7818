"""Weights, correlated inputs, and what an error of the weights costs on them."""

from __future__ import annotations

import torch
from torch import Tensor

from mixllm_compiler.formats.row_format import WIDTHS

MIXED = (*WIDTHS, 4, 3)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def matrix(n: int, k: int, seed: int = 0) -> Tensor:
    """W [N, K] with a few outliers, as trained weights have them."""
    draw = generator(seed)
    w = torch.randn(n, k, generator=draw) * 0.05
    return w * torch.where(torch.rand(n, k, generator=draw) < 0.01, 4.0, 1.0)


def widths(n: int, *bits: int) -> Tensor:
    """uint8 [N], the given widths in turn."""
    return torch.tensor(bits, dtype=torch.uint8).repeat(-(-n // len(bits)))[:n]


def inputs(tokens: int, k: int, seed: int = 0) -> Tensor:
    """x [T, K]: a few strong common directions, channels of very different size, noise."""
    draw = generator(seed + 1000)
    directions = torch.randn(max(2, k // 8), k, generator=draw)
    common = torch.randn(tokens, len(directions), generator=draw) @ directions
    size = torch.randn(k, generator=draw).exp()
    return (common * 0.5 + torch.randn(tokens, k, generator=draw)) * size


def second_moment(k: int, seed: int = 0, tokens: int = 2048) -> Tensor:
    x = inputs(tokens, k, seed)
    return x.t() @ x / tokens


def losses(w: Tensor, w_hat: Tensor, h: Tensor) -> Tensor:
    """float64 [N]: e H eᵀ of every row e of W − Ŵ."""
    e, h = w.double() - w_hat.double(), h.double()
    return ((e @ h) * e).sum(1)
