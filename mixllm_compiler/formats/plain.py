"""Packing `plain.v1`: the stored tensors one after the other. Read by the reference kernels.

int32 [N] model row of every packed row, then per width, ascending:
codes | scales | zero points | steps | offsets, those that the family has, each section padded to 16
bytes. Every group has its step and its offset; which groups share them may be noted behind all that
(`with_spans`), for whoever counts bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .layout import Layout, Packing, register_packing
from .neutral import QuantizedWeight, StoredRows
from .row_format import RowFormat

NAME = "plain.v1"
_ALIGN = 16


def _sections(layout: Layout) -> Iterator[tuple[int, str, torch.dtype, tuple[int, ...]]]:
    """(width, part, dtype, shape) of every section behind the row order."""
    g = layout.groups
    for bits, n in layout.widths:
        fmt = RowFormat(bits, layout.group, layout.family)
        yield bits, "codes", torch.uint8, (n, math.ceil(layout.k * bits / 8))
        if fmt.row_scaled:
            yield bits, "scales", torch.float32, (n,)
        else:
            yield bits, "scales", torch.float16, (n, g)
        if fmt.two_level:
            yield bits, "steps", torch.uint8, (n, g)
            yield bits, "offsets", torch.uint8, (n, g)
        elif not fmt.symmetric:
            yield bits, "zeros", torch.uint8, (n, math.ceil(g * bits / 8))


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def pack_plain(weight: QuantizedWeight) -> Tensor:
    """u8 [bytes] on the weight's device."""
    layout = Layout.of(weight, NAME)
    parts = [weight.order().to(torch.int32)]
    for bits, part, _, _ in _sections(layout):
        parts.append(getattr(weight.rows[bits], part))
    flat = []
    for tensor in parts:
        raw = tensor.contiguous().flatten().view(torch.uint8)
        flat += [raw, raw.new_zeros(_aligned(raw.numel()) - raw.numel())]
    return torch.cat(flat)


def row_order(blob: Tensor, layout: Layout) -> Tensor:
    """int32 [N]: model row of every packed row."""
    return blob[: 4 * layout.n].view(torch.int32)


def unpack_plain(blob: Tensor, layout: Layout) -> QuantizedWeight:
    """Views into the blob, no copies of codes."""
    at = _aligned(4 * layout.n)
    found: dict[int, dict[str, Tensor]] = {}
    for bits, part, dtype, shape in _sections(layout):
        size = math.prod(shape) * dtype.itemsize
        found.setdefault(bits, {})[part] = blob[at : at + size].view(dtype).view(shape)
        at += _aligned(size)
    order = row_order(blob, layout).long()
    sizes = torch.tensor([n for _, n in layout.widths], device=blob.device)
    values = torch.tensor([b for b, _ in layout.widths], device=blob.device, dtype=torch.uint8)
    widths = torch.empty(layout.n, dtype=torch.uint8, device=blob.device)
    widths[order] = values.repeat_interleave(sizes, output_size=layout.n)
    rows = {b: StoredRows(**parts) for b, parts in found.items()}
    return QuantizedWeight(
        layout.n, layout.k, widths, rows, layout.group, layout.family, layout.transform
    )


def with_spans(blob: Tensor, spans: Tensor | None) -> Tensor:
    """A blob that also says how many groups of each row share a step and an offset, uint8 [N]."""
    return blob if spans is None else torch.cat([blob, spans.to(blob.device)])


def spans_of(blob: Tensor, layout: Layout) -> Tensor | None:
    """uint8 [N] of `with_spans`; None if the blob was made without."""
    sections = (math.prod(shape) * dtype.itemsize for _, _, dtype, shape in _sections(layout))
    spans = blob[_aligned(4 * layout.n) + sum(map(_aligned, sections)) :]
    return spans if spans.numel() else None


PLAIN = register_packing(Packing(NAME, pack_plain, unpack_plain))
