"""Which variant runs a linear: by M, the rows of each width, groups along K and the GPU.

Shapes that were timed on this GPU get what was fastest, by the table of this machine (made by
`mixllm tune`) or the one that ships; all others what the cost model says. Nothing is timed here.
"""

from __future__ import annotations

import functools
import math

from ...formats.layout import Layout
from ..target import Target
from . import timed
from .cost import Problem, predict_seconds
from .variants import Variant

DECODE_TOKENS = 16  # above this many, weights go through shared memory
ALIKE = math.log(1.05)
"""Shapes whose sizes differ by less than this logarithm of a factor have the same entry."""


@functools.lru_cache(maxsize=65_536)
def choose(m: int, layout: Layout, target: Target, multiprocessors: int) -> Variant:
    """The variant for M tokens and a weight of that layout."""
    problem = Problem.of(layout)
    for entries in timed.tables(target):
        if entry := timed.nearest(entries, m, problem, ALIKE):
            return entry.variant
    return by_cost(m, problem, target, multiprocessors)


def by_cost(m: int, problem: Problem, target: Target, multiprocessors: int) -> Variant:
    """The variant that the cost model holds for the fastest."""
    found = {}
    for variant in candidates(m, target):
        seconds = predict_seconds(variant, m, problem, multiprocessors)
        if seconds is not None:
            found[variant] = seconds
    if not found:  # not measured: a portable kernel, tiles of tokens as they fit
        return Variant("mma", (32 if m <= 32 else 64, 4))
    return min(found, key=found.__getitem__)


def predict(m: int, layout: Layout, target: Target, multiprocessors: int) -> float | None:
    """Seconds of one linear with the variant that it gets; None where nothing was measured."""
    variant = choose(m, layout, target, multiprocessors)
    return predict_seconds(variant, m, Problem.of(layout), multiprocessors)


def table(target: Target) -> tuple[timed.Entry, ...]:
    """Everything that was timed on this GPU, empty where nothing was."""
    return tuple(entry for entries in timed.tables(target) for entry in entries)


def forget() -> None:
    """Read the tables again: one of them was written."""
    timed.forget()
    choose.cache_clear()


def shipped(target: Target) -> set[Variant]:
    """All variants that can be chosen on a target."""
    found = {entry.variant for entry in table(target)}
    problem = Problem(64, 32, 10.0, 100.0)
    for m in (1, 16, 32, 64, 128, 256, 1024):
        found.add(by_cost(m, problem, target, 132))
        found |= {v for v in candidates(m, target) if predict_seconds(v, m, problem, 132)}
    return found


def candidates(m: int, target: Target) -> list[Variant]:
    """All that can be generated for M tokens: what is timed."""
    hopper = target.capability == (9, 0)
    if m <= DECODE_TOKENS:
        octets = 1 if m <= 8 else 2
        texts = [f"decode:{octets},{sizes}" for sizes in _DECODE[octets].split()]
        if hopper:
            texts += [f"staged:{octets},{sizes}" for sizes in _STAGED[octets].split()]
            texts += _SIXTEEN.split() if octets == 2 else []
        return [Variant.parse(text) for text in texts]
    if not hopper:
        return [Variant("mma", (tokens, 4)) for tokens in (32, 64)]
    found = [Variant.parse(text) for text in _HOPPER.split()]
    least = next((tokens for tokens in (32, 64, 128, 256) if m <= tokens), 256)
    return [v for v in found if v.tokens in (least, least // 2) or (m > 256 and v.tokens == 128)]


_DECODE = {
    1: "1,8,2 1,8,4 1,16,2 2,8,1 2,8,2 2,16,1 2,16,2 4,8,1 1,4,4",
    2: "2,8,1 2,16,1",
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
middle:64,4,4,0,2,2,1 middle:64,8,4,0,1,2,2
middle:64,4,1,0,2,2,1 middle:64,8,1,0,1,2,2 middle:64,8,2,0,1,2,2 middle:64,12,1,0,1,1,4
middle:64,6,1,0,2,1,2 middle:64,6,2,0,2,1,2 middle:64,4,4,0,3,1,1 middle:64,4,2,0,3,1,1
middle:128,6,4,1,1,2,1
middle:128,6,1,1,1,2,1 middle:128,6,2,1,1,2,1 middle:128,8,1,2,1,1,2 middle:128,8,2,2,1,1,2
middle:128,4,1,2,2,1,1 middle:128,4,2,2,2,1,1 middle:128,4,4,2,2,1,1
prefill:128,5,2 prefill:128,5,4 prefill:128,5,8 prefill:256,3,2 prefill:256,3,4 prefill:256,3,8
"""
