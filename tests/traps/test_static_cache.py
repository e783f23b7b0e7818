"""Dynamo's graph is not functional: in-place writes have no users and must survive our passes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixllm_compiler.passes.registry import register_pass, unregister_pass
from mixllm_compiler.runtime import records
from tests.helpers import (
    HIDDEN,
    W4,
    activations,
    assert_quantized,
    compiled,
    oracle,
    oracle_linear,
    tiny_llama,
    token_ids,
)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture(params=["canonicalize-linears", "rewrite-linears", "pack-weights"])
def eliminating_pass(request):
    """A user's pass that ends as most passes do."""

    @register_pass(after=request.param)
    def eliminate(gm):
        gm.graph.eliminate_dead_code()

    yield
    unregister_pass("eliminate")


class Caching(nn.Module):
    """Writes its keys into a cache that nothing of its result depends on."""

    def __init__(self):
        super().__init__()
        self.k, self.q = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x, cache, at):
        cache.index_copy_(0, at, self.k(x))
        _unused = self.q(x) * 2
        return self.q(x)


def test_a_write_to_a_cache_survives_dead_code_elimination(eliminating_pass):
    model, x = Caching().eval(), activations(2)
    cache = torch.zeros(4, HIDDEN)
    with records.collect() as graphs:
        y = compiled(model)(x, cache, torch.tensor([2, 0]))
    assert_quantized(y, model.q(x), oracle_linear(x, model.q.weight, model.q.bias))
    assert_quantized(cache[[2, 0]], model.k(x), oracle_linear(x, model.k.weight, model.k.bias))
    assert not cache[[1, 3]].any()
    assert len(graphs[0].quantized) == 2


def test_what_really_is_dead_goes(eliminating_pass):
    def last(graph):
        return [line for line in graph.code.splitlines() if " mul(" in line]

    model, x = Caching().eval(), activations(2)
    with records.collect() as graphs:
        compiled(model)(x, torch.zeros(4, HIDDEN), torch.tensor([2, 0]))
    assert not last(graphs[0])


def test_without_such_a_pass_nothing_is_eliminated():
    model, x = Caching().eval(), activations(2)
    with records.collect() as graphs:
        compiled(model)(x, torch.zeros(4, HIDDEN), torch.tensor([2, 0]))
    assert " mul(" in graphs[0].code


@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_generation_survives_dead_code_elimination(implementation):
    """The static cache's index_copy_ feeds no output; without it the tokens are wrong."""
    model, ids = tiny_llama(1), token_ids(1, 5)
    settings = {
        "max_new_tokens": 6,
        "do_sample": False,
        "attention_mask": torch.ones_like(ids),
        "cache_implementation": implementation,
    }
    expected = oracle(model).generate(ids, **settings)

    @register_pass(after="pack-weights")
    def eliminate(gm):
        gm.graph.eliminate_dead_code()

    try:
        model.compile(backend="mixllm", options=W4)
        with records.collect() as graphs:
            tokens = model.generate(ids, **settings)
    finally:
        unregister_pass("eliminate")
    assert {len(g.quantized) for g in graphs} == {7}
    if implementation == "static":
        assert all("index_copy_" in g.code for g in graphs)
    assert torch.equal(tokens, expected)
