"""The two figures of size, one function each: everybody calls these."""

from __future__ import annotations

from collections.abc import Iterable

from .layout import PackedWeight
from .neutral import QuantizedWeight


def true_bits(weights: Iterable[QuantizedWeight]) -> float:
    """Bits per weight of the stored form: codes, scales, zero points and row widths, over N·K.

    Padding of a device's blob is not counted (see `resident_bits`).

    Raises:
        ValueError: no weights.
    """
    weights = list(weights)
    if not weights:
        raise ValueError("true_bits of no weights")
    return 8 * sum(w.true_bytes() for w in weights) / sum(w.n * w.k for w in weights)


def resident_bits(weights: Iterable[PackedWeight]) -> float:
    """Bits per weight that the device blobs occupy, padding and row order included.

    Raises:
        ValueError: no weights.
    """
    weights = list(weights)
    if not weights:
        raise ValueError("resident_bits of no weights")
    return 8 * sum(w.blob.numel() for w in weights) / sum(w.layout.n * w.layout.k for w in weights)
