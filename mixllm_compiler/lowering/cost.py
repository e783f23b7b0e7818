"""How long a mixed linear takes: what was fitted to measurements, else a roofline.

Two-level rows on a GPU whose CUDA kernels were timed: `cuda.cost`. Elsewhere it takes whichever is
longer, moving the bytes or doing the arithmetic, and adds the fixed time of a launch. No kernel
reaches both limits, so those times come out too short, least so where one limit rules: few tokens
(bytes) and many (arithmetic). What it ranks well is layouts and widths at equal M. Quantizing the
activations is in neither.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..formats.layout import Layout
from ..formats.row_format import RowFormat
from .cuda import dispatch, support
from .target import Target


@dataclass(frozen=True)
class Limits:
    """What a device can do at best.

    Attributes:
        bandwidth: bytes a second from its memory.
        int8: multiplications and additions a second of int8 matrix instructions.
        half: the same of bf16 and fp16 ones.
        launch: seconds that a kernel takes beyond both.
        multiprocessors: how many it has.
    """

    bandwidth: float
    int8: float
    half: float
    launch: float
    multiprocessors: int


_LIMITS = {
    # bandwidth: a kernel that only reads 66 MB, in CUDA-graph replay, measured 3.9e12; the product
    # is sold with 4.8e12. int8 and half: NVIDIA's data sheet, dense. launch: what small matrices
    # cost in graph replay beyond their bytes, measured about 2 µs.
    "H200": Limits(
        bandwidth=3.9e12, int8=1.979e15, half=0.989e15, launch=2e-6, multiprocessors=132
    ),
}

_OUTPUT_BYTES = 2  # bf16 or fp16


def limits(target: Target) -> Limits | None:
    """The limits of a device, None for one that is not in the table."""
    return next((found for name, found in _LIMITS.items() if name in target.name.split()), None)


def predict_seconds(m: int, layout: Layout, target: Target) -> float | None:
    """Seconds of one linear with M tokens, its weights in memory; None for an unknown target."""
    known = limits(target)
    if known is None:
        return None
    if support.layout_reason(layout) is None and dispatch.table(target):
        return dispatch.predict(m, layout, target, known.multiprocessors)
    weights = sum(
        n * RowFormat(bits, layout.group, layout.family).row_bytes(layout.k)
        for bits, n in layout.widths
    )
    moved = weights + m * layout.padded_k + m * layout.n * _OUTPUT_BYTES
    arithmetic = 2 * m * layout.n * layout.padded_k
    return known.launch + max(moved / known.bandwidth, arithmetic / known.int8)


def predict_float_seconds(m: int, n: int, k: int, target: Target) -> float | None:
    """Seconds of the bf16 or fp16 linear [N, K] that a mixed one replaces; None if unknown."""
    known = limits(target)
    if known is None:
        return None
    moved = _OUTPUT_BYTES * (n * k + m * k + m * n)
    return known.launch + max(moved / known.bandwidth, 2 * m * n * k / known.half)


def row_time(
    shapes: Mapping[str, tuple[int, int]], m: int, target: Target
) -> Callable[[str, RowFormat], float] | None:
    """The allocator's time term: (matrix name, format) → seconds that a row takes with M tokens.

    It is the matrix' time with all rows in that format, shared by them, so that the times of
    a plan's rows add up to about the time of its linears.

    Args:
        shapes: matrix name → (N, K).
        m: tokens at a time.
        target: the device; None is returned for an unknown one.
    """
    if limits(target) is None:
        return None

    @functools.cache
    def seconds(n: int, k: int, row: RowFormat) -> float:
        layout = Layout(k, ((row.bits, n),), row.group, row.family)
        found = predict_seconds(m, layout, target)
        assert found is not None
        return found / n

    return lambda name, row: seconds(*shapes[name], row)
