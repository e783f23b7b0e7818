"""How long a variant takes: bytes, clocks of the tensor cores, issued instructions, waves, launch.

The time is a sum of terms, not a maximum: in all these kernels, what one warp issues does not hide
behind another's matrix instructions. In prefill the terms are the hardware's own, clocks per group
and multiprocessor: half the tokens per k-step and warpgroup, and one per instruction that a
scheduler issues. What a unit of each term costs is fitted to times measured on an H200
(`bench/fit_cost.py`, which also says how far off the choices are); on other GPUs it ranks variants.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

from ...formats.layout import Layout
from . import layout as packing
from .variants import Variant

ISSUED = {2: 95, 3: 110, 4: 94, 5: 115, 6: 107, 8: 45}
"""Instructions of a warp's group of 128 in prefill's machine code, by width."""

MICROSECONDS = {
    "decode": (0.933, 0.17, 0.0804, 0.189, 0.185, 0.802),
    "middle": (1.02, 0.0401, 0.115, 0.429, 2.92, 0.0091, 0.169),
    "prefill": (5.81, 0.5, 0.0335),
}
"""Per regime, what a unit of each of `terms` takes."""


@dataclass(frozen=True)
class Problem:
    """What of a layout decides the time.

    Attributes:
        tiles: of 64 rows.
        groups: along K.
        megabytes: of packed weights.
        issued: mean of `ISSUED` over the tiles.
    """

    tiles: int
    groups: int
    megabytes: float
    issued: float

    @classmethod
    def of(cls, layout: Layout) -> Problem:
        return _problem(layout)


@functools.lru_cache(maxsize=4096)
def _problem(layout: Layout) -> Problem:
    tiles = {bits: packing.tiles(n) for bits, n in layout.widths}
    count = sum(tiles.values())
    size = sum(n * packing.block_bytes(bits) for bits, n in tiles.items()) * layout.groups
    issued = sum(n * ISSUED[bits] for bits, n in tiles.items()) / count
    return Problem(count, layout.groups, size * 1e-6, issued)


def terms(
    variant: Variant, m: int, problem: Problem, multiprocessors: int
) -> tuple[float, ...] | None:
    """What `MICROSECONDS` multiplies; None for regimes without measurements."""
    tiles, groups = problem.tiles, problem.groups
    grid = variant.launch(m, tiles, multiprocessors).grid
    token_tiles = math.ceil(m / variant.tokens)
    outputs = m * tiles * 1e-3
    if variant.regime == "decode":
        octets, _, warps, ahead = variant.sizes
        filled = grid / (multiprocessors * max(1, 16 // warps))
        waves = math.ceil(filled)
        idle = problem.megabytes * (waves / filled - 1)
        tokens = grid * min(m, 8 * octets) * groups * 128e-6  # megabytes from L2
        turns = waves * math.ceil(math.ceil(groups / warps) / ahead)
        return 1.0, problem.megabytes, idle, tokens, turns, waves
    if variant.regime == "middle":
        tokens, _, ranks, _, resident, rows, sets = variant.sizes
        waves = math.ceil(grid / (multiprocessors * resident))
        steps = waves * math.ceil(groups / (ranks * sets))
        beside = min(resident, math.ceil(grid / multiprocessors))
        clocks = steps * beside * rows * sets * (2 * tokens + problem.issued) * 1e-3
        exchanged = tokens * rows if ranks * sets > 1 else 0
        moved = problem.megabytes * token_tiles
        return 1.0, moved, steps, clocks, waves, exchanged, outputs
    if variant.regime == "prefill":
        tokens = variant.tokens
        rounds = math.ceil(math.ceil(tiles / 2) * token_tiles / multiprocessors)
        clocks = rounds * groups * 2 * (2 * tokens + problem.issued) * 1e-3
        return 1.0, clocks, rounds * tokens
    return None


def predict_seconds(
    variant: Variant, m: int, problem: Problem, multiprocessors: int
) -> float | None:
    """Seconds of one linear, on an H200; None for regimes without measurements."""
    found = terms(variant, m, problem, multiprocessors)
    if found is None:
        return None
    costs = MICROSECONDS[variant.regime]
    return 1e-6 * sum(cost * term for cost, term in zip(costs, found, strict=True))
