"""What every launcher does with tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for an output; its contents are arbitrary."""
    return torch.empty(shape, dtype=dtype, device=device)


def rows_of(x: Tensor) -> Tensor:
    """x [..., K] as rows [M, K] of neighbouring elements; a copy only where they lie apart."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()
