"""The format of one output feature (one row of a weight matrix) and its size in bits."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from torch import Tensor

from ..errors import OptionError, nearest

WIDTHS = (2, 3, 4, 5, 6, 8)
FAMILIES = ("asym", "two-level")
DEFAULT_GROUP = 128
WHOLE_ROW = 0  # as a group size: one group, however long the row is
MAX_GROUP = 1024
_ALIGN = 16  # groups, and rows that are one group, are multiples of this


def group_size(k: int, group: int) -> int:
    """Length of a group in a row of length K."""
    return group if group else math.ceil(k / _ALIGN) * _ALIGN


def groups_of(k: int, group: int) -> int:
    """Number of groups along K; the last one may be short."""
    return math.ceil(k / group) if group else 1


def padded(k: int, group: int) -> int:
    """K rounded up to whole groups: the length of codes in kernels and of quantized activations."""
    return groups_of(k, group) * group_size(k, group)


def spread(values: Tensor, k: int, group: int) -> Tensor:
    """Values per group [..., G] → per weight [..., K]."""
    return values.repeat_interleave(group_size(k, group), -1)[..., :k]


@dataclass(frozen=True, order=True)
class RowFormat:
    """One row's format.

    Family `asym`: ŵ = s·(q − z) with one fp16 scale s and one integer zero point z of b bits per
    group; 8-bit rows are symmetric, ŵ = s·q with q in [−127, 127].

    Family `two-level`: ŵ = S·(t·q + c − 128) with one fp32 scale S per row and two bytes per group,
    a step t ≥ 1 and an offset 1 ≤ c ≤ 128. Codes go up to min(2^b − 1, ⌊(255 − c)/t⌋), so that
    t·q + c is a byte and the integers lie in [−127, 127]: a product with int8 activations stays in
    integers over the whole row. 8-bit rows have the row's scale only.
    """

    bits: int
    group: int = DEFAULT_GROUP
    family: str = "asym"

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise OptionError(f"a row cannot have {self.bits} bits; widths are {WIDTHS}")
        if self.family not in FAMILIES:
            raise OptionError(
                f"unknown format family {self.family!r}; families are {', '.join(FAMILIES)}."
                f"{nearest(self.family, FAMILIES)}"
            )
        if self.group and (not 16 <= self.group <= MAX_GROUP or self.group % _ALIGN):
            raise OptionError(
                f"group size {self.group} is not a multiple of {_ALIGN} up to {MAX_GROUP}, nor "
                f"{WHOLE_ROW} for whole rows"
            )

    @property
    def symmetric(self) -> bool:
        return self.bits == 8

    @property
    def two_level(self) -> bool:
        """Whether groups have integer steps and offsets below a scale of the row."""
        return self.family == "two-level" and self.bits < 8

    @property
    def row_scaled(self) -> bool:
        """Whether there is one fp32 scale per row, not one fp16 scale per group."""
        return self.family == "two-level"

    @property
    def qmin(self) -> int:
        return -127 if self.symmetric else 0

    @property
    def qmax(self) -> int:
        return 127 if self.symmetric else 2**self.bits - 1

    def row_bytes(self, k: int) -> int:
        """Bytes that one stored row of length K takes: codes, scales, steps, offsets, zero points.

        Rows are byte-aligned in the stored form; the row's width itself is counted per matrix
        (`width_bytes`), because it is there whatever the width is.
        """
        groups, codes = groups_of(k, self.group), math.ceil(k * self.bits / 8)
        if self.row_scaled:
            return codes + 4 + (2 * groups if self.two_level else 0)
        zeros = 0 if self.symmetric else math.ceil(groups * self.bits / 8)
        return codes + 2 * groups + zeros

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
    """Bytes of the table of N rows' widths: four bits a row, which name its span as well."""
    return math.ceil(n / 2)
