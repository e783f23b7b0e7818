"""Whether a quantizer behind a norm agrees with its definition.

A norm's mean may be added up in any order. A value at the border between two codes then falls to
either side, and where that happens to a token's largest value, all codes of the token move a bit.
Everything else must be as defined.
"""

from __future__ import annotations

import math

from torch import Tensor

CODES = 1e-3
"""Share of the codes that may be off by one."""
TOKENS = 0.01
"""Share of the tokens that may have another scale, by one rounding of its largest value."""


def disagreement(
    found: tuple[Tensor, Tensor, Tensor], expected: tuple[Tensor, Tensor, Tensor]
) -> str:
    """What is wrong with codes, scales and sums (of whole tokens); "" if nothing is."""
    (codes, scales, sums), (other_codes, other_scales, _) = found, expected
    if codes.shape != other_codes.shape or scales.shape != other_scales.shape:
        return f"codes {list(codes.shape)} instead of {list(other_codes.shape)}"
    if not codes.numel():
        return ""
    k = codes.shape[-1]
    codes, other_codes = codes.reshape(-1, k).double(), other_codes.reshape(-1, k).double()
    scales, other_scales = scales.reshape(-1, 1).double(), other_scales.reshape(-1, 1).double()
    if not bool((sums.reshape(-1, 1) == codes.sum(-1, keepdim=True)).all()):
        return "sums are not those of the codes"
    off = (scales / other_scales - 1).abs()
    if not bool((off < 0.01).all()):
        return f"a scale is off by {float(off.max()):.2%}"
    step = (codes * scales / other_scales - other_codes).abs()
    if float(step.max()) > 1 + 127 * float(off.max()):
        return f"a code is off by {float(step.max()):.2f}"
    moved = (off > 1e-5).squeeze(-1)
    if int(moved.sum()) > max(1, math.ceil(TOKENS * len(moved))):
        return f"{int(moved.sum())} of {len(moved)} tokens have another scale"
    wrong = int((codes != other_codes)[~moved].sum())
    if wrong > max(2, CODES * k * int((~moved).sum())):
        return f"{wrong} codes of {codes.numel()} differ"
    return ""
