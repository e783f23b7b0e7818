"""Packed weights: one u8 blob a matrix, and the short text that says what is in it.

A *packing* is a way to lay a `QuantizedWeight` out in one blob. `plain` lives beside this file
and is what the reference kernels read; every lowering brings its own. Packings are exact:
`unpack(pack(w)) == w.expanded()`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor

from ..errors import OptionError, nearest
from .neutral import QuantizedWeight
from .row_format import groups_of, padded


@dataclass(frozen=True)
class Layout:
    """What is in a packed blob, as text that ops carry: `"k768 w4:704 w8:64 g128 asym plain.v1"`.

    `widths` counts the rows of each width, ascending: the order in which packed rows lie.
    """

    k: int
    widths: tuple[tuple[int, int], ...]
    group: int
    family: str = "asym"
    packing: str = "plain.v1"
    transform: str = ""

    @property
    def n(self) -> int:
        return sum(count for _, count in self.widths)

    @property
    def padded_k(self) -> int:
        return padded(self.k, self.group)

    @property
    def groups(self) -> int:
        return groups_of(self.k, self.group)

    @classmethod
    def of(cls, weight: QuantizedWeight, packing: str) -> Layout:
        widths = tuple(weight.counts().items())
        return cls(weight.k, widths, weight.group, weight.family, packing, weight.transform)

    def __str__(self) -> str:
        rows = " ".join(f"w{b}:{n}" for b, n in self.widths)
        transform = f" {self.transform}" if self.transform else ""
        return f"k{self.k} {rows} g{self.group} {self.family} {self.packing}{transform}"

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Inverse of `str`; cached, because ops parse their layout on every call.

        Raises:
            OptionError: the text is no layout.
        """
        return _parse(text)

    @classmethod
    def parse_all(cls, text: str) -> tuple[Layout, ...]:
        """Inverse of `join_layouts`; cached, too.

        Raises:
            OptionError: a part of the text is no layout.
        """
        return _parse_all(text)


def join_layouts(layouts: Iterable[Layout]) -> str:
    """Layouts as one text, for ops that read several blobs."""
    return "; ".join(map(str, layouts))


@functools.lru_cache(maxsize=4096)
def _parse_all(text: str) -> tuple[Layout, ...]:
    return tuple(map(_parse, text.split("; ")))


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Layout:
    match = re.fullmatch(r"k(\d+)((?: w\d+:\d+)+) g(\d+) (\S+) (\S+\.v\d+)(?: (\S+))?", text)
    if match is None:
        raise OptionError(
            f"{text!r} is no layout; one looks like 'k768 w4:704 w8:64 g128 asym plain.v1'"
        )
    widths = tuple((int(b), int(n)) for b, n in re.findall(r"w(\d+):(\d+)", match[2]))
    if list(widths) != sorted(widths) or len({b for b, _ in widths}) < len(widths):
        raise OptionError(f"the widths of {text!r} are not in ascending order")
    return Layout(int(match[1]), widths, int(match[3]), match[4], match[5], match[6] or "")


@dataclass(frozen=True)
class PackedWeight:
    """A device blob and its layout. Never saved: made at load from the neutral form."""

    blob: Tensor
    layout: Layout


@dataclass(frozen=True)
class Packing:
    """One way to lay out a matrix: `pack` returns u8 [bytes]; `unpack` is its exact inverse."""

    name: str
    pack: Callable[[QuantizedWeight], Tensor]
    unpack: Callable[[Tensor, Layout], QuantizedWeight]


_PACKINGS: dict[str, Packing] = {}


def register_packing(packing: Packing) -> Packing:
    """Make a packing known by its name, e.g. `"plain.v1"`; the version changes with the bytes."""
    _PACKINGS[packing.name] = packing
    return packing


def packing(name: str) -> Packing:
    """The packing of that name.

    Raises:
        OptionError: none is registered under it.
    """
    if name not in _PACKINGS:
        raise OptionError(f"unknown packing {name!r}.{nearest(name, _PACKINGS)}")
    return _PACKINGS[name]


def pack(weight: QuantizedWeight, name: str) -> PackedWeight:
    """Lay a matrix out for the kernels that read packing `name`.

    Raises:
        WeightError: it holds codes or scales that no quantizer writes.
    """
    weight.check()
    return PackedWeight(packing(name).pack(weight.expanded()), Layout.of(weight, name))


def unpack(packed: PackedWeight) -> QuantizedWeight:
    """The matrix of a blob, exactly as it was packed; every group has its step and its offset."""
    return packing(packed.layout.packing).unpack(packed.blob, packed.layout)
