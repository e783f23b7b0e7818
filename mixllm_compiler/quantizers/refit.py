"""Refit: move the float weights to what the quantized model's inputs ask for, then quantize.

In a quantized model a layer sees x̂, not x. The least-squares answer to W x on x̂ is
W + W D (H + λI)⁻¹ with H = E[x̂ x̂ᵀ] and D = E[(x − x̂) x̂ᵀ]. With few tokens per unknown it fits
noise, so λ is chosen on tokens that were held out, and nothing is done if nothing helps there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .hessian import damp

LAMBDAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)


def refit(
    w: Tensor,
    h: Tensor,
    d: Tensor,
    held_h: Tensor,
    held_d: Tensor,
    share: float,
    row_weights: Tensor | None = None,
) -> tuple[Tensor, float | None]:
    """W [N, K] corrected for the inputs of the quantized model.

    Args:
        h, d: fp32 [K, K] E[x̂ x̂ᵀ] and E[(x − x̂) x̂ᵀ] over all calibration tokens.
        held_h, held_d: the part of these sums that held-out tokens contribute, so that
            h − held_h belongs to the others.
        share: of the tokens that were held out.
        row_weights: [N] how much an error of each output matters; all equal by default.

    Returns:
        fp32 [N, K], and the λ in units of mean diag(H); W itself and None if no λ lowers the
        error on the held-out tokens.
    """
    w = w.float()
    fit_h, fit_d = (h - held_h) / (1 - share), (d - held_d) / (1 - share)
    towards, held_towards = w @ fit_d, w @ held_d
    weights = w.new_ones(len(w)) if row_weights is None else row_weights.to(w)
    best, chosen = 0.0, None
    for damping in LAMBDAS:
        change = solve(fit_h, towards, damping, torch.float32)
        error = ((change @ held_h) * change - 2 * held_towards * change).sum(1)
        found = float((error.double() * weights.double()).sum())
        if found < best:
            best, chosen = found, damping
    if chosen is None:
        return w, None
    return w + solve(h, w @ d, chosen, torch.float64), chosen


def solve(h: Tensor, towards: Tensor, damping: float, dtype: torch.dtype) -> Tensor:
    """fp32 [N, K] `towards` (H + λI)⁻¹, λ = damping · mean diag(H)."""
    lower = torch.linalg.cholesky(damp(h, damping).to(dtype))
    return torch.cholesky_solve(towards.t().to(dtype), lower).t().float()
