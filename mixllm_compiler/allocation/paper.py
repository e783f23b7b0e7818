"""The paper's rule: the most salient output features get the high width, all others the low one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import BudgetError

PAPER_WIDTHS = (4, 8)
PAPER_FRACTION = 0.1
"""Of all rows, how many get the high width."""


def top_by_count(score: Tensor, fraction: float, low: int, high: int) -> Tensor:
    """`high` for the round(fraction · R) rows of the largest score, `low` for the rest.

    Args:
        score: float [R]; of equal scores the earlier row goes first.
        fraction: from 0 to 1.
        low, high: any two numbers, e.g. widths in bits.

    Returns:
        int64 [R].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"a fraction of rows lies between 0 and 1, {fraction} does not")
    return _top(score, round(fraction * len(score)), low, high)


def top_by_bytes(score: Tensor, extra: Tensor, room: int, low: int, high: int) -> Tensor:
    """`high` for as many rows, from the largest score on, as `room` bytes hold.

    Args:
        score: float [R]; of equal scores the earlier row goes first.
        extra: int64 [R], bytes by which a row grows from `low` to `high`.
        room: bytes beyond all rows at `low`.
        low, high: any two numbers, e.g. widths in bits.

    Returns:
        int64 [R].

    Raises:
        BudgetError: not even `low` fits.
    """
    if room < 0:
        raise BudgetError(f"all rows at the low width take {-room:,} bytes more than the budget")
    total = extra[_ranking(score)].cumsum(0)
    return _top(score, int((total <= room).sum()), low, high)


def _ranking(score: Tensor) -> Tensor:
    return score.argsort(descending=True, stable=True)


def _top(score: Tensor, count: int, low: int, high: int) -> Tensor:
    out = torch.full((len(score),), low, dtype=torch.int64, device=score.device)
    out[_ranking(score)[:count]] = high
    return out
