"""Block-diagonal orthonormal Hadamard transform (Sylvester's construction)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..errors import OptionError


@functools.lru_cache(maxsize=16)
def _signs(block: int) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while h.shape[0] < block:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    return h


def hadamard_matrix(block: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Symmetric orthonormal [block, block]; its own inverse.

    Raises:
        OptionError: the block is not a power of two.
    """
    if block < 1 or block & (block - 1):
        raise OptionError(f"a Hadamard block must be a power of two, not {block}")
    return (_signs(block) / block**0.5).to(dtype)


def block_hadamard(x: Tensor, block: int) -> Tensor:
    """Transform the last dimension of x [..., K] in blocks; K must be a multiple of `block`.

    Raises:
        OptionError: K is not a multiple of the block.
    """
    if x.shape[-1] % block:
        raise OptionError(f"K = {x.shape[-1]} is not a multiple of the Hadamard block {block}")
    h = hadamard_matrix(block, x.dtype).to(x.device)
    return (x.unflatten(-1, (-1, block)) @ h).flatten(-2)


def largest_block(k: int, at_most: int = 128, at_least: int = 32) -> int | None:
    """The largest power of two from `at_least` to `at_most` that divides K, or None."""
    block = at_most
    while block >= at_least:
        if k % block == 0:
            return block
        block //= 2
    return None
