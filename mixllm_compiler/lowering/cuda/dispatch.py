"""Which variant runs a linear: by M, tiles of rows, groups along K and the GPU.

For GPUs with a table (`tables/<name>.json`, made by timing all candidates) the entry of the nearest
problem decides; elsewhere rules that its entries taught us. Nothing is timed here.
"""

from __future__ import annotations

import functools
import json
import math
import re
from dataclasses import dataclass
from importlib import resources

from ..target import Target
from .variants import Variant

DECODE_TOKENS = 16  # above this many, weights go through shared memory


@dataclass(frozen=True)
class Entry:
    """The best variant for up to so many tokens, at so many tiles of rows and groups along K."""

    tokens: int
    tiles: int
    groups: int
    variant: Variant

    def distance(self, tiles: int, groups: int) -> float:
        """How unlike a problem is: factors between the sizes; tiles count double."""
        return 2 * abs(math.log(self.tiles / tiles)) + abs(math.log(self.groups / groups))


@functools.lru_cache(maxsize=65_536)
def choose(m: int, tiles: int, groups: int, target: Target, multiprocessors: int) -> Variant:
    """The variant for M tokens, so many tiles of 64 rows and groups of 128 along K."""
    entries = table(target)
    if not entries:
        return by_rule(m, tiles, groups, target, multiprocessors)
    buckets = sorted({entry.tokens for entry in entries})
    bucket = next((tokens for tokens in buckets if m <= tokens), buckets[-1])
    near = (entry for entry in entries if entry.tokens == bucket)
    return min(near, key=lambda entry: entry.distance(tiles, groups)).variant


@functools.cache
def table(target: Target) -> tuple[Entry, ...]:
    """What was timed on this GPU, empty where nothing was."""
    name = re.sub(r"[^a-z0-9]+", "-", target.name.lower()).strip("-")
    file = resources.files(__package__) / "tables" / f"{name}.json"
    if not name or not file.is_file():
        return ()
    found = json.loads(file.read_text(encoding="utf-8"))
    return tuple(
        Entry(tokens, tiles, groups, Variant.parse(variant))
        for tokens, tiles, groups, variant in found["entries"]
    )


def shipped(target: Target) -> set[Variant]:
    """All variants that can be chosen on a target."""
    found = {entry.variant for entry in table(target)}
    for m in (1, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 256, 257, 1024, 4096):
        for tiles in (4, 64, 96, 128, 256, 448):
            found.add(by_rule(m, tiles, 32, target, 132))
    return found


def by_rule(m: int, tiles: int, groups: int, target: Target, multiprocessors: int) -> Variant:
    """A good variant without a table."""
    if m <= DECODE_TOKENS:
        if m > 8 and target.capability == (9, 0):
            return Variant("staged", (2, 2, 8, 2, 4))
        return _decode(m, tiles, multiprocessors)
    if target.capability != (9, 0):
        return Variant("mma", (32 if m <= 32 else 64, 4))
    return _hopper(m, tiles, multiprocessors)


def _decode(m: int, tiles: int, multiprocessors: int) -> Variant:
    octets = 1 if m <= 8 else 2
    # All CTAs in one wave of many warps each, or many small ones.
    if octets == 2:
        return Variant("decode", (octets, 2, 8, 1))
    if 2 * tiles <= multiprocessors:
        return Variant("decode", (octets, 2, 16, 2))
    if tiles <= multiprocessors:
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
        return (
            Variant("middle", (128, 6, 1, 1, 1, 2, 1)) if few else Variant("prefill", (256, 3, 4))
        )
    if -(-tiles // 2) * -(-m // 256) < multiprocessors:
        return Variant("middle", (128, 6, 1, 1, 1, 2, 1))
    return Variant("prefill", (256, 3, 4))


def candidates(m: int, target: Target) -> list[Variant]:
    """What `bench/tune_gemm.py` times for M tokens."""
    hopper = target.capability == (9, 0)
    if m <= DECODE_TOKENS:
        octets = 1 if m <= 8 else 2
        texts = [f"decode:{octets},{sizes}" for sizes in _DECODE[octets].split()]
        if hopper:
            texts += [f"staged:{octets},{sizes}" for sizes in _STAGED[octets].split()]
            texts += _SIXTEEN.split() if octets == 2 else []
        return [Variant.parse(text) for text in texts]
    if not hopper:
        return [Variant("mma", (tokens, 4)) for tokens in (32, 64, 128)]
    found = [Variant.parse(text) for text in _HOPPER.split()]
    least = next((tokens for tokens in (32, 64, 128, 256) if m <= tokens), 256)
    return [v for v in found if v.tokens in (least, least // 2) or (m > 256 and v.tokens == 128)]


_DECODE = {
    1: "1,8,2 1,8,4 1,16,2 2,8,1 2,8,2 2,16,1 2,16,2 4,8,1 1,4,4",
    2: "2,8,1 2,8,2 2,16,1",
}
_STAGED = {
    1: "1,8,2,4 1,8,4,4 2,8,1,4 2,8,2,4 2,16,1,2 2,16,2,2 2,16,2,4 4,8,1,4",
    2: "1,8,2,4 1,8,4,4 2,8,1,2 2,8,1,4 2,8,2,2 2,8,2,4 2,16,1,2",
}
_SIXTEEN = """
middle:16,6,1,1,2,2,1 middle:16,8,2,1,2,1,1 middle:16,6,2,1,3,1,1 middle:16,8,1,1,2,1,2
middle:16,12,1,1,1,2,2
"""
_HOPPER = """
middle:32,5,1,1,2,2,1 middle:32,8,1,1,1,2,2 middle:32,8,2,1,1,2,2 middle:32,12,1,1,1,1,4
middle:32,8,1,1,2,1,2 middle:32,8,2,1,2,1,2 middle:32,5,4,1,3,1,1 middle:32,5,2,1,3,1,1
middle:32,8,2,1,1,1,2 middle:32,8,1,1,1,2,1
middle:64,4,1,0,2,2,1 middle:64,8,1,0,1,2,2 middle:64,8,2,0,1,2,2 middle:64,12,1,0,1,1,4
middle:64,6,1,0,2,1,2 middle:64,6,2,0,2,1,2 middle:64,4,4,0,3,1,1 middle:64,4,2,0,3,1,1
middle:128,6,1,1,1,2,1 middle:128,6,2,1,1,2,1 middle:128,8,1,2,1,1,2 middle:128,8,2,2,1,1,2
middle:128,4,1,2,2,1,1 middle:128,4,2,2,2,1,1 middle:128,4,4,2,2,1,1
prefill:128,5,2 prefill:128,5,4 prefill:128,5,8 prefill:256,3,2 prefill:256,3,4 prefill:256,3,8
"""
