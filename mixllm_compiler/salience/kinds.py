"""The kinds of scores, and what each of them means.

For y = x Wᵀ, δ is the gradient of the summed token losses at y, Δ = Ŵ − W a row's rounding error in
a format, T the number of supervised tokens (the sum of their weights), d a sequence, and
A_d = Σ_t δ_t (x_t·Δ) the first-order change of that sequence's loss. Kinds marked * have labels
drawn from the model itself by default, so that squares of δ are the Fisher information; the unit of
all of them but the last two is nats per token, which add up over layers.

    kfac *             ½ · Σ_t δ_t² / T · Δ H Δᵀ       H = E[x xᵀ]; Kronecker-factored: 1503.05671
    fisher-token *     ½ · Σ_t (δ_t (x_t·Δ))² / T
    fisher-sequence *  ½ · Σ_d A_d² / T
    zeroth-order       kfac with Σ_t δ_t² from changes of the output, no gradient: 2503.14868
    paper              mean_d |u + ½u²|, u = A_d / T_d  MixLLM eq. 4: 2412.14590
    hessian            Δ H Δᵀ                          the error of the layer's output
    weight-error       ‖Δ‖²                            no data: the announced fallback
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError, nearest
from ..formats.row_format import RowFormat
from ..quantizers.rtn import rounding_error

CURVATURE_KINDS = ("kfac", "fisher-token", "fisher-sequence")
GRADIENT_KINDS = (*CURVATURE_KINDS, "paper")
FORWARD_KINDS = ("hessian", "zeroth-order")
FACTORED_KINDS = ("kfac", "zeroth-order", "hessian")
KINDS = (*GRADIENT_KINDS, "zeroth-order", "hessian", "weight-error")
LABELS = ("sampled", "text")
DEFAULT_KIND = "kfac"
MIN_TOKENS = 16  # with fewer, most rows of a layer have hardly seen a gradient
BUDGET = 2 << 30


@dataclass(frozen=True)
class ScoreSpec:
    """What to score and how.

    Attributes:
        kind: one of `KINDS`.
        formats: candidate formats, F of them.
        labels: "sampled" from the model, "text" (the next token), or "" for the kind's default.
        seed: of labels and of random directions.
        clip: Δ of clipped ranges, as weights quantized with a clip search have it.
        budget: bytes of activations and statistics to hold at a time; a graph that needs more is
            cut between blocks and its forward run twice. None: never cut.

    Raises:
        OptionError: an unknown kind or label.
    """

    kind: str
    formats: tuple[RowFormat, ...]
    labels: str = ""
    seed: int = 0
    clip: bool = False
    budget: int | None = BUDGET

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise OptionError(f"unknown score kind {self.kind!r}.{nearest(self.kind, KINDS)}")
        labels = self.labels or ("sampled" if self.kind != "paper" else "text")
        if labels not in LABELS:
            raise OptionError(f"unknown labels {labels!r}.{nearest(labels, LABELS)}")
        object.__setattr__(self, "labels", labels)


def weight_error(weight: Tensor, formats: Sequence[RowFormat]) -> Tensor:
    """fp32 [N, F]: ‖Δ‖² of every row, the score that needs no data."""
    w = weight.float()
    return torch.stack([rounding_error(w, f, None, False).square().sum(1) for f in formats], 1)
