"""What transforms of a linear's input know about it: ranges and means per channel, a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor


class ChannelStatistics:
    """Running statistics of inputs x [T, K].

    Attributes:
        tokens: so far.
        mean_abs, max_abs, low, high: float64 [K] mean |x|, max |x|, min x, max x.
        sample: some of the tokens [S, K], evenly spaced in each batch.
    """

    def __init__(self, k: int, device: torch.device, sample: int = 0) -> None:
        """Nothing seen yet of K channels; keep `sample` tokens of each batch."""
        zeros = torch.zeros(k, dtype=torch.float64, device=device)
        self.tokens, self._sum, self._wanted = 0, zeros, sample
        self.low, self.high = zeros + torch.inf, zeros - torch.inf
        self._samples: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """Add tokens x [..., K] of any float dtype."""
        x = x.detach().reshape(-1, x.shape[-1])
        self.tokens += len(x)
        self._sum = self._sum + x.abs().sum(0, dtype=torch.float64)
        self.low = torch.minimum(self.low, x.amin(0))
        self.high = torch.maximum(self.high, x.amax(0))
        if self._wanted:
            self._samples.append(x[:: -(-len(x) // self._wanted)].clone())

    @property
    def mean_abs(self) -> Tensor:
        return self._sum / self.tokens

    @property
    def max_abs(self) -> Tensor:
        return torch.maximum(self.high.abs(), self.low.abs())

    @property
    def sample(self) -> Tensor:
        return torch.cat(self._samples)
