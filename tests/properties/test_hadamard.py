"""The block Hadamard transform: orthonormal, its own inverse, and invisible in x Wᵀ."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from mixllm_compiler.errors import OptionError
from mixllm_compiler.transforms.hadamard import (
    block_for,
    block_hadamard,
    hadamard_matrix,
    transform_of,
)

BLOCKS = st.sampled_from((1, 2, 4, 8, 16, 32, 64, 128, 256, 512))


@given(BLOCKS)
def test_the_matrix_is_symmetric_and_orthonormal(block):
    h = hadamard_matrix(block)
    assert torch.equal(h, h.t())
    assert (h @ h - torch.eye(block)).abs().max() < 1e-13
    assert torch.allclose(h.abs(), torch.full_like(h, block**-0.5), rtol=1e-15)


@given(BLOCKS, st.integers(1, 4), st.integers(0, 2**32))
def test_twice_is_nothing_and_lengths_stay(block, count, seed):
    x = torch.randn(3, block * count, generator=torch.Generator().manual_seed(seed)).double()
    y = block_hadamard(x, block)
    assert (block_hadamard(y, block) - x).abs().max() < 1e-12
    assert torch.allclose(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-13)


@given(BLOCKS, st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**32))
def test_a_product_of_transformed_factors_is_the_product(block, count, n, seed):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(4, block * count, generator=draw).double()
    w = torch.randn(n, block * count, generator=draw).double()
    magnitude = x.abs() @ w.abs().t()
    error = block_hadamard(x, block) @ block_hadamard(w, block).t() - x @ w.t()
    assert (error.abs() <= 1e-13 * magnitude + 1e-300).all()


@given(st.integers(1, 20_000), st.integers(0, 9).map(lambda e: 2**e >> 1))
def test_the_block_is_the_largest_that_divides(k, wanted):
    fits = [b for b in (1, 2, 4, 8, 16, 32, 64, 128, 256) if b <= wanted and k % b == 0]
    best = max(fits, default=0)
    if wanted < 32:  # taken at its word, or not at all
        best = wanted if wanted and k % wanted == 0 else 0
    block = block_for(k, wanted)
    assert block == (best if best >= min(32, wanted) else 0)
    assert transform_of(k, wanted) == (f"hadamard:{block}" if block else "")


@given(st.integers(-4, 600))
def test_other_blocks_are_refused(block):
    if block < 1 or block & (block - 1):
        with pytest.raises(OptionError, match="power of two"):
            hadamard_matrix(block)


def test_large_tensors_get_the_bits_of_their_rows():
    x = torch.randn(3, 130, 256)
    rows = torch.stack([block_hadamard(row, 128) for row in x.flatten(0, 1)])
    assert torch.equal(block_hadamard(x, 128), rows.view(x.shape))
