"""What the semantic ops mean, in plain torch: the only definition, on any device.

Written for exactness, then for clarity. Products of codes are formed in float32 matrix
multiplications over one group at a time, where every partial sum is an integer below 2²⁴ and
therefore exact; the float arithmetic around them is the definition that kernels are compared
with (1e-6 relative to the sum of magnitudes, since only the order of adding groups is free).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import OptionError
from ..formats.layout import Layout, PackedWeight, unpack
from ..formats.row_format import padded
from ..transforms.hadamard import block_hadamard


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
    grouped = x.unflatten(-1, (-1, group))
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
    """acc[m, n] = Σ_g s_w[n,g] · (s_x[m,g] ·) (Σ_k q_x·q_w − z[n,g]·sums[m,g]), packed order.

    Groups add up in float64, acc is fp32. s_x is applied here in mode "group"; in mode "token"
    (scales [..., 1]) by `dequantize`.
    """
    spec = Layout.parse(layout)
    weight = unpack(PackedWeight(packed, spec))
    lead, g = codes.shape[:-1], spec.groups
    x = codes.reshape(-1, g, spec.group).float()
    x_sums = sums.reshape(-1, g).float()
    x_scales = scales.reshape(-1, scales.shape[-1])
    # In fp32, hundreds of groups of one sign would lose more than the 1e-6 that kernels may differ.
    acc = torch.zeros(x.shape[0], spec.n, dtype=torch.float64, device=codes.device)
    at = 0
    for bits, n in spec.widths:
        rows = weight.row_codes(bits)
        q = torch.nn.functional.pad(rows.codes, (0, spec.padded_k - spec.k)).float()
        s = rows.scales.float()
        out = acc[:, at : at + n]
        for i in range(g):
            part = x[:, i] @ q[:, i * spec.group : (i + 1) * spec.group].t()
            if rows.zeros is not None:
                part -= torch.outer(x_sums[:, i], rows.zeros[:, i].float())
            part *= s[:, i]
            if x_scales.shape[1] > 1:
                part *= x_scales[:, i : i + 1]
            out += part
        at += n
    return acc.float().reshape(*lead, spec.n)


def dequantize(
    acc: Tensor,
    scales: Tensor,
    sums: Tensor,
    packed: Tensor,
    layout: str,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """y [..., N] in model order: acc (times the token's scale) + bias, rounded once to `dtype`."""
    weight = unpack(PackedWeight(packed, Layout.parse(layout)))
    y = acc * scales if scales.shape[-1] == 1 else acc
    y = y.index_select(-1, torch.argsort(weight.order()))
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)
