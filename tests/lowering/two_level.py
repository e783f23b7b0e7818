"""Two-level weights for kernel tests: random legal integers, and the largest ones there are."""

from __future__ import annotations

import torch
from torch import Tensor

from mixllm_compiler.formats.neutral import QuantizedWeight, RowCodes
from mixllm_compiler.formats.row_format import RowFormat, groups_of
from tests.properties.support import random_rows


def random_weight(
    n: int, k: int, widths: Tensor, group: int = 128, seed: int = 0
) -> QuantizedWeight:
    """Any legal codes, steps, offsets and scales; `widths` [N] in model order."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        random_rows(RowFormat(bits, group, "two-level"), int((widths == bits).sum()), k, generator)
        for bits in sorted(set(widths.tolist()))
    ]
    return QuantizedWeight.assemble(n, k, widths, parts)


def extreme_weight(n: int, k: int, widths: Tensor) -> QuantizedWeight:
    """Smallest and largest codes at the largest steps, up to ±127; the first group is zero."""
    generator = torch.Generator().manual_seed(1)
    parts = []
    for bits in sorted(set(widths.tolist())):
        rows, fmt = int((widths == bits).sum()), RowFormat(bits, 128, "two-level")
        high = torch.randint(0, 2, (rows, k), generator=generator)
        high[: rows // 3] = 1
        if bits == 8:
            codes = (254 * high - 127).to(torch.int8)
            codes[:, :128] = 0
            parts.append(RowCodes(fmt, codes, torch.ones(rows)))
            continue
        groups = groups_of(k, 128)
        steps = torch.full((rows, groups), 254 // fmt.qmax, dtype=torch.uint8)
        offsets = (255 - steps.long() * fmt.qmax).to(torch.uint8)
        if bits == 2:  # a single step from −127 to 127
            steps.fill_(254)
            offsets.fill_(1)
        codes = (high * torch.where(steps[:1, :1] == 254, 1, fmt.qmax)).to(torch.uint8)
        codes[:, :128] = 0
        steps[:, 0], offsets[:, 0] = 255 - 128, 128  # zeros, with the largest legal step
        parts.append(RowCodes(fmt, codes, torch.ones(rows), steps=steps, offsets=offsets))
    return QuantizedWeight.assemble(n, k, widths, parts)
