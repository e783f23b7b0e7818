"""Curvature from noise on outputs against curvature from gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mixllm_compiler
from mixllm_compiler.errors import UnsupportedModel
from mixllm_compiler.salience.forward_only import divergence
from mixllm_compiler.salience.supervision import Supervision
from tests.helpers import token_ids
from tests.models.support import build

IDS = token_ids(8, 64)


def ranks(x: torch.Tensor) -> torch.Tensor:
    return x.argsort().argsort().double()


def test_scores_without_gradients_rank_like_kfac():
    model = build("llama")
    exact, found = (mixllm_compiler.score(model, IDS, kind=k) for k in ("kfac", "zeroth-order"))
    assert found.kind == "zeroth-order" and "labels" not in found.settings
    assert (found.tokens, found.sequences) == (8 * 63, 8)
    a, b = (torch.cat([s.loss[name][:, 0] for name in exact.loss]) for s in (exact, found))
    assert torch.corrcoef(torch.stack((ranks(a), ranks(b))))[0, 1] > 0.8
    for name in exact.curvature:
        ratio = float(found.curvature[name].sum() / exact.curvature[name].sum())
        assert 0.5 < ratio < 2, (name, ratio)


def test_the_seed_decides_the_noise():
    model = build("llama")
    first, same, other = (
        mixllm_compiler.score(model, IDS[:2], kind="zeroth-order", seed=s) for s in (0, 0, 1)
    )
    assert first.diff(same) == "" and first.diff(other) != ""


def test_a_model_without_logits_is_refused():
    with pytest.raises(UnsupportedModel, match="returns no logits; use kind='hessian'"):
        mixllm_compiler.score(build("llama").model, IDS, kind="zeroth-order")


def test_a_partly_quantized_model_can_be_scored_without_gradients():
    model = build("llama")
    scores = mixllm_compiler.score(model, IDS[:2], kind="weight-error")
    plan = mixllm_compiler.plan(scores, bits=5, exclude=("*.1.mlp.*",))
    mixllm_compiler.quantize(model, plan)
    found = mixllm_compiler.score(model, IDS[:2], kind="zeroth-order")
    assert len(found.loss) == 3
    assert all((loss[:, 0] > 0).all() for loss in found.loss.values())


def test_divergence_is_torchs():
    a, b = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    a[..., 3] = b[..., 3] = -torch.inf  # a padded vocabulary
    weights = torch.rand(2, 5)
    kept = [0, 1, 2, 4, 5, 6]
    p, q = a[..., kept].log_softmax(-1), b[..., kept].log_softmax(-1)
    each = nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    found = divergence(a, b, Supervision(weights, None, None, ""))
    assert found == pytest.approx(float((each * weights).sum()), rel=1e-4)
