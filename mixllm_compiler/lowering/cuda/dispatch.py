"""Which variant runs a linear: by M, tiles of rows, groups along K and the GPU."""

from __future__ import annotations

import functools

from ..target import Target
from .variants import Variant

DECODE_TOKENS = 16  # above this many, weights go through shared memory


@functools.lru_cache(maxsize=4096)
def choose(m: int, tiles: int, groups: int, target: Target, multiprocessors: int) -> Variant:
    """The variant for M tokens, so many tiles of 64 rows and groups of 128 along K."""
    if m <= DECODE_TOKENS:
        return _decode(m, tiles, groups, multiprocessors)
    if target.capability != (9, 0):
        return Variant("mma", (32 if m <= 32 else 64, 4))
    return _hopper(m, tiles, multiprocessors)


def _decode(m: int, tiles: int, groups: int, multiprocessors: int) -> Variant:
    octets = 1 if m <= 8 else 2
    # All CTAs in one wave of many warps each, or many small ones.
    if 2 * tiles <= multiprocessors:
        return Variant("decode", (octets, 2, 16, 2))
    if 2 * tiles <= 2 * multiprocessors or octets == 2:
        return Variant("decode", (octets, 2, 8, 2))
    return Variant("decode", (octets, 1, 8, 4))


def _hopper(m: int, tiles: int, multiprocessors: int) -> Variant:
    few = tiles <= multiprocessors
    if m <= 32:
        return Variant("middle", (32, 8, 2, 1, 1, 1, 2) if few else (32, 5, 1, 1, 2, 2, 1))
    if m <= 64:
        return Variant("middle", (64, 6, 2, 0, 2, 1, 2) if few else (64, 4, 1, 0, 2, 2, 1))
    if m <= 128:
        return Variant("middle", (128, 8, 1, 2, 1, 1, 2) if few else (128, 6, 1, 1, 1, 2, 1))
    if m <= 256:
        return Variant("middle", (128, 6, 1, 1, 1, 2, 1) if few else (256, 4, 1, 2, 1, 2, 1))
    ctas = -(-tiles // 2) * -(-m // 256)
    if ctas < multiprocessors:
        return Variant("middle", (128, 6, 1, 1, 1, 2, 1))
    return Variant("prefill", (256, 4, 4))
