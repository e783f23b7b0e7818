"""Block-diagonal orthonormal Hadamard transform (Sylvester's construction)."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OptionError

ROTATED_INPUT = "input_rotation"
"""Buffer of a module whose input comes rotated already: the block's size."""

_CACHED = 1 << 15  # numbers that stay in a core's cache: eight times as fast as whole matrices


def hadamard_matrix(block: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Symmetric orthonormal [block, block]; its own inverse.

    Raises:
        OptionError: the block is not a power of two.
    """
    _check(block)
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < block:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    return (h / block**0.5).to(dtype)


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """Transform the last dimension of x [..., K] in blocks; K must be a multiple of `block`.

    Sums are formed in pairs (log2(block) rounds of butterflies), not by a matrix product: that
    keeps fp32 within 1e-6 of the sum of magnitudes, gives every row the same bits whatever the
    other rows are, and no reduced-precision mode of matrix units touches it.

    Raises:
        OptionError: the block is not a power of two, or K is not a multiple of it.
    """
    _check(block)
    if x.shape[-1] % block:
        raise OptionError(f"K = {x.shape[-1]} is not a multiple of the Hadamard block {block}")
    rows = x.numel() // x.shape[-1] if x.numel() else 0
    in_parts = x.device.type == "cpu" and not x.requires_grad
    if in_parts and rows > 1 and x.numel() > 2 * _CACHED:
        parts = x.reshape(rows, -1).split(max(1, _CACHED // x.shape[-1]))
        return torch.cat([_butterflies(part, block) for part in parts]).view(x.shape)
    return _butterflies(x, block)


def _butterflies(x: Tensor, block: int) -> Tensor:
    y, half = x.unflatten(-1, (-1, block)), 1
    while half < block:
        a, b = y.unflatten(-1, (-1, 2, half)).unbind(-2)
        y = torch.stack((a + b, a - b), -2).flatten(-3)
        half *= 2
    return (y * block**-0.5).flatten(-2)


def _check(block: int) -> None:
    if block < 1 or block & (block - 1):
        raise OptionError(f"a Hadamard block must be a power of two, not {block}")


def block_for(k: int, wanted: int) -> int:
    """The largest power of two up to `wanted` that divides K; 0 if that is smaller than 32.

    Tiny blocks spread no outlier (a `wanted` below 32 is taken at its word).
    """
    block = wanted
    while block >= min(32, wanted) and block:
        if k % block == 0:
            return block
        block //= 2
    return 0


def transform_of(k: int, wanted: int) -> str:
    """The transform's name in the stored form: `"hadamard:<block>"`, or "" for none."""
    block = block_for(k, wanted)
    return f"hadamard:{block}" if block else ""
