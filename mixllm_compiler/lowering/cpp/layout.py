"""Packing `panels64.v1`: panels of 64 rows of one width and all of K, for dot products of 4 bytes.

    int32 [64 · panels]       model row of every packed row, −1 for padding
    384 bytes [panels]        one entry a panel, in the order in which panels run (see `_entries`)
    per width, ascending; per panel:
        asym        per group: fp16 scale [64], u8 zero point [64] (not at 8 bits), codes
        two-level   fp32 S [64]; then, below 8 bits, u8 c [G/2, rounded up][64][2];
                    per group: u8 t [64] (not at 8 bits), codes

Codes lie as `lanes` says; 8-bit ones as value + 128, unsigned like all others, padding as 0 (which
meets activations of 0). Every piece is a multiple of 64 bytes. Rows of one width keep their model
order, and the last panel of a width is filled up.

**Order.** Panels run in order of their mean output column, so that the lines of an output that two
widths share are still in the cache when the second one writes. A panel that spans at most
`LINES` · 16 columns is written as whole lines: per line the columns it writes and where their rows
are.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys

import numpy as np
import torch
from torch import Tensor

from ...errors import LoweringError
from ...formats.bitpack import pack_bits, unpack_bits
from ...formats.layout import Layout, Packing, register_packing
from ...formats.neutral import QuantizedWeight, StoredRows
from .lanes import LANES, STEP
from .packer import pack_codes

NAME = "panels64.v1"
PANEL = 64
PADDING = -1
LINES = 16
LINE = 16
ENTRY = 384
_ORDER_BYTES = 4 * PANEL
_CHUNK = 1 << 24  # codes that are packed at a time: bounds the memory this takes
_HUGE_PAGE = 1 << 21
_MADV_HUGEPAGE = 14
_ENTRY = np.dtype(
    [
        ("start", "<i8"),
        ("bits", "<i4"),
        ("panel", "<i4"),
        ("column", "<i4"),
        ("lines", "<i4"),
        ("unused", "<i4", 2),
        ("mask", "<u2", LINES),
        ("source", "u1", LINES),
        ("index", "u1", (LINES, LINE)),
        ("rest", "u1", ENTRY - 336),
    ]
)


def panels(rows: int) -> int:
    """Panels that `rows` rows of one width fill."""
    return math.ceil(rows / PANEL)


def block_bytes(bits: int, layout: Layout) -> int:
    """Bytes of one group of a panel: codes and what lies before them."""
    codes = PANEL * layout.group * bits // 8
    if bits == 8:
        return codes + (0 if layout.family == "two-level" else 2 * PANEL)
    return codes + (PANEL if layout.family == "two-level" else 3 * PANEL)


def head_bytes(bits: int, layout: Layout) -> int:
    """Bytes of a panel before its first group."""
    if layout.family != "two-level":
        return 0
    return 4 * PANEL + (0 if bits == 8 else 2 * PANEL * math.ceil(layout.groups / 2))


def panel_bytes(bits: int, layout: Layout) -> int:
    """Bytes of a panel."""
    return head_bytes(bits, layout) + layout.groups * block_bytes(bits, layout)


@functools.lru_cache(maxsize=1024)
def blob_bytes(layout: Layout) -> int:
    """Bytes of a whole blob."""
    return sum(
        panels(n) * (_ORDER_BYTES + ENTRY + panel_bytes(b, layout)) for b, n in layout.widths
    )


@functools.lru_cache(maxsize=1024)
def panel_count(layout: Layout) -> int:
    """Panels of all widths."""
    return sum(panels(n) for _, n in layout.widths)


def pack_panels(weight: QuantizedWeight) -> Tensor:
    """u8 [bytes] on the weight's device."""
    layout = Layout.of(weight, NAME)
    blob = torch.empty(blob_bytes(layout), dtype=torch.uint8, device=weight.widths.device)
    on_huge_pages(blob)
    at = panel_count(layout) * (_ORDER_BYTES + ENTRY)
    orders, starts, widths = [], [], []
    for bits, n in layout.widths:
        rows = weight.model_rows(bits).to(torch.int32)
        orders.append(torch.nn.functional.pad(rows, (0, -n % PANEL), value=PADDING))
        size = panel_bytes(bits, layout)
        starts += [at + i * size for i in range(panels(n))]
        widths += [bits] * panels(n)
        out = blob[at : at + panels(n) * size].view(-1, size)
        _pack_width(weight.rows[bits], bits, layout, out)
        at += out.numel()
    order = torch.cat(orders)
    blob[: 4 * order.numel()] = order.view(torch.uint8)
    entries = _entries(order.view(-1, PANEL).cpu(), starts, widths)
    blob[4 * order.numel() :][: entries.numel()] = entries.to(blob.device)
    return blob


def on_huge_pages(blob: Tensor) -> None:
    """Ask the system for large pages, before the first write: fewer of them are looked up."""
    first = -(-blob.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    size = (blob.data_ptr() + blob.numel() - first) // _HUGE_PAGE * _HUGE_PAGE
    if blob.device.type == "cpu" and sys.platform == "linux" and size > 0:
        # Advice: where it is not taken, nothing is lost.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _MADV_HUGEPAGE)


def _pack_width(rows: StoredRows, bits: int, layout: Layout, out: Tensor) -> None:
    """Fill the panels u8 [panels, bytes of a panel] of one width."""
    head, blocks = _head_and_blocks(out, bits, layout)
    if layout.family == "two-level":
        head[:, : 4 * PANEL] = _in_panels(rows.scales).contiguous().view(torch.uint8)
    else:
        scales = _in_panels(rows.scales).transpose(1, 2).contiguous()
        blocks[..., : 2 * PANEL] = scales.view(torch.uint8)
    if rows.offsets is not None and rows.steps is not None:
        pairs = torch.nn.functional.pad(rows.offsets, (0, layout.groups % 2)).unflatten(1, (-1, 2))
        head[:, 4 * PANEL :] = _in_panels(pairs).transpose(1, 2).flatten(1)
        blocks[..., :PANEL] = _in_panels(rows.steps).transpose(1, 2)
    if rows.zeros is not None:
        zeros = unpack_bits(rows.zeros, bits, layout.groups)
        blocks[..., 2 * PANEL : 3 * PANEL] = _in_panels(zeros).transpose(1, 2)
    if pack_codes(rows.codes, bits, layout.k, layout.group, blocks, out.shape[1]):
        return
    packed = blocks[..., -PANEL * layout.group * bits // 8 :]
    step = max(1, _CHUNK // (PANEL * layout.padded_k))
    for first in range(0, out.shape[0], step):
        codes = unpack_bits(rows.codes[first * PANEL : (first + step) * PANEL], bits, layout.k)
        codes = codes ^ 128 if bits == 8 else codes
        codes = torch.nn.functional.pad(codes, (0, layout.padded_k - layout.k))
        packed[first : first + step] = _pack_codes(_in_panels(codes), bits, layout.groups)


def _head_and_blocks(panel: Tensor, bits: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Views of panels u8 [panels, bytes]: [panels, head], [panels, groups, block]."""
    head = head_bytes(bits, layout)
    return panel[:, :head], panel[:, head:].unflatten(1, (layout.groups, -1))


def _in_panels(values: Tensor) -> Tensor:
    """[n, …] → [panels, 64, …], the last panel filled up with zeros."""
    missing = (0, 0) * (values.dim() - 1) + (0, -values.shape[0] % PANEL)
    return torch.nn.functional.pad(values, missing).unflatten(0, (-1, PANEL))


def _pack_codes(codes: Tensor, bits: int, groups: int) -> Tensor:
    """u8 [panels, 64, K'] → u8 [panels, groups, bytes of a group]."""
    lanes = LANES[bits]
    # [panels, rows, groups, units, steps, 4] → [panels, groups, units, steps, rows, 4]
    steps = codes.view(codes.shape[0], PANEL, groups, -1, lanes.steps, STEP)
    steps = steps.permute(0, 2, 3, 4, 1, 5)
    out = codes.new_zeros(*steps.shape[:3], lanes.words, PANEL, STEP)
    for step, fields in enumerate(lanes.fields):
        for field in fields:
            part = (steps[:, :, :, step] & field.mask) >> field.to
            out[:, :, :, field.word] |= part << field.at
    return out.flatten(2)


def _unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `_pack_codes`: u8 [rows, K']."""
    lanes = LANES[bits]
    words = packed.unflatten(-1, (-1, lanes.words, PANEL, STEP))
    steps = [
        sum((words[:, :, :, f.word] >> f.at << f.to) & f.mask for f in fields)
        for fields in lanes.fields
    ]
    # [panels, groups, units, steps, rows, 4] → [panels, rows, groups, units, steps, 4]
    return torch.stack(steps, 3).permute(0, 4, 1, 2, 3, 5).flatten(2).flatten(0, 1)


def unpack_panels(blob: Tensor, layout: Layout) -> QuantizedWeight:
    """Exact inverse of `pack_panels`.

    Raises:
        LoweringError: the blob's size is not the layout's.
    """
    check_blob(blob, layout)
    at = panel_count(layout) * _ORDER_BYTES
    order = blob[:at].clone().view(torch.int32).long()
    at += panel_count(layout) * ENTRY
    widths = torch.empty(layout.n, dtype=torch.uint8, device=blob.device)
    found: dict[int, StoredRows] = {}
    packed_row = 0
    for bits, n in layout.widths:
        widths[order[packed_row : packed_row + n]] = bits
        packed_row += panels(n) * PANEL
        size = panels(n) * panel_bytes(bits, layout)
        found[bits] = _unpack_width(blob[at : at + size].view(panels(n), -1), bits, n, layout)
        at += size
    return QuantizedWeight(
        layout.n, layout.k, widths, found, layout.group, layout.family, layout.transform
    )


def _unpack_width(panel: Tensor, bits: int, n: int, layout: Layout) -> StoredRows:
    """The rows of one width, without padding, as they are stored."""
    head, blocks = _head_and_blocks(panel, bits, layout)
    codes = _unpack_codes(blocks[..., -PANEL * layout.group * bits // 8 :], bits)
    codes = codes[:n, : layout.k]
    stored = pack_bits(codes ^ 128 if bits == 8 else codes, bits).contiguous()
    if layout.family == "two-level":
        scales = head[:, : 4 * PANEL].contiguous().view(torch.float32).flatten()[:n].clone()
        if bits == 8:
            return StoredRows(stored, scales)
        pairs = head[:, 4 * PANEL :].unflatten(1, (-1, PANEL, 2)).transpose(1, 2)
        offsets = pairs.flatten(2).flatten(0, 1)[:n, : layout.groups].contiguous()
        return StoredRows(stored, scales, None, _by_row(blocks[..., :PANEL], n), offsets)
    scales = _by_row(blocks[..., : 2 * PANEL].contiguous().view(torch.float16), n)
    if bits == 8:
        return StoredRows(stored, scales)
    zeros = _by_row(blocks[..., 2 * PANEL : 3 * PANEL], n)
    return StoredRows(stored, scales, pack_bits(zeros, bits))


def _by_row(values: Tensor, n: int) -> Tensor:
    """[panels, groups, 64] → [n, groups]."""
    return values.transpose(1, 2).flatten(0, 1)[:n].contiguous()


def _entries(order: Tensor, starts: list[int], widths: list[int]) -> Tensor:
    """What a kernel knows of each panel, u8 [panels · 384], in the order in which they run.

    int64 start of the panel in the blob; int32 bits, index of the panel, column of the first line,
    lines (0: the panel is written row by row), two of padding; u16 [16] the columns that each line
    writes; u8 [16] the sixteen rows from which its first one comes; u8 [16][16] where in these and
    the next sixteen the row of each column lies.
    """
    # A matrix has a few hundred panels: clarity before speed.
    table = order.numpy()
    entries = np.zeros(len(table), _ENTRY)
    for entry, index in zip(entries, _by_mean_column(table), strict=True):
        columns = table[index][table[index] >= 0]
        first = columns[0] // LINE
        lines = columns[-1] // LINE - first + 1
        entry["start"], entry["bits"], entry["panel"] = starts[index], widths[index], index
        if lines > LINES:
            continue
        entry["column"], entry["lines"] = first * LINE, lines
        line, place = columns // LINE - first, columns % LINE
        np.bitwise_or.at(entry["mask"], line, (1 << place).astype(np.uint16))
        rows = np.arange(len(columns))
        begins = np.searchsorted(line, np.arange(lines)) // LINE  # sixteen rows of the first one
        entry["source"][:lines] = np.minimum(begins, PANEL // LINE - 1)
        entry["index"][line, place] = rows - LINE * entry["source"][line]
    return torch.from_numpy(entries.view(np.uint8).reshape(-1))


def _by_mean_column(table: np.ndarray) -> np.ndarray:
    """Indices of panels [panels, 64] in the order of their mean output column."""
    real = table >= 0
    return np.argsort((table * real).sum(1) / real.sum(1), kind="stable")


def check_blob(blob: Tensor, layout: Layout) -> None:
    """A kernel reads a blob without asking; so ask before.

    Raises:
        LoweringError: the blob is not what the layout says.
    """
    expected = blob_bytes(layout)
    if blob.dtype != torch.uint8 or blob.numel() != expected or not blob.is_contiguous():
        raise LoweringError(
            f"a blob of {blob.numel()} {blob.dtype} elements is not the {expected} bytes of "
            f"layout '{layout}'; it was packed for another layout or changed since"
        )


PANELS = register_packing(Packing(NAME, pack_panels, unpack_panels))
