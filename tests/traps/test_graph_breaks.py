"""A graph break: an error without a plan, harmless with one, allowed on request."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mixllm_compiler
from mixllm_compiler.allocation.plan import Plan, SitePlan
from mixllm_compiler.errors import GraphBreakError, PlanMismatch
from mixllm_compiler.formats.fingerprint import fingerprint
from mixllm_compiler.runtime import records
from mixllm_compiler.runtime.weights import CACHE
from tests.helpers import (
    HIDDEN,
    VOCABULARY,
    W4,
    activations,
    assert_quantized,
    compiled,
    oracle,
    refusal,
    tiny_llama,
    token_ids,
)

X = activations(3)


class Breaks(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


class Whole(Breaks):
    def forward(self, x):
        return self.second(self.first(x))


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def plan_of(model, widths):
    """A plan with these bits for all rows of these modules."""
    weights = {name: model.get_submodule(name).weight for name in widths}
    sites = {
        name: SitePlan(*w.shape, torch.full((len(w),), widths[name], dtype=torch.uint8))
        for name, w in weights.items()
    }
    return Plan(fingerprint(weights), sites)


# -- first case: nothing planned -----------------------------------------------------------------


def test_an_unplanned_model_is_refused_and_told_where_it_breaks():
    model = Breaks().eval()
    error = refusal(compiled(model), X)
    assert isinstance(error, GraphBreakError)
    message = str(error)
    assert "1 linears were planned in an earlier piece" in message
    assert "first second" in message
    assert "test_graph_breaks.py" in message and "in forward" in message
    assert "mixllm_compiler.compile(model, bits=…)" in message
    assert "partial" in message


def test_a_refused_model_still_runs_in_float():
    model = Breaks().eval()
    exact = model(X)
    run = compiled(model)
    refusal(run, X)
    assert torch.equal(model(X), exact)
    assert isinstance(refusal(run, X), GraphBreakError)  # asking again says the same


def test_a_break_after_the_last_linear_is_harmless():
    class Prints(Whole):
        def forward(self, x):
            x = super().forward(x)
            torch._dynamo.graph_break()
            return x.relu()

    model = Prints().eval()
    assert_quantized(compiled(model)(X), model(X), oracle(model)(X))


def test_fullgraph_names_the_break_itself():
    model = Breaks().eval()
    run = torch.compile(model, backend="mixllm", fullgraph=True)
    error = refusal(run, X)
    assert isinstance(error, torch._dynamo.exc.Unsupported)


def test_the_same_class_without_a_break_is_not_refused_afterwards():
    refusal(compiled(Breaks().eval()), X)
    model = Whole().eval()
    assert_quantized(compiled(model)(X), model(X), oracle(model)(X))


# -- second case: with a plan --------------------------------------------------------------------


def test_with_a_plan_a_break_is_harmless():
    model = Breaks().eval()
    widths = {"first": 3, "second": 8}
    run = compiled(model, plan=plan_of(model, widths))
    with records.collect() as graphs:
        assert_quantized(run(X), model(X), oracle(model, widths)(X))
    assert [[line.rows for line in g.quantized] for g in graphs] == [[{3: 128}], [{8: 128}]]


def test_a_plan_of_one_piece_does_not_fit_the_other():
    model = Breaks().eval()
    error = refusal(compiled(model, plan=plan_of(model, {"first": 4})), X)
    assert isinstance(error, PlanMismatch)
    assert "second is not in the plan" in str(error)


class Remarks(nn.Module):
    """A language model that says something in its forward, which Dynamo cannot trace."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.body = Breaks()
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids):
        return self.lm_head(self.body(self.embed(ids)))


def test_a_model_that_breaks_cannot_be_scored_whole():
    error = refusal(mixllm_compiler.score, Remarks().eval(), token_ids(2, 32))
    assert isinstance(error, GraphBreakError)
    assert "Remarks does not capture in one graph" in str(error)
    assert "graph_break" in str(error)


# -- third case: a plan per piece, on request ----------------------------------------------------


def test_partial_gives_every_piece_its_own_plan():
    model = Breaks().eval()
    run = compiled(model, partial=True, widths=(4, 8), bits=5, tile=1)
    before = CACHE.packs
    with records.collect() as graphs:
        y = run(X)
    widths = {}
    for name in ("first", "second"):
        weight = model.get_submodule(name).weight
        (widths[name],) = (
            rows for w, rows in all_planned() if w is weight and set(rows.tolist()) == {4, 8}
        )
    assert_quantized(y, model(X), oracle(model, widths)(X))
    assert CACHE.packs - before == 2
    for graph in graphs:
        (line,) = graph.quantized
        assert 4.9 < line.true_bits <= 5


def all_planned():
    from mixllm_compiler.runtime.weights import PLANS

    for plans in PLANS._plans.values():
        for planned in plans:
            for name, (rows, _) in planned.rows.items():
                yield planned.weights[name][0](), rows


def test_partial_pieces_are_packed_once_over_batch_sizes():
    model = Breaks().eval()
    run = compiled(model, partial=True)
    before = CACHE.packs
    for batch in (2, 3, 5):
        x = activations(batch)
        assert_quantized(run(x), model(x), oracle(model)(x))
    assert CACHE.packs - before == 2


# -- what looks like a break, and is none --------------------------------------------------------


def test_prefill_and_decode_are_no_pieces():
    """Two graphs of one model over the same weights, not two halves of it."""
    model = tiny_llama(1)
    model.compile(backend="mixllm", options=W4)
    ids = token_ids(1, 5)
    with records.collect() as graphs:
        model.generate(ids, max_new_tokens=4, do_sample=False, attention_mask=torch.ones_like(ids))
    assert len(graphs) >= 2
    assert {len(g.quantized) for g in graphs} == {7}


def test_two_halves_of_one_model_called_by_hand_need_a_plan_or_partial():
    model = Whole().eval()
    run = torch.compile(
        lambda x, second: model.second(x) if second else model.first(x),
        backend="mixllm",
        options=W4,
    )
    error = refusal(lambda: run(run(X, False), True))
    assert isinstance(error, GraphBreakError)
    assert "called in pieces" in str(error)
