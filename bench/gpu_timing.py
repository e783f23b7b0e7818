"""How benches time GPU kernels: replays of CUDA graphs, medians taken in turn.

A graph calls over many copies of the weights, more than the cache holds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mixllm_compiler.lowering.cuda import launch
from mixllm_compiler.lowering.cuda.timing import ROTATED_BYTES as ROTATED_BYTES
from mixllm_compiler.lowering.cuda.timing import capture
from mixllm_compiler.lowering.cuda.timing import copies as copies

SAMPLES = 5


def quick_or_whole(doc: str) -> argparse.Namespace:
    """The arguments of a bench that needs a GPU: `--quick`; it ends here where there is none."""
    parser = argparse.ArgumentParser(description=doc.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="two numbers of tokens, not written")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this bench measures GPU kernels; there is no CUDA device here")
    torch.manual_seed(0)
    return options


def without_overlap(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The same without programmatic dependent launch."""

    def run(item: Any) -> Any:
        with launch.trying(programmatic=False):
            return call(item)

    return run


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
