"""Rows whose groups share a step and an offset: `span` neighbouring groups of K have one of each.

A row with span 2 has groups twice as long as its matrix. Kernels need not know: they see every
group's step and offset, and rows of all spans are alike to them. What is stored is less.
"""

from __future__ import annotations

import torch
from torch import Tensor

SPANS = (1, 2, 4)


def shared(values: Tensor, spans: Tensor) -> Tensor:
    """Values per group [n, G] → what is stored: flat, one for every `spans` [n] groups of a row."""
    return values[_firsts(values.shape[1], spans.to(values.device))]


def spread_out(stored: Tensor, spans: Tensor, groups: int) -> Tensor:
    """Inverse of `shared`: values per group [n, G]."""
    first = _firsts(groups, spans.to(stored.device))
    places = first.flatten().long().cumsum(0) - 1
    return stored[places].view(first.shape)


def _firsts(groups: int, spans: Tensor) -> Tensor:
    """bool [n, G]: groups that begin a run of those that share."""
    place = torch.arange(groups, device=spans.device)
    return place % spans.long()[:, None] == 0
