"""`QuantizedWeight`: a matrix as a checkpoint stores it, in no device's order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .bitpack import pack_bits, unpack_bits
from .row_format import DEFAULT_GROUP, RowFormat, groups_of, width_bytes


@dataclass(frozen=True)
class RowCodes:
    """The quantized rows of one width, unpacked: what a quantizer returns.

    Attributes:
        format: their common format.
        codes: [n, K]; int8 in [−127, 127] for symmetric rows, else uint8 in [0, 2^bits − 1].
        scales: fp16 [n, G], all finite and positive.
        zeros: uint8 [n, G] zero points, None for symmetric rows.
    """

    format: RowFormat
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def integers(self) -> Tensor:
        """q − z as int16 [n, K]."""
        q = self.codes.to(torch.int16)
        if self.zeros is None:
            return q
        z = self.zeros.to(torch.int16).repeat_interleave(self.format.group, 1)
        return q - z[:, : q.shape[1]]

    def dequantize(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Ŵ [n, K]: s·(q − z), exact in float64."""
        s = self.scales.to(dtype).repeat_interleave(self.format.group, 1)
        q = self.integers().to(dtype)
        return q * s[:, : q.shape[1]]


@dataclass(frozen=True)
class StoredRows:
    """The rows of one width in stored form: bit-packed codes and zero points."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None

    def tensors(self) -> list[Tensor]:
        return [t for t in (self.codes, self.scales, self.zeros) if t is not None]


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix W [N, K], device-neutral.

    Attributes:
        n, k: shape of the matrix.
        widths: uint8 [N], bits of every row in model order.
        rows: per width, the rows of that width in ascending model order.
        group: group size along K.
        family: format family.
        transform: what was applied along K before quantizing, `""` or `"hadamard:<block>"`.
    """

    n: int
    k: int
    widths: Tensor
    rows: Mapping[int, StoredRows] = field(repr=False)
    group: int = DEFAULT_GROUP
    family: str = "asym"
    transform: str = ""

    @classmethod
    def assemble(
        cls, n: int, k: int, widths: Tensor, rows: list[RowCodes], transform: str = ""
    ) -> QuantizedWeight:
        """Store the rows that a quantizer returned, one `RowCodes` a width."""
        stored = {}
        for part in rows:
            b = part.format.bits
            codes = part.codes.view(torch.uint8) if part.format.symmetric else part.codes
            zeros = None if part.zeros is None else pack_bits(part.zeros, b)
            stored[b] = StoredRows(pack_bits(codes, b), part.scales, zeros)
        any_format = rows[0].format
        return cls(
            n,
            k,
            widths.to(torch.uint8),
            dict(sorted(stored.items())),
            any_format.group,
            any_format.family,
            transform,
        )

    def format(self, bits: int) -> RowFormat:
        return RowFormat(bits, self.group, self.family)

    def row_codes(self, bits: int) -> RowCodes:
        """Unpack the rows of one width."""
        stored, fmt = self.rows[bits], self.format(bits)
        codes = unpack_bits(stored.codes, bits, self.k)
        if fmt.symmetric:
            codes = codes.view(torch.int8)
        zeros = None
        if stored.zeros is not None:
            zeros = unpack_bits(stored.zeros, bits, groups_of(self.k, self.group))
        return RowCodes(fmt, codes, stored.scales, zeros)

    def model_rows(self, bits: int) -> Tensor:
        """int64 indices, in the model's matrix, of the rows of one width; ascending."""
        return (self.widths == bits).nonzero().flatten()

    def order(self) -> Tensor:
        """int64 [N]: model row of every packed row (stable argsort of the widths)."""
        return torch.argsort(self.widths, stable=True)

    def counts(self) -> dict[int, int]:
        """Rows per width, ascending."""
        return {b: s.codes.shape[0] for b, s in self.rows.items()}

    def dequantize(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Ŵ [N, K] in model order (in the transformed space if `transform` is set)."""
        out = torch.empty(self.n, self.k, dtype=dtype, device=self.widths.device)
        for b in self.rows:
            out[self.model_rows(b)] = self.row_codes(b).dequantize(dtype)
        return out

    def true_bytes(self) -> int:
        """Bytes of the stored form: codes, scales, zero points and the width of every row."""
        stored = sum(t.numel() * t.element_size() for s in self.rows.values() for t in s.tensors())
        return stored + width_bytes(self.n)
