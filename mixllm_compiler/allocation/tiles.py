"""Tiles: the rows of one width that a kernel computes together, and how rows come into them.

Consecutive rows of matrices that read one activation (q, k and v) form a region; a region is cut
into windows, and inside a window rows are put in any order and cut into tiles. All rows of a tile
have one width. A window's rows of each width are therefore a multiple of the tile, but for one
width in a region's last window.

Which rows share a tile decides what tiles cost. They are sorted by loss first. Once widths are
chosen, rows of different widths in a window change places wherever that lowers the loss: of the
rows at two widths, those that gain most from the larger one get it. That changes no byte. Cut
anew, the tiles are better ones to choose widths for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import OptionError
from .problem import Problem
from .tiling import Tiling

_KEY_BITS = 4  # rows are sorted by their loss in the width nearest to this


@dataclass(frozen=True)
class Region:
    """Rows that may share tiles.

    Attributes:
        tensor: number of the first tensor it has rows of.
        rows: int64 [n] rows of the problem; `tile` after `tile` of them get one width.
        tile, window: rows of each; the last ones may be short.
    """

    tensor: int
    rows: Tensor
    tile: int
    window: int


@dataclass(frozen=True)
class Items:
    """What the knapsack chooses formats for: I rows, tiles or whole regions.

    Attributes:
        loss: float64 [I, F] nats per token, the price of time included.
        cost: int64 [I, F] bytes.
        tensor: int64 [I], number of the (first) tensor whose rows these are.
        of_row: int64 [R], the item of every row of the problem.
    """

    loss: Tensor
    cost: Tensor
    tensor: Tensor
    of_row: Tensor


def free_rows(problem: Problem) -> Items:
    """Every row is an item."""
    tensor = problem.tensor_of_row
    return Items(problem.loss, problem.cost[tensor], tensor, torch.arange(len(tensor)))


def groups(problem: Problem, tiling: Tiling) -> Tensor:
    """int64 [T], number of the group of each tensor that tiles may cross; pinned ones are alone."""
    alone = problem.pinned.tolist() if tiling.siblings else [True] * len(problem.shapes)
    count = len(alone)
    numbers = [i if alone[i] else count + first for i, first in enumerate(problem.siblings)]
    return torch.tensor(numbers)


def regions(problem: Problem, tiling: Tiling) -> list[Region]:
    """The regions of all tensors, rows in each window sorted by loss. A pinned tensor is one tile.

    Raises:
        OptionError: `tp` does not divide the rows of a matrix.
    """
    for names, (n, _) in zip(problem.tensors, problem.shapes, strict=True):
        if n % tiling.tp:
            raise OptionError(
                f"{names[0]} has {n} rows, which tp={tiling.tp} devices cannot share evenly; "
                "exclude it or take another tp"
            )
    starts = list(itertools.accumulate((n for n, _ in problem.shapes), initial=0))
    members: dict[int, list[int]] = {}
    for number, group in enumerate(groups(problem, tiling).tolist()):
        members.setdefault(group, []).append(number)
    found = []
    for numbers in members.values():
        whole = not tiling.tile or bool(problem.pinned[numbers[0]])
        parts = 1 if whole else tiling.tp
        for part in range(parts):
            shares = []
            for number in numbers:
                share = problem.shapes[number][0] // parts
                at = starts[number] + part * share
                shares.append(torch.arange(at, at + share))
            rows = torch.cat(shares)
            tile = len(rows) if whole else min(tiling.tile, len(rows))
            window = len(rows) if whole or not tiling.window else tiling.window
            found.append(_sorted(problem, Region(numbers[0], rows, tile, window)))
    return found


def cut(problem: Problem, found: Sequence[Region]) -> Items:
    """Items of all tiles of these regions.

    Raises:
        OptionError: infinite scores leave a tile no format.
    """
    of_row = torch.empty(len(problem.loss), dtype=torch.int64)
    losses, costs, tensors, count = [], [], [], 0
    for region in found:
        n, tile = len(region.rows), region.tile
        items = -(-n // tile)
        of_row[region.rows] = count + torch.arange(n) // tile
        sizes = torch.full((items, 1), tile)
        sizes[-1] = n - (items - 1) * tile
        losses.append(_padded(problem.loss[region.rows], tile).sum(1))
        if problem.row_cost is None:
            costs.append(sizes * problem.cost[region.tensor])
        else:
            costs.append(_padded(problem.row_cost[region.rows].long(), tile).sum(1))
        tensors.append(torch.full((items,), region.tensor))
        count += items
    made = Items(torch.cat(losses), torch.cat(costs), torch.cat(tensors), of_row)
    stuck = made.loss.isinf().all(1)
    if bool(stuck.any()):
        item = int(stuck.nonzero()[0])
        raise OptionError(
            f"{int((of_row == item).sum())} rows of {problem.tensors[int(made.tensor[item])][0]} "
            "share a tile, and infinite scores leave them no common width; allow more widths, "
            "exclude the matrix, or plan free rows with tile=1"
        )
    return made


def resort(problem: Problem, region: Region, choice: Tensor) -> Region:
    """Better tiles around a solution: rows change places between widths, then tiles are cut anew.

    In the new order the same numbers of tiles can have the same widths, at no more loss.

    Args:
        choice: int64 [tiles of the region], index of their format.
    """
    if region.tile == len(region.rows):
        return region
    loss = problem.loss[region.rows]
    if problem.row_cost is not None:
        loss = loss + problem.price * problem.row_cost[region.rows]
    chosen = choice.repeat_interleave(region.tile)[: len(loss)]
    short = int(chosen[-1])
    chosen = _exchange(loss, chosen, region.window)
    # Within a width, by how much the neighbouring widths matter: the first tiles go up first.
    allowed = problem.allowed[region.tensor].nonzero().flatten()
    at = torch.searchsorted(allowed, chosen)
    down, up = allowed[(at - 1).clamp_min(0)], allowed[(at + 1).clamp_max(len(allowed) - 1)]
    gain = (loss.gather(1, down.unsqueeze(1)) - loss.gather(1, up.unsqueeze(1))).squeeze(1)
    order = _within(gain.nan_to_num(0.0), region.window)
    # The width of a short tile goes last, so that the tiles before it stay whole.
    rank = chosen.masked_fill(chosen == short, -1).double()
    order = order[_within(rank[order], region.window)]
    return replace(region, rows=region.rows[order])


def _exchange(loss: Tensor, chosen: Tensor, window: int) -> Tensor:
    """Formats int64 [n] that lose no more, as many rows of each in every window."""
    n = len(loss)
    values = _padded(loss.float(), window).permute(2, 0, 1).contiguous()
    formats = _padded(chosen.to(torch.int8) + 1, window) - 1  # −1 past the end
    slots = torch.arange(window)
    present = chosen.unique().tolist()
    pairs = itertools.combinations(present, 2)
    for low, high in sorted(pairs, key=lambda pair: (pair[1] - pair[0], pair)):
        at = ((formats == low).any(1) & (formats == high).any(1)).nonzero().flatten()
        if not len(at):
            continue
        here = formats.index_select(0, at)
        gain = values[low].index_select(0, at) - values[high].index_select(0, at)
        both, count = (here == low) | (here == high), (here == high).sum(1, keepdim=True)
        order = gain.masked_fill_(~both, -math.inf).argsort(dim=1, descending=True, stable=True)
        larger = torch.zeros_like(both).scatter_(1, order, slots < count)
        here = here.masked_fill(both, low).masked_fill_(larger, high)
        formats.index_copy_(0, at, here)
    return formats.flatten()[:n].long()


def _sorted(problem: Problem, region: Region) -> Region:
    """Rows of each window by falling loss in about four bits."""
    if region.tile == len(region.rows):
        return region
    bits = [abs(f.bits - _KEY_BITS) for f in problem.formats]
    columns = problem.allowed[region.tensor].nonzero().flatten().tolist()
    key = problem.loss[region.rows, min(columns, key=bits.__getitem__)]
    return replace(region, rows=region.rows[_within(key, region.window)])


def _within(key: Tensor, window: int) -> Tensor:
    """int64 [n], the order in which each window's keys fall; of equal keys the earlier first."""
    n = len(key)
    keys = torch.full((-(-n // window), window), -math.inf, dtype=torch.float64)
    keys.view(-1)[:n] = key
    order = keys.argsort(dim=1, descending=True, stable=True)
    return (order + torch.arange(0, keys.numel(), window).unsqueeze(1)).flatten()[:n]


def _padded(values: Tensor, size: int) -> Tensor:
    """[n, …] → [⌈n/size⌉, size, …], zeros at the end."""
    short = -len(values) % size
    zeros = values.new_zeros(short, *values.shape[1:])
    return torch.cat([values, zeros]).unflatten(0, (-1, size))
