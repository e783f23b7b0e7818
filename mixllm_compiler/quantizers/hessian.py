"""What quantizers need of E[x xᵀ]: one factorization a layer, shared by all rows and widths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import WeightError
from ..formats.row_format import group_size, groups_of

DAMPING = 0.01


@dataclass(frozen=True)
class Factor:
    """Of H = E[x xᵀ] in the order in which groups are quantized.

    Attributes:
        groups: groups by falling summed diag(H): what matters most is rounded first, while all
            other columns can still take over its error.
        columns: int64 [K], the columns in that order.
        upper: fp32 [K, K], upper Cholesky factor of the damped inverse in that order.
        diagonal: fp32 [K] diag(H), in the model's order.
    """

    groups: tuple[int, ...]
    columns: Tensor
    upper: Tensor
    diagonal: Tensor


def factorize(h: Tensor, group: int, name: str, damping: float = DAMPING) -> Factor:
    """Factorize H [K, K] in float64.

    Args:
        damping: added to the diagonal, in units of its mean.

    Raises:
        WeightError: H is not finite, or not positive definite even with damping.
    """
    require_finite(h, name)
    k, diagonal = len(h), h.diagonal().double()
    size = group_size(k, group)
    sums = [float(diagonal[at : at + size].sum()) for at in range(0, k, size)]
    order = sorted(range(groups_of(k, group)), key=lambda g: -sums[g])
    columns = torch.cat([torch.arange(g * size, min((g + 1) * size, k)) for g in order])
    columns = columns.to(h.device)
    damped = damp(h, damping)[columns][:, columns]
    lower, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise WeightError(
            f"the Hessian of {name} is not positive definite; calibrate on more text, or quantize "
            "it with method='rtn'"
        )
    upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
    return Factor(tuple(order), columns, upper.float(), diagonal.float())


def require_finite(h: Tensor, name: str) -> None:
    """Refuse E[x xᵀ] of inputs that are no numbers.

    Raises:
        WeightError: its diagonal holds NaN or infinities.
    """
    if not bool(h.diagonal().isfinite().all()):
        raise WeightError(f"the inputs of {name} are NaN or infinite on the calibration text")


def damp(h: Tensor, damping: float) -> Tensor:
    """float64 H + damping · mean diag(H); dead inputs get a diagonal of their own."""
    h = h.double().clone()
    diagonal = h.diagonal()
    mean = diagonal.mean()
    # An input that never moved has no opinion: any code will do.
    diagonal[diagonal <= 0] = mean if mean > 0 else 1.0
    diagonal += damping * (mean if mean > 0 else 1.0)
    return h
