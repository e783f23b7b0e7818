"""How codes of 2 to 8 bits fill bytes: every byte lane holds whole codes and parts of further ones.

The smallest piece is a *unit*: `steps` times 4 neighbouring k of 64 rows, in `words` words. A word
is 256 bytes, 4 of each row, so that a vector register holds neighbouring rows and one shift and one
mask give the operand of a dot product of 4 bytes. A code is at most three *fields* of such bytes.
Codes whose bits lie together in a byte come first; what is left over in the bytes of all words
makes up the others: six codes of 5 bits are 32 of 40 bits of five bytes, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass

WORD = 256
"""Bytes of a word: 64 rows times 4 k."""


@dataclass(frozen=True)
class Field:
    """`count` bits of a code: from bit `at` of the bytes of a word to bit `to` of the code."""

    word: int
    at: int
    count: int
    to: int

    @property
    def mask(self) -> int:
        """The bits of the code that it gives."""
        return ((1 << self.count) - 1) << self.to


@dataclass(frozen=True)
class Lanes:
    """The packing of one width.

    Attributes:
        bits: of a code.
        words: of a unit.
        fields: per step of a unit, the parts of its codes.
    """

    bits: int
    words: int
    fields: tuple[tuple[Field, ...], ...]

    @property
    def steps(self) -> int:
        """Steps of a unit; a step is 4 neighbouring k."""
        return len(self.fields)

    @property
    def unit_bytes(self) -> int:
        return self.words * WORD


def _whole(bits: int, words: int, per_byte: int) -> tuple[tuple[Field, ...], ...]:
    """Codes that lie in one byte, `per_byte` of them in each."""
    return tuple(
        (Field(word, bits * i, bits, 0),) for word in range(words) for i in range(per_byte)
    )


LANES = {
    2: Lanes(2, 1, _whole(2, 1, 4)),
    3: Lanes(
        3,
        3,
        (
            *_whole(3, 3, 2),
            (Field(0, 6, 2, 0), Field(2, 6, 1, 2)),
            (Field(1, 6, 2, 0), Field(2, 7, 1, 2)),
        ),
    ),
    4: Lanes(4, 1, _whole(4, 1, 2)),
    5: Lanes(
        5,
        5,
        (
            *_whole(5, 5, 1),
            (Field(0, 5, 3, 0), Field(3, 6, 2, 3)),
            (Field(1, 5, 3, 0), Field(4, 6, 2, 3)),
            (Field(2, 5, 3, 0), Field(3, 5, 1, 3), Field(4, 5, 1, 4)),
        ),
    ),
    6: Lanes(
        6,
        3,
        (*_whole(6, 3, 1), (Field(0, 6, 2, 0), Field(1, 6, 2, 2), Field(2, 6, 2, 4))),
    ),
    8: Lanes(8, 1, _whole(8, 1, 1)),
}
"""Packing of every width."""

STEP = 4
LONGEST_UNIT = STEP * max(lanes.steps for lanes in LANES.values())
"""k of the longest unit: groups are multiples of it."""
