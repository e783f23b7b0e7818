"""Integers of 1 to 8 bits, packed little-endian along the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes [..., K] of `bits` bits into u8 [..., ceil(K·bits/8)].

    Code k occupies the bits k·bits … k·bits + bits − 1 of its row, least significant first.
    """
    if bits == 8:
        return codes.to(torch.uint8)
    if bits == 4 and codes.shape[-1] % 2 == 0:  # the common case, without the detour over bits
        u = codes.to(torch.uint8)
        return u[..., 0::2] | (u[..., 1::2] << 4)
    k = codes.shape[-1]
    shifts = torch.arange(bits, device=codes.device, dtype=torch.uint8)
    stream = ((codes.to(torch.uint8).unsqueeze(-1) >> shifts) & 1).flatten(-2)
    missing = -(k * bits) % 8
    if missing:
        stream = torch.nn.functional.pad(stream, (0, missing))
    weights = torch.ones(8, device=codes.device, dtype=torch.uint8) << torch.arange(
        8, device=codes.device, dtype=torch.uint8
    )
    return (stream.unflatten(-1, (-1, 8)) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, k: int) -> Tensor:
    """Inverse of `pack_bits`: u8 codes [..., K]."""
    if bits == 8:
        return packed[..., :k]
    if bits == 4:
        return torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :k]
    shifts = torch.arange(8, device=packed.device, dtype=torch.uint8)
    stream = ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2)[..., : k * bits]
    weights = torch.ones(bits, device=packed.device, dtype=torch.uint8) << torch.arange(
        bits, device=packed.device, dtype=torch.uint8
    )
    return (stream.unflatten(-1, (k, bits)) * weights).sum(-1, dtype=torch.uint8)
