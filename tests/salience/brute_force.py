"""Scores from the weight gradients that autograd gives for one sequence at a time, in float64.

The profiler never forms a weight's gradient; here nothing else is used.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mixllm_compiler.formats.row_format import RowFormat
from mixllm_compiler.quantizers.rtn import quantize_rows
from tests.helpers import PLAIN

FORMATS = (RowFormat(4), RowFormat(8))
OPTIONS = {"widths": (4, 8), **PLAIN}
"""Under which a model is scored in these formats."""

SummedLoss = Callable[[Any, int], Tensor]
"""(the model in float64, number of the sequence) → summed loss of its tokens."""


def next_token(ids: Tensor, mask: Tensor | None = None) -> SummedLoss:
    """Cross-entropy of every real token after the first."""

    def loss(model: Any, d: int) -> Tensor:
        extra = {} if mask is None else {"attention_mask": mask[d : d + 1]}
        logits = model(ids[d : d + 1], use_cache=False, **extra).logits[0, :-1]
        each = -logits.log_softmax(-1).gather(-1, ids[d, 1:, None]).squeeze(-1)
        return (each if mask is None else each * mask[d, 1:]).sum()

    return loss


def first_order_changes(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    loss: SummedLoss,
    sequences: int,
    formats: Sequence[RowFormat] = FORMATS,
    transposed: bool = False,
) -> dict[str, Tensor]:
    """A [D, N, F] per matrix: Σ_k ∂L_d/∂W[n, k] · Δ_f[n, k].

    Args:
        weights: name of the matrix → its parameter in `model`.
        transposed: the parameters are [K, N] (Conv1D).
    """
    twin = copy.deepcopy(model).double()
    places = {id(p): name for name, p in model.named_parameters()}
    parameters = dict(twin.named_parameters())
    mine = {name: parameters[places[id(w)]].requires_grad_() for name, w in weights.items()}
    deltas = {}
    for name, w in weights.items():
        exact = (w.t() if transposed else w).detach().float()
        stored = [quantize_rows(exact, f).dequantize(torch.float64) for f in formats]
        deltas[name] = torch.stack([s - exact.double() for s in stored], -1)
    found: dict[str, list[Tensor]] = {name: [] for name in weights}
    for d in range(sequences):
        gradients = torch.autograd.grad(loss(twin, d), list(mine.values()))
        for name, gradient in zip(mine, gradients, strict=True):
            g = gradient.t() if transposed else gradient
            found[name].append((g.unsqueeze(-1) * deltas[name]).sum(1))
    return {name: torch.stack(parts) for name, parts in found.items()}


def scores(changes: Mapping[str, Tensor], kind: str, tokens: int) -> dict[str, Tensor]:
    """[N, F] per matrix by the formulas, from A [D, N, F] and the tokens of one sequence."""
    if kind == "fisher-sequence":
        return {name: 0.5 * a.square().mean(0) / tokens for name, a in changes.items()}
    assert kind == "paper"
    return {
        name: (a / tokens + 0.5 * (a / tokens).square()).abs().mean(0)
        for name, a in changes.items()
    }


def assert_scores(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], relative: float = 1e-4
) -> None:
    """Equal up to `relative` of the largest score of each matrix and format."""
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        error = (found[name].double() - wanted).abs().amax(0)
        largest = wanted.abs().amax(0)
        assert (largest > 0).all(), name
        assert (error <= relative * largest).all(), (name, (error / largest).tolist())
