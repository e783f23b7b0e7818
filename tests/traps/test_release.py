"""`release=True`: the float weights are freed, and reading one would crash the process."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import nn

import mixllm_compiler
from mixllm_compiler.errors import WeightError
from mixllm_compiler.runtime import records
from mixllm_compiler.runtime.weights import CACHE
from tests.helpers import (
    HIDDEN,
    VOCABULARY,
    activations,
    assert_quantized,
    compiled,
    mlp,
    oracle,
    refusal,
    tiny_llama,
    token_ids,
)

X = activations(3)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def is_freed(weight):
    return weight.untyped_storage().size() == 0


def test_the_result_is_the_same_and_the_storage_is_gone():
    model, kept = mlp(), mlp()
    exact, expected = kept(X), oracle(kept)(X)
    run = compiled(model, release=True)
    y = run(X)
    assert_quantized(y, exact, expected)
    assert torch.equal(y, compiled(kept)(X))
    assert is_freed(model[0].weight) and is_freed(model[2].weight)
    assert not is_freed(model[0].bias)
    assert model[0].weight.shape == (192, HIDDEN)


def test_new_batch_sizes_and_a_reset_use_the_packed_weights():
    model, kept = mlp(), mlp()
    run = compiled(model, release=True)
    run(X)
    before = CACHE.packs
    for batch in (5, 9):
        x = activations(batch)
        assert_quantized(run(x), kept(x), oracle(kept)(x))
    torch._dynamo.reset()
    assert_quantized(compiled(model, release=True)(X), kept(X), oracle(kept)(X))
    assert CACHE.packs == before


@pytest.mark.parametrize(
    "other",
    [{"widths": (8,), "bits": 9}, {"rotate": 128}, {"bits": 4.5}, {"exclude": ("0",)}],
)
def test_other_options_afterwards_are_refused_with_the_weight_named(other):
    model, kept = mlp(), mlp()
    run = compiled(model, release=True)
    y = run(X)
    error = refusal(compiled(model, **other), X)
    assert isinstance(error, WeightError)
    assert re.search(r"the float weight [02]\.weight was released", str(error))
    assert "reload the model" in str(error)
    assert torch.equal(run(X), y)  # what was compiled goes on working
    assert_quantized(run(X), kept(X), oracle(kept)(X))


def test_a_released_model_cannot_be_scored_or_fingerprinted():
    model = tiny_llama(1)
    plan = mixllm_compiler.plan(
        mixllm_compiler.score(model, token_ids(2, 16), kind="weight-error"), bits=5
    )
    compiled(model, release=True)(token_ids())
    for call in (
        lambda: mixllm_compiler.score(model, token_ids(2, 16), kind="weight-error"),
        lambda: mixllm_compiler.score(model, token_ids(2, 16)),
        lambda: mixllm_compiler.score(model),
        lambda: mixllm_compiler.quantize(model, plan),
        lambda: compiled(model, plan=plan)(token_ids()),
    ):
        error = refusal(call)
        assert isinstance(error, WeightError)
        assert "was released" in str(error)


def test_new_weights_bring_a_released_model_back():
    model, other = mlp(0), mlp(3)
    run = compiled(model, release=True)
    run(X)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert_quantized(run(X), other(X), oracle(other)(X))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.lin = nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.lin(self.embed(ids)))


def test_a_table_that_is_still_read_is_not_freed():
    model, ids = Tied().eval(), token_ids()
    kept = compiled(model, lm_head=True)(ids)
    y = compiled(model, lm_head=True, release=True)(ids)
    assert torch.equal(y, kept)
    assert is_freed(model.lin.weight)
    assert not is_freed(model.embed.weight)


def test_generation_after_release_makes_the_same_tokens():
    ids = token_ids(1, 5)
    settings = {"do_sample": False, "attention_mask": torch.ones_like(ids), "max_new_tokens": 6}
    tokens = []
    for release in (False, True):
        model = tiny_llama(1)
        mixllm_compiler.compile(
            model, bits=4.5, data=token_ids(2, 16), release=release, lower="eager", quiet=True
        )
        with records.collect() as graphs:
            tokens.append(model.generate(ids, **settings))
        assert {len(g.quantized) for g in graphs} == {7}
    assert torch.equal(*tokens)
    assert is_freed(model.model.layers[0].mlp.up_proj.weight)
