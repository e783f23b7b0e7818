"""How codes of 2 to 8 bits fill 32-bit words so that few instructions take them out again.

A *fragment word* is four codes, one a byte: what a matrix instruction wants in one register. Packed
words keep codes in the byte they are used in; b-bit codes of several fragment words share a packed
word, and the bits that are left over in a byte hold parts of further ones:

    W4   1 word  → 2    low nibble, high nibble
    W2   1 word  → 4
    W6   3 words → 4    bits 0–5 of each; the fourth from the three spare pairs
    W3   3 words → 8    two codes a byte; the last two from the three spare pairs
    W5   5 words → 8    one code a byte; the last three from the five spare triples
    W8   1 word  → 1

So every fragment word is an OR of one to three terms `(word >> shift) & mask`, on all four bytes at
once. The table below is the only place that knows: packing in torch and the kernels' source are
made from it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Term:
    """Bits of a code, in every byte: `(word >> shift) & mask`."""

    word: int
    shift: int
    mask: int


@dataclass(frozen=True)
class Lanes:
    """How one width fills words.

    Attributes:
        words: packed words of a unit.
        codes: per fragment word of a unit, the terms that it is made of.
    """

    words: int
    codes: tuple[tuple[Term, ...], ...]

    def pack(self, codes: Tensor) -> Tensor:
        """u8 [..., fragment words, 4] codes → u8 [..., packed words, 4]; whole units."""
        units = codes.unflatten(-2, (-1, len(self.codes)))
        packed = torch.zeros(
            (*units.shape[:-2], self.words, 4), dtype=torch.uint8, device=codes.device
        )
        for i, terms in enumerate(self.codes):
            for term in terms:
                packed[..., term.word, :] |= (units[..., i, :] & term.mask) << term.shift
        return packed.flatten(-3, -2)

    def unpack(self, packed: Tensor) -> Tensor:
        """Inverse of `pack`."""
        units = packed.unflatten(-2, (-1, self.words))
        out = []
        for terms in self.codes:
            parts = [(units[..., t.word, :] >> t.shift) & t.mask for t in terms]
            code = parts[0].clone()
            for part in parts[1:]:
                code |= part
            out.append(code)
        return torch.stack(out, -2).flatten(-3, -2)


def _plain(words: int, bits: int, each: int) -> tuple[tuple[Term, ...], ...]:
    """`each` whole codes a byte: the first of all words, then the second of all words, …"""
    mask = (1 << bits) - 1
    return tuple((Term(w, bits * i, mask),) for i in range(each) for w in range(words))


LANES = {
    2: Lanes(1, _plain(1, 2, 4)),
    3: Lanes(
        3,
        (
            *_plain(3, 3, 2),
            (Term(0, 6, 0b011), Term(1, 5, 0b100)),
            (Term(2, 6, 0b011), Term(1, 4, 0b100)),
        ),
    ),
    4: Lanes(4, _plain(4, 4, 2)),
    5: Lanes(
        5,
        (
            *_plain(5, 5, 1),
            (Term(0, 5, 0b00111), Term(1, 2, 0b11000)),
            (Term(2, 5, 0b00111), Term(3, 4, 0b01000), Term(1, 3, 0b10000)),
            (Term(4, 5, 0b00111), Term(3, 2, 0b11000)),
        ),
    ),
    6: Lanes(
        3,
        (
            *_plain(3, 6, 1),
            (Term(0, 6, 0b000011), Term(1, 4, 0b001100), Term(2, 2, 0b110000)),
        ),
    ),
    8: Lanes(1, _plain(1, 8, 1)),
}
"""Per width. A unit is a divisor of the 16 fragment words that a lane has of 16 rows × 128 k."""
