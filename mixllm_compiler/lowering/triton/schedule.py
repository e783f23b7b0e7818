"""Which schedule a target gets. A table: nothing is tuned at run time."""

from __future__ import annotations

from ..spec import Bucket
from ..target import Target

BAND = 8
"""Token blocks that go past the weights together."""

# Up to 64 tokens the kernel reads weights and waits: narrow programs, four groups side by side.
# Above that, tiles of 64 rows feed the largest matrix instruction there is. The best of those that
# `bench/gemm_triton.py --sweep` timed on an H200.
_DEFAULT = (
    Bucket(16, rows=16, split=4, warps=4, stages=3),
    Bucket(32, rows=32, split=4, warps=4, stages=3),
    Bucket(64, rows=32, split=4, warps=4, stages=2),
    Bucket(128, rows=64, split=1, warps=4, stages=3),
)

# The interpreter runs one program after the other on numpy: few large programs are fast.
_INTERPRETER = (
    Bucket(16, rows=32, split=2, warps=1, stages=1),
    Bucket(32, rows=64, split=1, warps=1, stages=1),
)


def schedule(target: Target) -> tuple[Bucket, ...]:
    """Buckets of M for the mixed linear, ascending."""
    return _DEFAULT if target.type == "cuda" else _INTERPRETER
