"""Text, weights of tokens and models that cannot be scored, and rows that text does not reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mixllm_compiler
from mixllm_compiler.errors import OptionError, UnsupportedModel
from mixllm_compiler.salience.kinds import MIN_TOKENS
from tests.helpers import VOCABULARY, token_ids
from tests.models.support import build
from tests.salience.test_replay import model_of

IDS = token_ids(4, 24)


def test_too_few_tokens_are_refused():
    with pytest.raises(OptionError, match=f"7 tokens have a loss .* fewer than the {MIN_TOKENS}"):
        mixllm_compiler.score(model_of("llama"), token_ids(1, 8))
    weights = torch.zeros(IDS.shape)
    weights[0, 1:6] = 1
    with pytest.raises(OptionError, match="5 tokens have a loss"):
        mixllm_compiler.score(model_of("llama"), IDS, token_weights=weights)


@pytest.mark.parametrize(
    "weights, message",
    [
        (torch.ones(4, 23), r"token_weights are \[4, 23\], the token ids \[4, 24\]"),
        (-torch.ones(4, 24), "finite numbers from 0 on"),
        (torch.full((4, 24), torch.nan), "finite numbers from 0 on"),
    ],
)
def test_token_weights_that_do_not_fit_are_refused(weights, message):
    with pytest.raises(OptionError, match=message):
        mixllm_compiler.score(model_of("llama"), IDS, token_weights=weights)


@pytest.mark.parametrize(
    "given, message",
    [({"kind": "fischer"}, "unknown score kind 'fischer'"), ({"labels": "real"}, "unknown labels")],
)
def test_unknown_kinds_and_labels_are_refused(given, message):
    with pytest.raises(OptionError, match=message):
        mixllm_compiler.score(model_of("llama"), IDS, **given)


def test_float16_is_refused_with_advice():
    model = build("llama", dtype=torch.float16)
    with pytest.raises(UnsupportedModel, match=r"in float16 .*; score .* in bfloat16 or float32"):
        mixllm_compiler.score(model, IDS)


class Cliff(nn.Module):
    """Finite logits whose gradient is not: √ at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 128)
        self.inner, self.head = nn.Linear(128, 128), nn.Linear(128, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        y = self.inner(self.table(ids))
        return self.head(torch.sqrt((y * 0).abs()) + y)


def test_a_gradient_that_is_not_finite_names_the_matrix():
    with pytest.raises(UnsupportedModel, match="the gradient at inner holds NaN or infinite"):
        mixllm_compiler.score(Cliff().eval(), IDS)


class Dead(Cliff):
    """The first 64 features of `inner` lead nowhere."""

    def forward(self, ids: Tensor) -> Tensor:
        y = self.inner(self.table(ids))
        return self.head(torch.cat((0 * y[..., :64], y[..., 64:]), -1))


def test_rows_that_no_gradient_reaches_are_listed(tmp_path):
    found = mixllm_compiler.score(Dead().eval(), IDS)
    assert found.unreached == {"inner": 64}
    assert "no gradient reached inner (64 rows)" in found.summary()
    found.save(tmp_path / "scores")
    again = mixllm_compiler.Scores.load(tmp_path / "scores")
    assert again.unreached == found.unreached
    assert all(torch.equal(again.curvature[n], found.curvature[n]) for n in found.curvature)


def test_siblings_read_the_same_value():
    found = mixllm_compiler.score(model_of("llama"), IDS, rotate=128)
    layer = "model.layers.0."
    groups = {n.removeprefix(layer): g for n, g in found.siblings.items() if n.startswith(layer)}
    attention, mlp = layer + "self_attn.q_proj", layer + "mlp.gate_proj"
    assert groups == {
        "self_attn.q_proj": attention,
        "self_attn.k_proj": attention,
        "self_attn.v_proj": attention,
        "self_attn.o_proj": layer + "self_attn.o_proj",
        "mlp.gate_proj": mlp,
        "mlp.up_proj": mlp,
        "mlp.down_proj": layer + "mlp.down_proj",
    }


class TwoDomains(nn.Module):
    """Tokens of each half of the vocabulary go through a linear of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 128)
        self.low, self.high = nn.Linear(128, 128), nn.Linear(128, 128)
        self.head = nn.Linear(128, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        own = (ids < VOCABULARY // 2).unsqueeze(-1)
        return self.head(torch.tanh(torch.where(own, self.low(x), self.high(x))))


def bits(scores: Any) -> dict[str, float]:
    plan = mixllm_compiler.plan(scores, bits=5.4)
    return {name: site.widths.float().mean().item() for name, site in plan.sites.items()}


def test_the_domain_whose_tokens_weigh_more_gets_more_bits():
    """Balance of two kinds of text, or of prompt and answer: MBQ, arXiv 2412.19509."""
    model = TwoDomains().eval()
    ids = token_ids(8, 64)
    # The loss at position t predicts token t + 1: its weight says what kind of token t is.
    low = torch.zeros(ids.shape)
    low[:, 1:] = (ids[:, :-1] < VOCABULARY // 2).float()
    plans = {}
    for name, weights in (("low", low + 0.02), ("high", 1.02 - low)):
        scores = mixllm_compiler.score(
            model, ids, token_weights=weights, widths=(3, 4, 8), exclude=("head",)
        )
        plans[name] = bits(scores)
    assert plans["low"]["low"] > plans["low"]["high"]
    assert plans["high"]["high"] > plans["high"]["low"]
