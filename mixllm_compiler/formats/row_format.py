"""The format of one output feature (one row of a weight matrix) and its size in bits."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..errors import OptionError

WIDTHS = (2, 3, 4, 5, 6, 8)
FAMILIES = ("asym",)
DEFAULT_GROUP = 128
MAX_GROUP = 1024  # 127·127·1024 < 2²⁴: sums over a group are exact in fp32


def groups_of(k: int, group: int) -> int:
    """Number of groups along K; the last one may be short."""
    return math.ceil(k / group)


def padded(k: int, group: int) -> int:
    """K rounded up to whole groups: the length of codes in kernels and of quantized activations."""
    return groups_of(k, group) * group


@dataclass(frozen=True, order=True)
class RowFormat:
    """One row's format: `asym` rows of b bits with one fp16 scale per group.

    Widths below 8 store an integer zero point of b bits per group, ŵ = s·(q − z); 8-bit rows are
    symmetric, ŵ = s·q with q in [−127, 127].
    """

    bits: int
    group: int = DEFAULT_GROUP
    family: str = "asym"

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise OptionError(f"a row cannot have {self.bits} bits; widths are {WIDTHS}")
        if self.family not in FAMILIES:
            raise OptionError(f"unknown format family {self.family!r}; families are {FAMILIES}")
        if not 16 <= self.group <= MAX_GROUP or self.group % 16:
            raise OptionError(f"group size {self.group} is not a multiple of 16 up to {MAX_GROUP}")

    @property
    def symmetric(self) -> bool:
        return self.bits == 8

    @property
    def qmin(self) -> int:
        return -127 if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return 127 if self.symmetric else 2**self.bits - 1

    def row_bytes(self, k: int) -> int:
        """Bytes that one stored row of length K takes: codes, scales and zero points.

        Rows are byte-aligned in the stored form; the row's width itself is counted per matrix
        (`width_bytes`), because it is there whatever the width is.
        """
        groups = groups_of(k, self.group)
        zeros = 0 if self.symmetric else math.ceil(groups * self.bits / 8)
        return math.ceil(k * self.bits / 8) + 2 * groups + zeros

    def __str__(self) -> str:
        return f"w{self.bits} g{self.group} {self.family}"

    @classmethod
    def parse(cls, text: str) -> RowFormat:
        """Inverse of `str`.

        Raises:
            OptionError: the text is no row format.
        """
        match = re.fullmatch(r"w(\d+) g(\d+) (\S+)", text)
        if match is None:
            raise OptionError(f"{text!r} is no row format; write for example 'w4 g128 asym'")
        return cls(int(match[1]), int(match[2]), match[3])


def width_bytes(n: int) -> int:
    """Bytes of the width table of N rows: four bits a row."""
    return math.ceil(n / 2)
