"""What the semantic ops mean, in plain torch: the only definition, on any device.

Written for exactness, then for clarity. Products of codes are formed in float32 matrix
multiplications over at most 1,024 columns at a time, where every partial sum is an integer below
2²⁴ and therefore exact; the float arithmetic around them is the definition that kernels are
compared with. For two-level rows and one activation scale per token there is one order of it, and
kernels must give the same bits; elsewhere 1e-6 relative to the sum of magnitudes is allowed, since
the order of adding groups is free.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OptionError
from ..formats.layout import Layout, PackedWeight, unpack
from ..formats.neutral import RowCodes
from ..formats.row_format import group_size, padded
from ..transforms.hadamard import block_hadamard

EXACT_COLUMNS = 1024  # 127·127·1024 < 2²⁴: sums over so many columns are exact in fp32
MAX_INTEGER_K = 66_000  # 127·255·K, the bias term of a kernel on unsigned bytes included, < 2³¹


def hadamard(x: Tensor, block: int) -> Tensor:
    """x [..., K] times the orthonormal block-diagonal Hadamard matrix; computed in fp32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return block_hadamard(x.to(dtype), block).to(x.dtype)


def quantize_activation(x: Tensor, mode: str, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dynamic symmetric int8: codes = round(x / s), s = max|x| / 127 of a token or of its group.

    An all-zero token or group gets scale 1. K is padded with zeros to whole groups. Division
    and rounding (half to even) are IEEE fp32, so that kernels can match every code.
    """
    if mode not in ("token", "group"):
        raise OptionError(f"unknown activation mode {mode!r}; modes are 'token' and 'group'")
    k = x.shape[-1]
    x = torch.nn.functional.pad(x.float(), (0, padded(k, group) - k))
    grouped = x.unflatten(-1, (-1, group_size(k, group)))
    amax = grouped.abs().amax(-1)
    if mode == "token":
        amax = amax.amax(-1, keepdim=True)
    # By a tensor: CUDA divides by a number through its reciprocal, one unit in the last place off.
    scales = torch.where(amax == 0, torch.ones_like(amax), amax / torch.full_like(amax, 127))
    # A subnormal maximum divided by 127 can become zero: the token is then quantized as zero.
    scales = torch.where(scales == 0, torch.ones_like(scales), scales)
    codes = torch.round(grouped / scales.unsqueeze(-1)).clamp(-127, 127)
    sums = codes.sum(-1).to(torch.int32)
    return codes.flatten(-2).to(torch.int8), scales, sums


def mixed_gemm(codes: Tensor, scales: Tensor, sums: Tensor, packed: Tensor, layout: str) -> Tensor:
    """acc [..., N] in packed order; s_x is applied here in mode "group", later in mode "token".

    asym: acc[m, n] = Σ_g s_w[n,g] · (s_x[m,g] ·) (Σ_k q_x·q_w − z[n,g]·sums[m,g]), in fp32.
    two-level, token: acc[m, n] = Σ_k q_x·(t[n,g]·q_w + c[n,g] − 128), an exact int32.
    two-level, group: acc[m, n] = S[n] · Σ_g s_x[m,g] Σ_k q_x·(t·q_w + c − 128), in fp32.

    Float sums over groups are formed in float64 and rounded once.

    Raises:
        OptionError: a two-level row is so long that its int32 could overflow.
    """
    spec = Layout.parse(layout)
    weight = unpack(PackedWeight(packed, spec))
    lead = codes.shape[:-1]
    x = codes.reshape(-1, codes.shape[-1])
    x_scales = scales.reshape(-1, scales.shape[-1])
    integer = is_integer(spec, scales)
    if integer and spec.k > MAX_INTEGER_K:
        raise OptionError(f"K = {spec.k}: integer sums are safe up to K = {MAX_INTEGER_K}")
    acc = torch.empty(x.shape[0], spec.n, dtype=torch.float64, device=codes.device)
    at = 0
    for bits, n in spec.widths:
        rows = weight.row_codes(bits)
        out = acc[:, at : at + n]
        if integer:
            out.copy_(_products(x, rows.integers()))
        elif rows.format.row_scaled:
            w, group = rows.integers(), group_size(spec.k, spec.group)
            columns = [slice(i * group, (i + 1) * group) for i in range(spec.groups)]
            parts = [
                _products(x[:, at_g], w[:, at_g]) * x_scales[:, i : i + 1]
                for i, at_g in enumerate(columns)
            ]
            out.copy_(torch.stack(parts).sum(0) * rows.scales)
        else:
            out.copy_(_asym(x, x_scales, sums.reshape(-1, spec.groups), rows))
        at += n
    acc = acc.to(torch.int32) if integer else acc.float()
    return acc.reshape(*lead, spec.n)


def is_integer(layout: Layout, scales: Tensor) -> bool:
    """Whether the sums over K stay in integers: two-level rows and one activation scale a token."""
    return layout.family == "two-level" and scales.shape[-1] == 1


def _asym(x: Tensor, x_scales: Tensor, x_sums: Tensor, rows: RowCodes) -> Tensor:
    """float64 [M, n]: rows with a float scale per group."""
    # In fp32, hundreds of groups of one sign would lose more than the 1e-6 that kernels may differ.
    acc = torch.zeros(x.shape[0], rows.codes.shape[0], dtype=torch.float64, device=x.device)
    group = group_size(rows.codes.shape[1], rows.format.group)
    for i in range(rows.scales.shape[1]):
        columns = slice(i * group, (i + 1) * group)
        part = _products(x[:, columns], rows.codes[:, columns])
        if rows.zeros is not None:
            part -= torch.outer(x_sums[:, i].double(), rows.zeros[:, i].double())
        part = part.float() * rows.scales[:, i].float()
        if x_scales.shape[1] > 1:
            part *= x_scales[:, i : i + 1]
        acc += part
    return acc


def _products(x: Tensor, w: Tensor) -> Tensor:
    """float64 [M, n]: exact x wᵀ of integers below 2⁸; x may be longer, padded with zeros."""
    acc: Tensor | None = None
    for at in range(0, w.shape[1], EXACT_COLUMNS):
        columns = slice(at, min(at + EXACT_COLUMNS, w.shape[1]))
        part = (x[:, columns].float() @ w[:, columns].float().t()).double()
        acc = part if acc is None else acc + part
    assert acc is not None
    return acc


def dequantize(
    acc: Tensor,
    scales: Tensor,
    sums: Tensor,
    packed: Tensor,
    layout: str,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y [..., N] in model order: acc times the scales it lacks, + bias, rounded once to `dtype`.

    An integer acc becomes float(acc) · (S[n] · s_x[m]), each operation rounded to fp32.
    """
    spec = Layout.parse(layout)
    weight = unpack(PackedWeight(packed, spec))
    if is_integer(spec, scales):
        row_scales = torch.cat([weight.rows[bits].scales for bits, _ in spec.widths])
        y = acc.float() * (row_scales * scales)
    else:
        y = acc * scales if scales.shape[-1] == 1 else acc
    y = y.index_select(-1, torch.argsort(weight.order()))
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


def grouped_linear(
    x: Tensor,
    offsets: Tensor,
    packed: list[Tensor],
    layouts: str,
    mode: str,
    group: int,
    block: int,
    dtype: torch.dtype,
) -> Tensor:
    """y [S, N]: rows offsets[e − 1] to offsets[e] of x through the linear of expert e.

    Rows from the last offset on belong to no expert and become zero.

    Args:
        x: [S, K].
        offsets: integers [E], ascending.
        packed, layouts: a blob of every expert, and the texts of their layouts.
        mode, group: of `quantize_activation`.
        block: of the Hadamard transform of x, 0 for none.
    """
    specs = Layout.parse_all(layouts)
    y = torch.zeros(x.shape[0], specs[0].n, dtype=dtype, device=x.device)
    start = 0
    for end, blob, spec in zip(offsets.tolist(), packed, specs, strict=True):
        if end > start:
            rows = x[start:end]
            rows = hadamard(rows, block) if block else rows
            codes, scales, sums = quantize_activation(rows, mode, group)
            acc = mixed_gemm(codes, scales, sums, blob, str(spec))
            y[start:end] = dequantize(acc, scales, sums, blob, str(spec), None, dtype)
        start = end
    return y
