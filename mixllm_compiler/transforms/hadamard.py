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
