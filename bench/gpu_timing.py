"""How benches time GPU kernels: replays of CUDA graphs, medians taken in turn.

A graph calls over many copies of the weights, more than the cache holds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mixllm_compiler.lowering.cuda.timing import ROTATED_BYTES as ROTATED_BYTES
from mixllm_compiler.lowering.cuda.timing import capture
from mixllm_compiler.lowering.cuda.timing import copies as copies

SAMPLES = 5


def medians(*measures: Callable[[], float], samples: int = SAMPLES) -> list[float]:
    """Median of each measure, taken in turn so that all see the same clocks."""
    rounds = [[measure() for measure in measures] for _ in range(samples)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def cublas(x: Tensor, weights: Sequence[Tensor], seconds: float = 2e-3) -> Callable[[], float]:
    """Measures x Wᵀ in bf16: the faster of cuBLAS and cuBLASLt at each call."""
    ways = []
    for library in ("cublas", "cublaslt"):
        torch.backends.cuda.preferred_blas_library(library)
        ways.append(capture(lambda w: torch.nn.functional.linear(x, w), weights, seconds))
    torch.backends.cuda.preferred_blas_library("default")
    return lambda: min(way() for way in ways)
