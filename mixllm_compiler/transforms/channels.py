"""Scales and shifts of a linear's input channels: x′ = (x − z) / s, W′ = W diag(s), b′ = b + W z.

The float function stays equal for any s > 0 and z. These are the choices of published methods;
all take statistics over calibration text and give float64 [K].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_LEAST = 1e-3  # of the mean: channels that calibration never reached must not vanish


def awq_scale(mean_abs: Tensor, alpha: float) -> Tensor:
    """s = mean|x|^α (AWQ, arXiv 2306.00978): more resolution for weights of strong channels."""
    return _centred(_positive(mean_abs) ** alpha)


def smooth_scale(max_abs: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """s = max|x|^α / max|w|^(1−α) (SmoothQuant, arXiv 2211.10438).

    Args:
        weight_max: [K] max |w| of a channel over all linears that read x.
    """
    return _centred(_positive(max_abs) ** alpha / _positive(weight_max) ** (1 - alpha))


def static_scale(low: Tensor, high: Tensor) -> Tensor:
    """s that gives every channel one range on calibration text, so that int8 needs one constant.

    The per-channel static step of MergeQuant (arXiv 2503.07654), merged into norm and weights;
    after `centre`, OutlierTune's folded dequantization (arXiv 2406.18832).
    """
    return _centred(_positive(torch.maximum(high.abs(), low.abs())))


def centre(low: Tensor, high: Tensor) -> Tensor:
    """z that makes every channel's range symmetric (OutlierTune's symmetrization)."""
    return (low + high) / 2


def best_alpha(
    scale: Callable[[float], Tensor], error: Callable[[Tensor], float], steps: int = 10
) -> Tensor:
    """The scale of the exponent i / steps, 0 ≤ i < steps, that has the least error."""
    return min((scale(i / steps) for i in range(steps)), key=error)


class InputChannels(nn.Module):
    """(x − z) / s in front of a linear where no producer could take it."""

    factor: Tensor | None
    shift: Tensor | None

    def __init__(self, scale: Tensor | None, shift: Tensor | None) -> None:
        """From s and z, [K]; None for ones and zeros."""
        super().__init__()
        self.register_buffer("factor", None if scale is None else 1 / scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.shift is None else x - self.shift
        return x if self.factor is None else x * self.factor


def _positive(x: Tensor) -> Tensor:
    x = x.double()
    return x.clamp_min(max(_LEAST * float(x.mean()), 1e-30))


def _centred(s: Tensor) -> Tensor:
    """Over its geometric mean: the weights keep their size."""
    return s / s.log().mean().exp()
