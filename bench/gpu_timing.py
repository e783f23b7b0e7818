"""How benches time GPU kernels: replays of CUDA graphs, medians taken in turn.

Below about 100 µs a launch from Python takes longer than the kernel, so only a graph's replay
measures the kernel. A graph calls over many copies of the weights, more than the cache holds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ROTATED_BYTES = 260e6
SAMPLES = 5


def copies(tensor: Tensor, total: float = ROTATED_BYTES) -> list[Tensor]:
    """The tensor and so many clones that together they are larger than `total` bytes."""
    size = tensor.numel() * tensor.element_size()
    return [tensor] + [tensor.clone() for _ in range(math.ceil(total / size))]


def capture(
    call: Callable[[Any], Any], over: Sequence[Any], seconds: float = 2e-3
) -> Callable[[], float]:
    """A function that measures one call in seconds, over a sample of about so many seconds."""
    call(over[0])  # compiles outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for item in over:
            call(item)

    def replay(times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / times

    replay(2)
    times = max(1, round(seconds / replay(2)))
    return lambda: replay(times) / len(over)


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
