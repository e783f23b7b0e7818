"""Float rows and their widths → codes: the sweep over groups that all quantizers share.

Without a Hessian every code is the nearest one (round-to-nearest, with a search of clipped
ranges). With one, this is GPTQ (arXiv 2210.17323): the error of each column is moved to the
columns that come after it, and a group's grid is chosen when the sweep reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import WeightError
from ..formats.neutral import QuantizedWeight, RowCodes
from ..formats.row_format import RowFormat, group_size, groups_of, padded
from .grid import (
    RATIOS,
    Grid,
    asym_grid,
    ratios_for,
    symmetric_grid,
    two_level_grid,
)
from .hessian import Factor

_ROWS = 16_384  # rows that are worked on at a time
_SCALE_FACTORS = (1.0, 0.94, 0.88, 0.82, 0.76)
_TINY = 1e-30
_CACHE_CHUNK = 1 << 17  # weights that are worked on at a time where a cache holds them
_DEVICE_CHUNK = 1 << 24  # and where starting a kernel costs more than memory
_BY_ROW = ("widths", "codes", "step", "offset", "top", "scale")


@dataclass
class Encoded:
    """Codes of rows of any widths, before they are stored.

    Attributes:
        widths: uint8 [N].
        group, family: of the format.
        codes: uint8 [N, K] q; of symmetric rows q = code + 127.
        step, offset, top: fp32 [N, G] grids; two-level ones in units of `scale`.
        scale: fp32 [N], 1 for the family asym.
    """

    widths: Tensor
    group: int
    family: str
    codes: Tensor
    step: Tensor
    offset: Tensor
    top: Tensor
    scale: Tensor

    def columns(self, g: int) -> slice:
        size = group_size(self.codes.shape[1], self.group)
        return slice(g * size, min((g + 1) * size, self.codes.shape[1]))

    def grid(self, g: int) -> Grid:
        return Grid(self.step[:, g], self.offset[:, g], self.top[:, g])

    def values(self, g: int) -> Tensor:
        """fp32 [N, g] values of one group in units of `scale`."""
        return self.grid(g).values(self.codes[:, self.columns(g)].float())

    def dequantize(self) -> Tensor:
        """fp32 [N, K]."""
        parts = [self.values(g) for g in range(self.step.shape[1])]
        return torch.cat(parts, 1) * self.scale[:, None]

    def split(self, sizes: Sequence[int]) -> list[Encoded]:
        """Matrices that were quantized below each other, `sizes` rows each."""
        parts = zip(*(getattr(self, name).split(list(sizes)) for name in _BY_ROW), strict=True)
        return [replace(self, **dict(zip(_BY_ROW, tensors, strict=True))) for tensors in parts]

    @staticmethod
    def joined(parts: Sequence[Encoded]) -> Encoded:
        """Rows of one group size and family below each other."""
        columns: dict[str, Any] = {
            name: torch.cat([getattr(p, name) for p in parts]) for name in _BY_ROW
        }
        return replace(parts[0], **columns)

    def take(self, rows: Tensor) -> Encoded:
        """The rows of these indices, in their order."""
        columns: dict[str, Any] = {name: getattr(self, name)[rows] for name in _BY_ROW}
        return replace(self, **columns)

    def stored(self, transform: str = "", spans: Tensor | None = None) -> QuantizedWeight:
        """In the neutral form; `spans` uint8 [N] are those that the rows were quantized with."""
        n, k = self.codes.shape
        rows = [self.rows(int(bits)) for bits in sorted(set(self.widths.tolist()))]
        spans = None if spans is None else spans.to(self.widths.device)
        return QuantizedWeight.assemble(n, k, self.widths, rows, transform, spans)

    def regrouped(self, group: int) -> Encoded:
        """The same rows in groups of a size that divides theirs."""
        if group == self.group:
            return self
        repeats, groups = self.group // group, groups_of(self.codes.shape[1], group)
        grids = {
            name: getattr(self, name).repeat_interleave(repeats, 1)[:, :groups]
            for name in ("step", "offset", "top")
        }
        return replace(self, group=group, **grids)

    def rows(self, bits: int) -> RowCodes:
        """The rows of one width, ascending."""
        fmt = RowFormat(bits, self.group, self.family)
        rows = (self.widths == bits).nonzero().flatten()
        codes, step, offset = self.codes[rows], self.step[rows], self.offset[rows]
        if fmt.symmetric:
            codes = (codes.to(torch.int16) - 127).to(torch.int8)
            return RowCodes(fmt, codes, self.scale[rows] if fmt.row_scaled else step.half())
        if fmt.two_level:
            t, c = step.to(torch.uint8), (offset + 128).to(torch.uint8)
            return RowCodes(fmt, codes, self.scale[rows], steps=t, offsets=c)
        zeros = (-offset / step).round().to(torch.uint8)
        return RowCodes(fmt, codes, step.half(), zeros)


def by_span(
    spans: Tensor, group: int, quantize: Callable[[Tensor | slice, int], Encoded]
) -> Encoded:
    """Rows of each span quantized by themselves, in groups `span` times as long as `group`.

    Args:
        spans: uint8 [N].
        quantize: (int64 indices of rows, or all, their group size) → the rows in that order.
    """
    order, parts = [], []
    found = sorted(set(spans.tolist()))
    if len(found) == 1:
        return quantize(slice(None), group * found[0]).regrouped(group)
    for span in found:
        rows = (spans == span).nonzero().flatten()
        order.append(rows)
        parts.append(quantize(rows, group * span).regrouped(group))
    return Encoded.joined(parts).take(torch.cat(order).argsort())


def encode(
    w: Tensor,
    widths: Tensor,
    group: int,
    family: str,
    *,
    importance: Tensor | None = None,
    clip: bool = True,
    factor: Factor | None = None,
) -> Encoded:
    """Quantize W [N, K] with `widths` uint8 [N] bits per row. Deterministic.

    Args:
        importance: [K] weights of squared errors when ranges are clipped, diag E[x xᵀ]; by
            default that of `factor`, else all equal.
        clip: search clipped ranges.
        factor: of E[x xᵀ]: errors are fed back (GPTQ). Without it codes are the nearest ones.

    Raises:
        WeightError: weights are NaN or infinite, or too large for fp16 scales.
    """
    n, k = w.shape
    if widths.shape != (n,):
        raise ValueError(f"{list(widths.shape)} widths for {n} rows")
    if not bool(w.isfinite().all()):
        raise WeightError("the weights hold NaN or infinite values; check how they were made")
    widths = widths.to(w.device)
    if importance is None:
        importance = w.new_ones(k) if factor is None else factor.diagonal
    importance = importance.float().to(w.device)
    # Only ratios matter; a column that never moved still counts a little.
    importance = (importance / importance.mean().clamp(min=_TINY)).clamp(min=1e-6)
    parts = [
        _encode(
            w[at : at + _ROWS].float(),
            widths[at : at + _ROWS],
            group,
            family,
            importance,
            clip,
            factor,
        )
        for at in range(0, n, _ROWS)
    ]
    return parts[0] if len(parts) == 1 else Encoded.joined(parts)


def _encode(
    w: Tensor,
    widths: Tensor,
    group: int,
    family: str,
    importance: Tensor,
    clip: bool,
    factor: Factor | None,
) -> Encoded:
    n, k = w.shape
    step, offset, top = torch.ones(3, n, groups_of(k, group), device=w.device)
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    scale = w.new_ones(n)
    if family == "two-level":
        scale = row_scales(w, widths, group, importance, clip)
    out = Encoded(widths, group, family, codes, step, offset, top, scale)
    x = w / scale[:, None]
    if factor is None:
        _round(out, x, importance, clip)
    else:
        _round_and_feed_back(out, x, importance, clip, factor)
    return out


def _round(out: Encoded, x: Tensor, importance: Tensor, clip: bool) -> None:
    """Every weight to its nearest value, as many groups at a time as a cache holds."""
    parts = in_groups(x, out.group)
    weights = in_groups(importance, out.group)
    for groups in _some(parts):
        part = parts[:, groups].contiguous()
        grid = choose_grid(part, out.widths, out.family, weights[groups], clip)
        out.step[:, groups], out.offset[:, groups] = grid.step, grid.offset
        out.top[:, groups] = grid.top
        size = parts.shape[2]
        columns = slice(groups.start * size, min(groups.stop * size, x.shape[1]))
        q = grid.codes(part).flatten(1)
        out.codes[:, columns] = q[:, : columns.stop - columns.start].to(torch.uint8)


def in_groups(x: Tensor, group: int) -> Tensor:
    """[..., K] → [..., G, g], the last group padded with zeros."""
    k = x.shape[-1]
    missing = padded(k, group) - k
    padding = torch.nn.functional.pad(x, (0, missing)) if missing else x
    return padding.unflatten(-1, (-1, group_size(k, group)))


def _some(parts: Tensor) -> Iterator[slice]:
    """Slices of the groups of [R, G, g] to work on together."""
    n, groups, size = parts.shape
    most = _DEVICE_CHUNK if parts.is_cuda else _CACHE_CHUNK
    count = max(1, most // max(1, n * size))
    for at in range(0, groups, count):
        yield slice(at, min(at + count, groups))


def _round_and_feed_back(
    out: Encoded, x: Tensor, importance: Tensor, clip: bool, factor: Factor
) -> None:
    """GPTQ's sweep; x [N, K] in units of the rows' scales."""
    x, at, k = x[:, factor.columns], 0, x.shape[1]
    for g in factor.groups:
        columns = out.columns(g)
        here = slice(at, at + columns.stop - columns.start)
        part = x[:, here].contiguous()
        grid = choose_grid(part, out.widths, out.family, importance[columns], clip)
        out.step[:, g], out.offset[:, g], out.top[:, g] = grid.step, grid.offset, grid.top
        q, carried = _feed_back(part, grid, factor.upper[here, here])
        out.codes[:, columns] = q.to(torch.uint8)
        at = here.stop
        if at < k:
            x[:, at:].addmm_(carried, factor.upper[here, at:], alpha=-1)


def _feed_back(x: Tensor, grid: Grid, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize the columns of a group one by one; each moves its error to those behind it.

    Returns:
        codes [R, g] and what later groups take over: (x − value) / U_jj, [R, g].
    """
    work = x.t().contiguous()  # one column of weights is one row in memory
    codes, left = torch.empty_like(work), torch.empty_like(work)
    inverse, shift, zero = 1 / grid.step, -(grid.offset / grid.step), torch.zeros_like(grid.top)
    diagonal = upper.diagonal()
    share = upper / diagonal[:, None]
    for j in range(len(work)):
        q = torch.addcmul(shift, work[j], inverse).round_()
        torch.clamp(q, zero, grid.top, out=codes[j])
        torch.sub(work[j], torch.addcmul(grid.offset, codes[j], grid.step), out=left[j])
        if j + 1 < len(work):
            work[j + 1 :].addr_(share[j, j + 1 :], left[j], alpha=-1)
    return codes.t(), left.div_(diagonal[:, None]).t()


def choose_grid(x: Tensor, widths: Tensor, family: str, importance: Tensor, clip: bool) -> Grid:
    """The best grids for groups x [R, g] or [R, G, g] of rows of any widths."""
    found: Grid | None = None
    for eight in (True, False):
        rows = ((widths == 8) == eight).nonzero().flatten()
        if not len(rows):
            continue
        whole = len(rows) == len(x)
        part, bits = (x, widths) if whole else (x[rows], widths[rows])
        grid = _grid_of(part, bits, family, importance, clip, eight)
        if whole:
            return grid
        found = found or Grid(*(x.new_empty(x.shape[:-1]) for _ in range(3)))
        found.put(rows, grid)
    assert found is not None
    return found


def _grid_of(
    x: Tensor, widths: Tensor, family: str, importance: Tensor, clip: bool, eight: bool
) -> Grid:
    if eight and family == "two-level":
        shape = x.shape[:-1]
        return Grid(x.new_ones(shape), x.new_full(shape, -127), x.new_full(shape, 254))
    ratios = ratios_for(int(widths.min()), clip)
    if eight:
        return symmetric_grid(x, importance, ratios)
    top = (torch.exp2(widths.float()) - 1).view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
    if family == "two-level":
        return two_level_grid(x, top, importance, ratios)
    return asym_grid(x, top, importance, ratios)


def row_scales(w: Tensor, widths: Tensor, group: int, importance: Tensor, clip: bool) -> Tensor:
    """fp32 [N] scales S of two-level rows.

    max|w| / 127; from 5 bits on, where the integer step is small and coarse, and for 8-bit rows,
    the best of five scales below it. A row of zeros gets 1.
    """
    scale = w.abs().amax(1) / 127
    scale = torch.where(scale > 0, scale.clamp(min=_TINY), torch.ones_like(scale))
    if not clip:
        return scale
    weights = in_groups(importance, group)
    for bits in sorted(set(widths.tolist()) - {2, 3, 4}):
        rows = (widths == bits).nonzero().flatten()
        mine, part = w[rows], scale[rows]
        best: Tensor | None = None
        chosen = part
        for factor in _SCALE_FACTORS:
            tried = part * factor
            x = mine / tried[:, None]
            if bits == 8:
                error = (x - x.round().clamp_(-127, 127)).square_() @ importance
            else:
                error, parts = torch.zeros_like(tried), in_groups(x, group)
                for groups in _some(parts):
                    y, d = parts[:, groups].contiguous(), weights[groups]
                    top = x.new_full(y.shape[:-1], 2.0**bits - 1)
                    grid = two_level_grid(y, top, d, RATIOS[:3], descent=0)
                    error += grid.errors(y, d).sum(1)
            error *= tried.square()
            if best is None:
                best = error
                continue
            better = error < best
            chosen = torch.where(better, tried, chosen)
            best = torch.minimum(error, best)
        scale[rows] = chosen
    return scale
