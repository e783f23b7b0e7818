"""GPTQ: round a matrix so that its outputs on the calibration text move least.

arXiv 2210.17323, with one factorization for rows of all widths, whole groups ordered by what they
matter, clipped ranges weighted by diag(H), and a descent over codes, steps, offsets and row scales
afterwards.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .descent import descend
from .encode import Encoded, encode
from .hessian import Factor

SWEEPS = 4


def quantize_gptq(
    w: Tensor,
    widths: Tensor,
    h: Tensor,
    factor: Factor,
    group: int,
    family: str,
    *,
    clip: bool = True,
    sweeps: int = SWEEPS,
) -> Encoded:
    """Quantize W [N, K] for inputs of second moment H; rows are independent of each other.

    Deterministic: the same inputs give the same bytes on one device.

    Args:
        widths: uint8 [N] bits of every row.
        h: fp32 [K, K] E[x xᵀ], of the transformed inputs if W is transformed.
        factor: of the same H (`hessian.factorize`); may serve many matrices.
        sweeps: rounds of the descent after GPTQ, two-level rows only; 0 for plain GPTQ.

    Raises:
        WeightError: see `encode`.
    """
    with torch.no_grad():
        coded = encode(w, widths, group, family, clip=clip, factor=factor)
        if sweeps and family == "two-level":
            descend(w.float(), coded, h, sweeps)
        return coded
