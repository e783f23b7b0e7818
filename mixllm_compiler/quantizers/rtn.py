"""Round-to-nearest: every code is the closest one, nothing is corrected afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import WeightError
from ..formats.neutral import QuantizedWeight, RowCodes
from ..formats.row_format import DEFAULT_GROUP, RowFormat, group_size, groups_of, padded
from .encode import Encoded, by_span, encode
from .grid import fp16_scale


def quantize_rows(
    w: Tensor, fmt: RowFormat, importance: Tensor | None = None, clip: bool = False
) -> RowCodes:
    """Quantize rows W [n, K] (any float dtype) to one format.

    Asymmetric groups always contain zero in their range. A group of one repeated value c is
    stored as s = |c|, |q − z| = 1: exact whenever c is an fp16 number.

    Args:
        importance: [K] weights of squared errors, such as diag E[x xᵀ]; read when clipping and by
            the family two-level, whose integers are fitted to it.
        clip: try clipped ranges, take the one with the least error.

    Raises:
        WeightError: a value is NaN or infinite, or so large that its scale does not fit fp16.
    """
    if clip or fmt.row_scaled:
        widths = torch.full((len(w),), fmt.bits, dtype=torch.uint8)
        coded = encode(w, widths, fmt.group, fmt.family, importance=importance, clip=clip)
        return coded.rows(fmt.bits)
    return _nearest(w, fmt)


def rounding_error(w: Tensor, fmt: RowFormat, importance: Tensor | None, clip: bool) -> Tensor:
    """fp32 [n, K] Δ = Ŵ − W of `quantize_rows`, without storing codes."""
    if clip or fmt.row_scaled:
        widths = torch.full((len(w),), fmt.bits, dtype=torch.uint8)
        coded = encode(w, widths, fmt.group, fmt.family, importance=importance, clip=clip)
        return coded.dequantize().sub_(w)
    return _nearest(w, fmt).dequantize(torch.float32) - w


def _nearest(w: Tensor, fmt: RowFormat) -> RowCodes:
    n, k = w.shape
    g, size = groups_of(k, fmt.group), group_size(k, fmt.group)
    work = torch.float64 if w.dtype == torch.float64 else torch.float32
    x = torch.nn.functional.pad(w.to(work), (0, padded(k, fmt.group) - k)).view(n, g, size)
    lo, hi = x.amin(-1), x.amax(-1)
    if not bool((lo.isfinite() & hi.isfinite()).all()):
        raise WeightError("the weights hold NaN or infinite values; check how they were made")
    constant = _constant(w, k, size, x)
    if fmt.symmetric:
        top = torch.maximum(hi, -lo)
        s = fp16_scale(torch.where(constant, top, top / torch.full_like(top, 127)))
        q = torch.round(x / s.to(work).unsqueeze(-1)).clamp(-127, 127)
        return RowCodes(fmt, q.view(n, -1)[:, :k].to(torch.int8).contiguous(), s, None)
    lo, hi = lo.clamp_max(0), hi.clamp_min(0)
    span = hi - lo
    s = fp16_scale(torch.where(constant, span, span / torch.full_like(span, fmt.qmax)))
    wide = s.to(work)
    z = torch.where(constant, (lo < 0).to(work), torch.round(-lo / wide).clamp(0, fmt.qmax))
    q = (torch.round(x / wide.unsqueeze(-1)) + z.unsqueeze(-1)).clamp(0, fmt.qmax)
    codes = q.view(n, -1)[:, :k].to(torch.uint8).contiguous()
    return RowCodes(fmt, codes, s, z.to(torch.uint8))


def _constant(w: Tensor, k: int, group: int, x: Tensor) -> Tensor:
    """Which groups hold one value only; the padding of a short last group does not count."""
    lo, hi = x.amin(-1), x.amax(-1)
    tail = k % group
    if tail:
        last = w[:, k - tail :].to(x.dtype)
        lo, hi = lo.clone(), hi.clone()
        lo[:, -1], hi[:, -1] = last.amin(-1), last.amax(-1)
    return lo == hi


def quantize_rtn(
    w: Tensor,
    widths: Tensor,
    group: int = DEFAULT_GROUP,
    transform: str = "",
    family: str = "asym",
    importance: Tensor | None = None,
    clip: bool = False,
    spans: Tensor | None = None,
) -> QuantizedWeight:
    """Quantize W [N, K] with `widths` uint8 [N] bits per row; see `quantize_rows`.

    Args:
        spans: uint8 [N], groups of a two-level row that share a step and an offset.

    Deterministic: the same weights and widths give the same bytes.
    """
    widths = widths.to(w.device)
    if spans is not None:

        def rounded(rows: Tensor | slice, longer: int) -> Encoded:
            return encode(w[rows], widths[rows], longer, family, importance=importance, clip=clip)

        return by_span(spans.to(w.device), group, rounded).stored(transform, spans)
    parts = []
    for bits in sorted(set(widths.tolist())):
        rows = (widths == bits).nonzero().flatten()
        fmt = RowFormat(int(bits), group, family)
        parts.append(quantize_rows(w[rows], fmt, importance, clip))
    return QuantizedWeight.assemble(w.shape[0], w.shape[1], widths, parts, transform)
