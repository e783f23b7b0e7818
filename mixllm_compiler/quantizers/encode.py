"""Float rows and their widths → codes: the sweep over groups that all quantizers share.

Without a Hessian every code is the nearest one (round-to-nearest, with a search of clipped
ranges). With one, this is GPTQ (arXiv 2210.17323): the error of each column is moved to the
columns that come after it, and a group's grid is chosen when the sweep reaches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..errors import WeightError
from ..formats.neutral import QuantizedWeight, RowCodes
from ..formats.row_format import RowFormat, group_size, groups_of
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

    def stored(self, transform: str = "") -> QuantizedWeight:
        """In the neutral form."""
        n, k = self.codes.shape
        rows = [self.rows(int(bits)) for bits in sorted(set(self.widths.tolist()))]
        return QuantizedWeight.assemble(n, k, self.widths, rows, transform)

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
    if len(parts) == 1:
        return parts[0]
    joined = {name: torch.cat([getattr(p, name) for p in parts]) for name in _BY_ROW}
    return replace(parts[0], **joined)


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
    groups = groups_of(k, group)
    grids = torch.ones(3, n, groups, device=w.device)
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    scale = (
        row_scales(w, widths, group, importance, clip) if family == "two-level" else w.new_ones(n)
    )
    out = Encoded(widths, group, family, codes, grids[0], grids[1], grids[2], scale)
    x = w / scale[:, None]
    order = range(groups) if factor is None else factor.groups
    at = 0
    if factor is not None:
        x = x[:, factor.columns]
    for g in order:
        columns = out.columns(g)
        size = columns.stop - columns.start
        here = slice(at, at + size) if factor is not None else columns
        part = x[:, here].contiguous()
        grid = choose_grid(part, widths, family, importance[columns], clip)
        out.step[:, g], out.offset[:, g], out.top[:, g] = grid.step, grid.offset, grid.top
        if factor is None:
            codes[:, columns] = grid.codes(part).to(torch.uint8)
        else:
            q, carried = _feed_back(part, grid, factor.upper[here, here])
            codes[:, columns] = q.to(torch.uint8)
            if at + size < k:
                x[:, at + size :].addmm_(carried, factor.upper[here, at + size :], alpha=-1)
        at += size
    return out


def _feed_back(x: Tensor, grid: Grid, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize the columns of a group one by one; each moves its error to those behind it.

    Returns:
        codes [R, g] and what later groups take over: (x − value) / U_jj, [R, g].
    """
    work = x.t().contiguous()  # one column of weights is one row in memory
    codes, carried = torch.empty_like(work), torch.empty_like(work)
    inverse, shift = 1 / grid.step, -(grid.offset / grid.step)
    diagonal = upper.diagonal().tolist()
    for j in range(len(work)):
        q = torch.addcmul(shift, work[j], inverse).round_().clamp_(min=0)
        torch.minimum(q, grid.top, out=codes[j])
        value = torch.addcmul(grid.offset, codes[j], grid.step)
        torch.sub(work[j], value, out=carried[j]).div_(diagonal[j])
        if j + 1 < len(work):
            work[j + 1 :].addr_(upper[j, j + 1 :], carried[j], alpha=-1)
    return codes.t(), carried.t()


def choose_grid(x: Tensor, widths: Tensor, family: str, importance: Tensor, clip: bool) -> Grid:
    """The best grids for one group x [R, g] of rows of any widths."""
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
        found = found or Grid(*(x.new_empty(len(x)) for _ in range(3)))
        found.put(rows, grid)
    assert found is not None
    return found


def _grid_of(
    x: Tensor, widths: Tensor, family: str, importance: Tensor, clip: bool, eight: bool
) -> Grid:
    if eight and family == "two-level":
        return Grid(x.new_ones(len(x)), x.new_full((len(x),), -127), x.new_full((len(x),), 254))
    ratios = ratios_for(int(widths.min()), clip)
    if eight:
        return symmetric_grid(x, importance, ratios)
    top = torch.exp2(widths.float()) - 1
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
    k = w.shape[1]
    size = group_size(k, group)
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
                top = torch.full_like(tried, 2.0**bits - 1)
                error = torch.zeros_like(tried)
                for at in range(0, k, size):
                    y, d = x[:, at : at + size].contiguous(), importance[at : at + size]
                    error += two_level_grid(y, top, d, RATIOS[:3], descent=0).errors(y, d)
            error *= tried.square()
            if best is None:
                best = error
                continue
            better = error < best
            chosen = torch.where(better, tried, chosen)
            best = torch.minimum(error, best)
        scale[rows] = chosen
    return scale
