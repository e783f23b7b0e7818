"""Grids: the values that the weights of a group may take, and the search for the best one.

Whatever the format, a row's group has values step·q + offset with q = 0 … top: asymmetric rows
have step s and offset −s·z, symmetric ones s and −127·s, two-level rows (in units of the row's
scale) the integers t and c − 128. So round-to-nearest, GPTQ and the descent know one grid only.

Clipping: a smaller range costs the outliers and serves the rest. Ranges are tried from the whole
one down to 0.7 of it; the least error, weighted by how much each input matters (diag E[x xᵀ]),
wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WeightError

RATIOS = tuple(1 - 0.03 * i for i in range(11))
_FINE = 4  # ratios worth trying from 5 bits on: fine grids lose by clipping
_DESCENT = 2  # rounds of least squares for t and c
_FP16_TINY = 2.0**-24  # the smallest positive fp16 number
_FP16_MAX = 65504.0


@dataclass(frozen=True)
class Grid:
    """Groups x [..., g] of weights: values step·q + offset, q = 0 … top; fp32 [...] each."""

    step: Tensor
    offset: Tensor
    top: Tensor

    def codes(self, x: Tensor) -> Tensor:
        """Nearest q of values [..., g], as floats."""
        q = torch.addcmul(-(self.offset / self.step)[..., None], x, (1 / self.step)[..., None])
        return q.round_().clamp_(min=0).minimum(self.top[..., None])

    def values(self, q: Tensor) -> Tensor:
        """The values of codes q [..., g]."""
        return torch.addcmul(self.offset[..., None], q, self.step[..., None])

    def errors(self, x: Tensor, importance: Tensor) -> Tensor:
        """[...] Σ_k importance[k] · (x − nearest value)².

        Importance is [g], or [G, g] for x [R, G, g].
        """
        u = torch.addcmul(-(self.offset / self.step)[..., None], x, (1 / self.step)[..., None])
        q = u.round().clamp_(min=0)
        torch.minimum(q, self.top[..., None], out=q)
        return weighted(u.sub_(q).square_(), importance) * self.step.square()

    def where(self, better: Tensor, other: Grid) -> Grid:
        """This grid in rows that are `better`, the other one elsewhere."""
        return Grid(
            torch.where(better, self.step, other.step),
            torch.where(better, self.offset, other.offset),
            torch.where(better, self.top, other.top),
        )

    def put(self, rows: Tensor, part: Grid) -> None:
        """Write the grid of some rows in place."""
        self.step[rows], self.offset[rows], self.top[rows] = part.step, part.offset, part.top


def weighted(x: Tensor, importance: Tensor) -> Tensor:
    """Σ_k x[..., k] · importance[k], each group with its own weights if it has some."""
    return x @ importance if importance.dim() == 1 else torch.linalg.vecdot(x, importance)


class _Best:
    """The candidate with the least error so far, row by row."""

    def __init__(self, x: Tensor, importance: Tensor) -> None:
        self.x, self.importance = x, importance
        self.grid: Grid | None = None
        self.error: Tensor | None = None

    def offer(self, grid: Grid) -> None:
        error = grid.errors(self.x, self.importance)
        if self.grid is None or self.error is None:
            self.grid, self.error = grid, error
            return
        better = error < self.error
        self.grid = grid.where(better, self.grid)
        self.error = torch.minimum(error, self.error)


def ratios_for(bits: int, clip: bool) -> Sequence[float]:
    """Which shares of the range are worth trying at a width."""
    return RATIOS[: _FINE if bits > 4 else None] if clip else RATIOS[:1]


def asym_grid(x: Tensor, top: Tensor, importance: Tensor, ratios: Sequence[float]) -> Grid:
    """fp16 step and integer zero point for groups x [..., g]; the range always holds zero.

    Raises:
        WeightError: a scale does not fit fp16.
    """
    lo, hi = x.amin(-1).clamp_(max=0), x.amax(-1).clamp_(min=0)
    best = _Best(x, importance)
    for ratio in ratios:
        step = fp16_scale((hi - lo) * ratio / top).float()
        zero = torch.minimum((-lo * ratio / step).round_().clamp_(min=0), top)
        best.offer(Grid(step, -step * zero, top))
    assert best.grid is not None
    return best.grid


def symmetric_grid(x: Tensor, importance: Tensor, ratios: Sequence[float]) -> Grid:
    """fp16 step for groups x [..., g], codes −127 … 127.

    Raises:
        WeightError: a scale does not fit fp16.
    """
    most = x.abs().amax(-1)
    best = _Best(x, importance)
    for ratio in ratios:
        step = fp16_scale(most * ratio / 127).float()
        best.offer(Grid(step, -127 * step, torch.full_like(step, 254)))
    assert best.grid is not None
    return best.grid


def two_level_grid(
    x: Tensor, top: Tensor, importance: Tensor, ratios: Sequence[float], descent: int = _DESCENT
) -> Grid:
    """Integer step t ≥ 1 and offset c − 128 in [−127, 0] for groups x [..., g].

    x is in units of the row's scale.

    Beside clipped ranges, `descent` rounds try the integers next to the least-squares step and
    offset of the present codes.
    """
    lo, hi = x.amin(-1).clamp_(-127, 0), x.amax(-1).clamp_(0, 127)
    best = _Best(x, importance)
    for ratio in ratios:
        offset = (lo * ratio).round_()
        step = (hi - lo) * (ratio / top)
        best.offer(_two_level(step.floor(), offset, top))
        best.offer(_two_level(step.ceil(), offset, top))
    weight = importance.sum(-1)
    for _ in range(descent):
        grid = best.grid
        assert grid is not None
        q = grid.codes(x)
        mean_q, mean_x = weighted(q, importance) / weight, weighted(x, importance) / weight
        variance = weighted(q.square(), importance) / weight - mean_q.square()
        covariance = weighted(q * x, importance) / weight - mean_q * mean_x
        step = torch.where(variance > 1e-6, covariance / variance.clamp(min=1e-6), grid.step)
        step = step.round_().clamp_(1, 255)
        best.offer(_two_level(step, (mean_x - step * mean_q).round_(), top))
        best.offer(_two_level(grid.step, (mean_x - grid.step * mean_q).round_(), top))
    assert best.grid is not None
    return best.grid


def _two_level(step: Tensor, offset: Tensor, top: Tensor) -> Grid:
    """Legal integers near the given ones: codes must expand into [−127, 127]."""
    step, offset = step.clamp(1, 255), offset.clamp(-127, 0)
    return Grid(step, offset, torch.minimum(top, ((127 - offset) / step).floor_()))


def fp16_scale(s: Tensor) -> Tensor:
    """Positive fp16 scales; a group of zeros gets 1.

    Raises:
        WeightError: one is too large for fp16.
    """
    if bool((s > _FP16_MAX).any()):
        raise WeightError(
            f"a weight group needs the scale {s.max().item():.3g}, fp16 holds at most 65504; "
            "rescale the layer or exclude it from quantization"
        )
    return torch.where(s > 0, s.clamp_min(_FP16_TINY), torch.ones_like(s)).to(torch.float16)
