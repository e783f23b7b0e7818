"""Packing `cuda64.v1`: tiles of 64 rows of one width, K in groups of 128, a block for each pair.

    int32   [64 · T]     model row of every packed row, −1 for padding
    float32 [64 · T]     scale S of every packed row, 0 for padding
    int32   [T]          the order in which tiles are computed, see `schedule`; padded to 128 bytes
    u8      [⌈T/2⌉][128] the rows of two tiles in that order, by ascending model row, padding last
    per width, ascending; per tile of 64 rows; per group:
        codes            [warp 4][piece][lane 32][16 bytes], then [warp 4] [lane 32][8 bytes] …
        u8 [4][8][4]     t and c of row g, t and c of row g + 8; not for 8 bits

T = tiles of all widths. Rows of one width keep their model order; the last tile of a width is
filled up with rows of zeros. Blocks are contiguous, multiples of 128 bytes and aligned to that.
Rows of the second of two tiles count from 64.

**A lane's bytes are its fragments.** Weights are the operand A of `mma.m16n8k32` and of
`wgmma.m64nNk32`, the features its rows. Warp w of a block has rows 16w … 16w + 15; its lane 4g + t
has 16 fragment words (j, q), four codes e each, for k-step j and register q = 0…3:

    row 16w + g + 8·(q & 1),   k = 32j + 16·(q >> 1) + 4t + e

They are packed as `lanes` says into 2·bits words, which lie in pieces of four words (16 bytes a
lane, a warp's pieces one after the other), a rest of two words as 8 bytes a lane behind them. So a
warp reads whole lines, from global or from shared memory, and needs no shuffle in any regime.

8-bit codes are stored as code + 128: with t·q + c, every width ends as unsigned bytes of integer
weight + 128.
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
from .lanes import LANES

NAME = "cuda64.v1"
TILE = 64
GROUP = 128
PADDING = -1
_WINDOW = 1024  # outputs whose stores should meet in L2; plans keep a tile's rows within as many
_META_BYTES = 128
_ROW_BYTES = 4 * TILE  # of one int32 or float32 a row, per tile
_PAIR = 2 * TILE


def tiles(rows: int) -> int:
    """Tiles that `rows` rows of one width fill."""
    return math.ceil(rows / TILE)


def code_bytes(bits: int) -> int:
    """Bytes of the codes of one (tile, group) block."""
    return TILE * GROUP * bits // 8


def block_bytes(bits: int) -> int:
    """Bytes of one (tile, group) block: codes and metadata."""
    return code_bytes(bits) + (0 if bits == 8 else _META_BYTES)


def header_bytes(count: int) -> int:
    """Bytes in front of the blocks of `count` tiles: rows, scales, the order of tiles and pairs."""
    pairs = math.ceil(count / 2)
    return 2 * _ROW_BYTES * count + math.ceil(4 * count / 128) * 128 + _PAIR * pairs


@functools.lru_cache(maxsize=1024)
def first_bytes(layout: Layout) -> tuple[int, ...]:
    """Where the blocks of each width begin, and the size of the blob."""
    at = [header_bytes(sum(tiles(n) for _, n in layout.widths))]
    for bits, n in layout.widths:
        at.append(at[-1] + tiles(n) * layout.groups * block_bytes(bits))
    return tuple(at)


def pack_tiles(weight: QuantizedWeight) -> Tensor:
    """u8 [bytes] on the weight's device.

    Raises:
        LoweringError: the rows are not two-level in groups of 128.
    """
    if weight.family != "two-level" or weight.group != GROUP:
        raise LoweringError(
            f"{NAME} holds two-level rows in groups of {GROUP}, not family {weight.family!r} in "
            f"groups of {weight.group}"
        )
    orders, scales, blocks = [], [], []
    for bits in weight.rows:
        rows = weight.row_codes(bits)
        missing = -rows.codes.shape[0] % TILE
        order = weight.model_rows(bits).to(torch.int32)
        orders.append(torch.nn.functional.pad(order, (0, missing), value=PADDING))
        scales.append(torch.nn.functional.pad(rows.scales, (0, missing)))
        blocks.append(_pack_width(rows, missing).flatten())
    order = torch.cat(orders)
    turns = schedule(order)
    padded = torch.nn.functional.pad(turns, (0, -turns.numel() % (128 // 4)))
    header = (order, torch.cat(scales), padded, in_pairs(order, turns).flatten())
    return torch.cat([*(part.view(torch.uint8) for part in header), *blocks])


def schedule(order: Tensor) -> Tensor:
    """int32 [T]: windows of the output one after the other, inside one the widths.

    Tiles of a window store into the same lines. Of two tiles that share a CTA the slower one sets
    the pace, so they should be of one width; tiles are stored by width.
    """
    rows = order.view(-1, TILE).double()
    there = order.view(-1, TILE) != PADDING
    mean = (rows * there).sum(1) / there.sum(1)
    return torch.argsort(mean // _WINDOW, stable=True).to(torch.int32)


def in_pairs(order: Tensor, turns: Tensor) -> Tensor:
    """u8 [⌈T/2⌉, 128]: the rows of two tiles by ascending model row, padding behind them."""
    rows = order.view(-1, TILE)[turns.long()]
    rows = torch.nn.functional.pad(rows, (0, 0, 0, len(rows) % 2), value=PADDING).view(-1, _PAIR)
    last = torch.iinfo(torch.int32).max
    return torch.where(rows == PADDING, last, rows).argsort(dim=1, stable=True).to(torch.uint8)


def _pack_width(rows: RowCodes, missing: int) -> Tensor:
    """Blocks of one width: u8 [tiles, groups, block bytes]."""
    bits = rows.format.bits
    codes = rows.codes.view(torch.uint8)
    if bits == 8:
        codes = codes + 128  # wraps: int8 −127 … 127 become 1 … 255
    codes = torch.nn.functional.pad(codes, (0, -codes.shape[1] % GROUP, 0, missing))
    fragments = _to_fragments(codes)
    packed = LANES[bits].pack(fragments.flatten(-3, -2))  # [T, G, warp, lane, word, 4]
    whole = packed.shape[-2] // 4 * 4
    pieces = packed[..., :whole, :].unflatten(-2, (-1, 4)).transpose(3, 4).flatten(3)
    rest = packed[..., whole:, :].flatten(3)
    parts = [torch.cat((pieces, rest), -1).flatten(2)]
    if rows.steps is not None and rows.offsets is not None:
        meta = torch.stack((rows.steps, rows.offsets), -1)
        meta = torch.nn.functional.pad(meta, (0, 0, 0, 0, 0, missing))
        # [T, warp, half, g, G, 2] → [T, G, warp, g, half, 2]
        meta = meta.unflatten(0, (-1, 4, 2, 8)).permute(0, 4, 1, 3, 2, 5)
        parts.append(meta.flatten(2))
    return torch.cat(parts, -1)


def _to_fragments(codes: Tensor) -> Tensor:
    """u8 [rows, K] → [T, G, warp 4, lane 32, j 4, q 4, e 4]; whole tiles and groups."""
    tile = codes.unflatten(1, (-1, 4, 2, 4, 4)).unflatten(0, (-1, 4, 2, 8))
    # T w half g | G j h t e → T G w (g t) j (h half) e
    tile = tile.permute(0, 4, 1, 3, 7, 5, 6, 2, 8)
    return tile.flatten(6, 7).flatten(3, 4)


def _from_fragments(fragments: Tensor) -> Tensor:
    """Inverse of `_to_fragments`."""
    tile = fragments.unflatten(3, (8, 4)).unflatten(6, (2, 2))
    # T G w g t j h half e → T w half g | G j h t e
    return tile.permute(0, 2, 7, 3, 1, 5, 6, 4, 8).flatten(4).flatten(0, 3)


def unpack_tiles(blob: Tensor, layout: Layout) -> QuantizedWeight:
    """Exact inverse of `pack_tiles`.

    Raises:
        LoweringError: the blob's size is not the layout's.
    """
    check_blob(blob, layout)
    count = sum(tiles(n) for _, n in layout.widths)
    order = blob[: _ROW_BYTES * count].view(torch.int32).long()
    scales = blob[_ROW_BYTES * count : 2 * _ROW_BYTES * count].view(torch.float32)
    widths = torch.empty(layout.n, dtype=torch.uint8, device=blob.device)
    found: dict[int, StoredRows] = {}
    at = 0
    first = first_bytes(layout)
    for i, (bits, n) in enumerate(layout.widths):
        widths[order[at : at + n]] = bits
        blocks = blob[first[i] : first[i + 1]].view(tiles(n), layout.groups, block_bytes(bits))
        found[bits] = _unpack_width(blocks, bits, scales[at : at + n].clone(), layout.k)
        at += tiles(n) * TILE
    return QuantizedWeight(
        layout.n, layout.k, widths, found, layout.group, layout.family, layout.transform
    )


def _unpack_width(blocks: Tensor, bits: int, scales: Tensor, k: int) -> StoredRows:
    """The rows of one width, without padding, as they are stored."""
    n, words = scales.numel(), 2 * bits
    whole = words // 4 * 4
    packed = blocks[..., : code_bytes(bits)].unflatten(-1, (4, -1))  # [T, G, warp, bytes]
    pieces = packed[..., : 128 * whole].unflatten(-1, (-1, 32, 4, 4)).transpose(3, 4).flatten(4, 5)
    rest = packed[..., 128 * whole :].unflatten(-1, (32, words - whole, 4))
    codes = LANES[bits].unpack(torch.cat((pieces, rest), -2)).unflatten(-2, (4, 4))
    codes = _from_fragments(codes)[:n, :k]
    if bits == 8:
        return StoredRows((codes - 128).contiguous(), scales)
    meta = blocks[..., code_bytes(bits) :].unflatten(-1, (4, 8, 2, 2))
    # [T, G, warp, g, half, 2] → [T, warp, half, g, G, 2]
    meta = meta.permute(0, 2, 4, 3, 1, 5).flatten(0, 3)[:n]
    steps, offsets = (part.contiguous() for part in meta.unbind(-1))
    return StoredRows(pack_bits(codes, bits).contiguous(), scales, steps=steps, offsets=offsets)


def check_blob(blob: Tensor, layout: Layout) -> None:
    """A kernel reads a blob without asking; so ask before.

    Raises:
        LoweringError: the blob is not what the layout says.
    """
    expected = first_bytes(layout)[-1]
    if blob.dtype != torch.uint8 or blob.numel() != expected or not blob.is_contiguous():
        raise LoweringError(
            f"a blob of {blob.numel()} {blob.dtype} elements is not the {expected} bytes of "
            f"layout '{layout}'; it was packed for another layout or changed since"
        )


CUDA64 = register_packing(Packing(NAME, pack_tiles, unpack_tiles))
