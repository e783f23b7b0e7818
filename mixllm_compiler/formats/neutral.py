"""`QuantizedWeight`: a matrix as a checkpoint stores it, in no device's order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import WeightError
from .bitpack import pack_bits, unpack_bits
from .row_format import DEFAULT_GROUP, RowFormat, groups_of, spread, width_bytes
from .spans import shared, spread_out


@dataclass(frozen=True)
class RowCodes:
    """The quantized rows of one width, unpacked: what a quantizer returns.

    Attributes:
        format: their common format.
        codes: [n, K]; int8 in [−127, 127] for symmetric rows, else uint8 in [0, 2^bits − 1].
        scales: finite and positive; fp16 [n, G], or fp32 [n] where rows have one scale.
        zeros: uint8 [n, G] zero points of asymmetric rows, else None.
        steps, offsets: uint8 [n, G] t and c of two-level rows, else None.
    """

    format: RowFormat
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    steps: Tensor | None = None
    offsets: Tensor | None = None

    def integers(self) -> Tensor:
        """What the scale multiplies, int16 [n, K]: q − z, t·q + c − 128, or q."""
        q, k, group = self.codes.to(torch.int16), self.codes.shape[1], self.format.group
        if self.steps is not None and self.offsets is not None:
            steps = spread(self.steps.to(torch.int16), k, group)
            return steps * q + (spread(self.offsets.to(torch.int16), k, group) - 128)
        if self.zeros is not None:
            return q - spread(self.zeros.to(torch.int16), k, group)
        return q

    def dequantize(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Ŵ [n, K]: the integers times their scales, exact in float64."""
        s = self.scales.to(dtype)
        per_weight = (
            s.unsqueeze(1)
            if self.format.row_scaled
            else spread(s, self.codes.shape[1], self.format.group)
        )
        return self.integers().to(dtype) * per_weight

    def check(self) -> None:
        """Refuse what no quantizer writes: kernels do not look again.

        Raises:
            WeightError: a scale is not finite and positive, a step is 0, an offset is 0 or above
                128, or a code expands beyond a signed byte.
        """
        if not bool((self.scales.isfinite() & (self.scales > 0)).all()):
            raise WeightError("a stored scale is zero, negative or not finite; the file is damaged")
        if self.format.symmetric and bool((self.codes == -128).any()):
            raise WeightError("a stored 8-bit code is −128, outside [−127, 127]")
        if self.steps is None or self.offsets is None:
            return
        if bool((self.steps == 0).any() | (self.offsets == 0).any() | (self.offsets > 128).any()):
            raise WeightError("a stored step is 0 or an offset is outside [1, 128]")
        if self.codes.numel() and int(self.integers().max()) > 127:
            raise WeightError(
                f"a stored {self.format.bits}-bit code is beyond ⌊(255 − c)/t⌋: step · code + "
                "offset does not fit a byte"
            )


@dataclass(frozen=True)
class StoredRows:
    """The rows of one width in stored form: bit-packed codes and zero points.

    Steps and offsets are flat where some rows have longer groups (`formats.spans`).
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None
    steps: Tensor | None = None
    offsets: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        parts = self.codes, self.scales, self.zeros, self.steps, self.offsets
        return [t for t in parts if t is not None]


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
        spans: uint8 [N], how many neighbouring groups of a row share their step and offset; None
            if every group has its own.
    """

    n: int
    k: int
    widths: Tensor
    rows: Mapping[int, StoredRows] = field(repr=False)
    group: int = DEFAULT_GROUP
    family: str = "asym"
    transform: str = ""
    spans: Tensor | None = None

    @classmethod
    def assemble(
        cls,
        n: int,
        k: int,
        widths: Tensor,
        rows: list[RowCodes],
        transform: str = "",
        spans: Tensor | None = None,
    ) -> QuantizedWeight:
        """Store the rows that a quantizer returned, one `RowCodes` a width.

        Raises:
            WeightError: groups that `spans` says share a step or an offset have different ones.
        """
        stored = {}
        for part in rows:
            b = part.format.bits
            codes = part.codes.view(torch.uint8) if part.format.symmetric else part.codes
            zeros = None if part.zeros is None else pack_bits(part.zeros, b)
            stored[b] = StoredRows(
                pack_bits(codes, b), part.scales, zeros, part.steps, part.offsets
            )
        any_format = rows[0].format
        found = cls(
            n,
            k,
            widths.to(torch.uint8),
            dict(sorted(stored.items())),
            any_format.group,
            any_format.family,
            transform,
        )
        return found.sharing(spans)

    def format(self, bits: int) -> RowFormat:
        return RowFormat(bits, self.group, self.family)

    def row_codes(self, bits: int) -> RowCodes:
        """Unpack the rows of one width."""
        stored, fmt = self.rows[bits], self.format(bits)
        codes = unpack_bits(stored.codes, bits, self.k)
        if fmt.symmetric:
            codes = codes.view(torch.int8)
        zeros, groups = None, groups_of(self.k, self.group)
        if stored.zeros is not None:
            zeros = unpack_bits(stored.zeros, bits, groups)
        steps, offsets = stored.steps, stored.offsets
        if self.spans is not None and steps is not None and offsets is not None:
            spans = self.spans[self.widths == bits]
            steps, offsets = (spread_out(t, spans, groups) for t in (steps, offsets))
        return RowCodes(fmt, codes, stored.scales, zeros, steps, offsets)

    def expanded(self) -> QuantizedWeight:
        """The same numbers, with a step and an offset for every group: what packings read."""
        if self.spans is None:
            return self
        rows = {}
        for bits, stored in self.rows.items():
            found = self.row_codes(bits)
            rows[bits] = replace(stored, steps=found.steps, offsets=found.offsets)
        return replace(self, rows=rows, spans=None)

    def sharing(self, spans: Tensor | None) -> QuantizedWeight:
        """Inverse of `expanded`.

        Raises:
            WeightError: groups that `spans` says share a step or an offset have different ones.
        """
        if spans is None:
            return self
        spans, rows = spans.to(self.widths.device), {}
        for bits, stored in self.rows.items():
            mine = spans[self.widths == bits]
            steps, offsets = _shared(stored.steps, mine), _shared(stored.offsets, mine)
            rows[bits] = replace(stored, steps=steps, offsets=offsets)
        return replace(self, rows=rows, spans=spans)

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

    def check(self) -> None:
        """See `RowCodes.check`."""
        for bits in self.rows:
            self.row_codes(bits).check()

    def true_bytes(self) -> int:
        """Bytes of the stored form: all stored tensors and the width of every row."""
        stored = sum(t.numel() * t.element_size() for s in self.rows.values() for t in s.tensors())
        return stored + width_bytes(self.n)


def _shared(values: Tensor | None, spans: Tensor) -> Tensor | None:
    if values is None:
        return None
    stored = shared(values, spans)
    if not torch.equal(spread_out(stored, spans, values.shape[1]), values):
        raise WeightError("groups that share a step and an offset have different ones")
    return stored
