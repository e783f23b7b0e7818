"""Second moments of a linear's inputs: what weight quantizers know about the calibration text."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 512  # columns of x xᵀ formed at a time; only its lower triangle is


class Moments:
    """Sums over tokens of x̂ x̂ᵀ and (x − x̂) x̂ᵀ, x̂ being what the quantized model feeds a linear.

    Tokens that are held out count in the sums and apart, so that a fit on the others can be judged.

    Attributes:
        tokens, held_tokens: so far.
    """

    def __init__(self, k: int, device: torch.device, cross: bool) -> None:
        """Zero moments of K inputs; `cross`: with (x − x̂) x̂ᵀ."""
        self.tokens = self.held_tokens = 0
        self._sums = [self._zero(k, device, cross) for _ in range(2)]  # fitted on, held out

    @staticmethod
    def _zero(k: int, device: torch.device, cross: bool) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(k, k, device=device) for _ in range(1 + cross))

    def add(self, x_hat: Tensor, x: Tensor | None = None, held_out: bool = False) -> None:
        """Add tokens x̂ [T, K] and, with cross moments, their float counterparts x [T, K]."""
        sums = self._sums[held_out]
        x_hat = x_hat.float()
        add_gram(sums[0], x_hat)
        if len(sums) > 1:
            assert x is not None
            sums[1].addmm_((x.float() - x_hat).t(), x_hat)
        self.tokens += len(x_hat)
        self.held_tokens += held_out * len(x_hat)

    def second(self) -> Tensor:
        """fp32 [K, K] E[x̂ x̂ᵀ] over all tokens."""
        return whole((self._sums[0][0] + self._sums[1][0]) / self.tokens)

    def cross(self) -> Tensor:
        """fp32 [K, K] E[(x − x̂) x̂ᵀ] over all tokens."""
        return (self._sums[0][1] + self._sums[1][1]) / self.tokens

    def held(self) -> tuple[Tensor, Tensor]:
        """The shares of `second` and `cross` that held-out tokens contribute."""
        second, cross = self._sums[1]
        return whole(second / self.tokens), cross / self.tokens


def add_gram(total: Tensor, x: Tensor) -> None:
    """total [K, K] += xᵀx, its lower block triangle only."""
    for at in range(0, x.shape[-1], _BLOCK):
        part = total[at:, at : at + _BLOCK]
        torch.addmm(part, x[:, at:].t(), x[:, at : at + _BLOCK], out=part)


def whole(h: Tensor) -> Tensor:
    """A symmetric matrix from its lower triangle, in place."""
    return h.tril_() + h.tril(-1).t()
