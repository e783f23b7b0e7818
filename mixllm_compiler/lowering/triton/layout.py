"""Packing `tiles64.v1`: tiles of 64 rows of one width, K in groups, one block per (tile, group).

    int32 [64 · tiles]        model row of every packed row, −1 for padding
    per width, ascending; per tile of 64 rows; per group:
        codes                 64 · group · bits / 8 bytes, plane after plane
        int32 [64]            per row: fp16 scale in the low half, zero point in the next byte

Rows of one width keep their model order; the last tile of a width is filled up with rows of zeros.
A block is contiguous, and so are the blocks of a tile: a program streams through them. Every block
starts at a multiple of 128 bytes from the blob's start.

**Planes.** A code is cut into parts of 1, 2, 4 or 8 bits (5 = 4 + 1, low bits first). A plane
holds one part of all codes of a block, row by row. With B bytes a row, byte j holds k = j, j + B,
j + 2B, …, the first in the lowest bits: so a shift and a mask give a run of neighbouring k, and
nothing has to be interleaved. In 4-bit rows low nibbles are the first half of the group and high
nibbles the second.

**One word of metadata a row**, although 8-bit rows need no zero point and all of them leave a byte
free: a 4-byte load can be asynchronous on a GPU, a 2-byte one cannot. At group 128 this costs 0.09
bits a weight beyond the stored form.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ...errors import LoweringError
from ...formats.bitpack import pack_bits
from ...formats.layout import Layout, Packing, register_packing
from ...formats.neutral import QuantizedWeight, RowCodes, StoredRows

NAME = "tiles64.v1"
TILE = 64
PADDING = -1
_ORDER_BYTES = 4 * TILE
_META_BYTES = 4 * TILE

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}
"""Bits of the planes of each width, low bits of the code first."""


def tiles(rows: int) -> int:
    """Tiles that `rows` rows of one width fill."""
    return math.ceil(rows / TILE)


def plane_row_bytes(part: int, group: int) -> int:
    """Bytes of one row in a plane of `part` bits."""
    return group * part // 8


def block_bytes(bits: int, group: int) -> int:
    """Bytes of one (tile, group) block: codes and metadata."""
    return TILE * group * bits // 8 + _META_BYTES


@functools.lru_cache(maxsize=1024)
def blob_bytes(layout: Layout) -> int:
    """Bytes of a whole blob."""
    return sum(
        tiles(n) * (_ORDER_BYTES + layout.groups * block_bytes(b, layout.group))
        for b, n in layout.widths
    )


def pack_tiles(weight: QuantizedWeight) -> Tensor:
    """u8 [bytes] on the weight's device."""
    orders, blocks = [], []
    for bits in weight.rows:
        rows = weight.model_rows(bits).to(torch.int32)
        missing = -rows.numel() % TILE
        orders.append(torch.nn.functional.pad(rows, (0, missing), value=PADDING))
        blocks.append(_pack_width(weight.row_codes(bits), missing).flatten())
    return torch.cat([torch.cat(orders).view(torch.uint8), *blocks])


def _pack_width(rows: RowCodes, missing: int) -> Tensor:
    """Blocks of one width: u8 [tiles, groups, block bytes]."""
    group, bits = rows.format.group, rows.format.bits
    codes = rows.codes.view(torch.uint8)
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % group, 0, missing))
    # [tiles, rows, groups, group] → [tiles, groups, rows, group]
    codes = codes.view(-1, TILE, codes.shape[1] // group, group).transpose(1, 2)
    parts, low = [], 0
    for part in PLANES[bits]:
        parts.append(_pack_plane((codes >> low) & (2**part - 1), part).flatten(2))
        low += part
    scales = rows.scales.contiguous().view(torch.int16).to(torch.int32) & 0xFFFF
    meta = scales if rows.zeros is None else scales | (rows.zeros.to(torch.int32) << 16)
    meta = torch.nn.functional.pad(meta, (0, 0, 0, missing)).view(-1, TILE, meta.shape[1])
    parts.append(meta.transpose(1, 2).contiguous().view(torch.uint8))
    return torch.cat(parts, -1)


def _pack_plane(values: Tensor, part: int) -> Tensor:
    """u8 [..., group] values of `part` bits → u8 [..., bytes of a row]."""
    if part == 8:
        return values
    chunks = values.unflatten(-1, (8 // part, -1)).unbind(-2)
    packed = chunks[0].clone()
    for i, chunk in enumerate(chunks[1:], 1):
        packed |= chunk << (i * part)
    return packed


def unpack_tiles(blob: Tensor, layout: Layout) -> QuantizedWeight:
    """Exact inverse of `pack_tiles`.

    Raises:
        LoweringError: the blob's size is not the layout's.
    """
    check_blob(blob, layout)
    at = sum(tiles(n) for _, n in layout.widths) * _ORDER_BYTES
    order = blob[:at].view(torch.int32).long()
    widths = torch.empty(layout.n, dtype=torch.uint8, device=blob.device)
    found: dict[int, StoredRows] = {}
    packed_row = 0
    for bits, n in layout.widths:
        widths[order[packed_row : packed_row + n]] = bits
        packed_row += tiles(n) * TILE
        shape = (tiles(n), layout.groups, block_bytes(bits, layout.group))
        found[bits] = _unpack_width(blob[at : at + math.prod(shape)].view(shape), bits, n, layout)
        at += math.prod(shape)
    return QuantizedWeight(
        layout.n, layout.k, widths, found, layout.group, layout.family, layout.transform
    )


def _unpack_width(blocks: Tensor, bits: int, n: int, layout: Layout) -> StoredRows:
    """The rows of one width, without padding, as they are stored."""
    codes: Tensor | None = None
    at = low = 0
    for part in PLANES[bits]:
        size = TILE * plane_row_bytes(part, layout.group)
        plane = _unpack_plane(blocks[..., at : at + size].unflatten(-1, (TILE, -1)), part)
        codes = plane if codes is None else codes | (plane << low)
        at, low = at + size, low + part
    assert codes is not None
    codes = codes.transpose(1, 2).reshape(-1, layout.padded_k)[:n, : layout.k]
    # [tiles, groups, 4 · rows] → [rows, groups, 4 bytes]
    meta = blocks[..., at:].unflatten(-1, (TILE, 4)).transpose(1, 2).flatten(0, 1)[:n].contiguous()
    scales = meta.view(torch.float16)[..., 0].contiguous()
    zeros = None if bits == 8 else pack_bits(meta[..., 2], bits)
    return StoredRows(pack_bits(codes, bits).contiguous(), scales, zeros)


def _unpack_plane(plane: Tensor, part: int) -> Tensor:
    """Inverse of `_pack_plane`."""
    if part == 8:
        return plane
    mask = 2**part - 1
    return torch.cat([(plane >> shift) & mask for shift in range(0, 8, part)], -1)


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


TILES = register_packing(Packing(NAME, pack_tiles, unpack_tiles))
