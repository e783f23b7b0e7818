"""Quantized matrices of any legal codes, not only those that a quantizer would choose."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import torch

from mixllm_compiler.formats.neutral import QuantizedWeight, RowCodes
from mixllm_compiler.formats.row_format import FAMILIES, WIDTHS, RowFormat, group_size

GROUPS = (0, 16, 32, 64, 128, 256)  # 0: whole rows


def random_rows(fmt: RowFormat, n: int, k: int, generator: torch.Generator) -> RowCodes:
    """n rows of length K; two-level steps are spread over their whole range."""
    groups = math.ceil(k / group_size(k, fmt.group))

    def draw(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    if fmt.two_level:
        steps = 2 ** draw(0, 8, n, groups) - draw(0, 2, n, groups)
        steps, offsets = steps.clamp(1, 255), draw(1, 129, n, groups)
        top = torch.minimum((255 - offsets) // steps, torch.tensor(fmt.qmax))
        top = top.repeat_interleave(group_size(k, fmt.group), 1)[:, :k]
        codes = (torch.rand(n, k, generator=generator) * (top + 1)).floor().long()
        scales = torch.rand(n, generator=generator) + 1e-6
        codes, steps, offsets = (v.to(torch.uint8) for v in (codes, steps, offsets))
        return RowCodes(fmt, codes, scales, steps=steps, offsets=offsets)
    codes = draw(fmt.qmin, fmt.qmax + 1, n, k)
    if fmt.row_scaled:
        return RowCodes(fmt, codes.to(torch.int8), torch.rand(n, generator=generator) + 1e-6)
    scales = (torch.rand(n, groups, generator=generator) + 1e-3).half()
    if fmt.symmetric:
        return RowCodes(fmt, codes.to(torch.int8), scales)
    zeros = draw(0, fmt.qmax + 1, n, groups).to(torch.uint8)
    return RowCodes(fmt, codes.to(torch.uint8), scales, zeros)


@st.composite
def weights(draw, families=FAMILIES, groups=GROUPS):
    n, k = draw(st.integers(1, 24)), draw(st.integers(1, 300))
    group, family = draw(st.sampled_from(groups)), draw(st.sampled_from(families))
    mix = draw(st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    widths = torch.tensor(mix, dtype=torch.uint8)
    widths = widths[torch.randint(len(mix), (n,), generator=generator)]
    parts = [
        random_rows(RowFormat(bits, group, family), int((widths == bits).sum()), k, generator)
        for bits in sorted(set(widths.tolist()))
    ]
    return QuantizedWeight.assemble(n, k, widths, parts, draw(st.sampled_from(("", "hadamard:16"))))
