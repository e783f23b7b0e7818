"""Every spelling of a linear becomes one, and not a bit of the result changes."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mixllm_compiler.options import Options
from mixllm_compiler.passes.canonicalize_linears import LINEAR, CanonicalizeLinears
from mixllm_compiler.passes.context import Context
from tests.helpers import (
    HIDDEN,
    activations,
    assert_quantized,
    captured,
    causal_lm,
    compiled,
    oracle_linear,
    outputs,
    passed,
    token_ids,
)

N = 192
X = activations(2, 5)


class Spelled(nn.Module):
    """A model of one linear, its weight stored [N, K] (`nk`) or [K, N] (`kn`)."""

    def __init__(self, spelling):
        super().__init__()
        torch.manual_seed(0)
        self.nk = nn.Parameter(torch.randn(N, HIDDEN) / 9)
        self.kn = nn.Parameter(torch.randn(HIDDEN, N) / 9)
        self.bias = nn.Parameter(torch.randn(N))
        self.spelling = spelling
        self.eval()

    def forward(self, x):
        return self.spelling(self, x)


def flat(x):
    return x.reshape(-1, x.shape[-1])


STORED_NK = {
    "F.linear": lambda m, x: F.linear(x, m.nk),
    "F.linear, bias": lambda m, x: F.linear(x, m.nk, m.bias),
    "F.linear, keywords": lambda m, x: F.linear(weight=m.nk, bias=m.bias, input=x),
    "F.linear, bias=None": lambda m, x: F.linear(x, m.nk, bias=None),
    "aten.linear": lambda m, x: torch.ops.aten.linear.default(x, m.nk, m.bias),
    "x @ w.t()": lambda m, x: x @ m.nk.t(),
    "x @ w.T": lambda m, x: x @ m.nk.T,
    "x @ w.mT": lambda m, x: x @ m.nk.mT,
    "matmul(x, w.transpose)": lambda m, x: torch.matmul(x, m.nk.transpose(0, 1)),
    "matmul(x, transpose(w))": lambda m, x: torch.matmul(x, torch.transpose(m.nk, -1, -2)),
    "x @ w.permute": lambda m, x: x @ m.nk.permute(1, 0),
    "addmm(b, x, w.t())": lambda m, x: torch.addmm(m.bias, flat(x), m.nk.t()),
    "w.t().t()": lambda m, x: F.linear(x, m.nk.t().t(), m.bias),
}
STORED_KN = {
    "addmm": lambda m, x: torch.addmm(m.bias, flat(x), m.kn),
    "addmm, keywords": lambda m, x: torch.addmm(mat2=m.kn, input=m.bias, mat1=flat(x)),
    "addmm, alpha = beta = 1": lambda m, x: torch.addmm(m.bias, flat(x), m.kn, beta=1, alpha=1),
    "mm": lambda m, x: torch.mm(flat(x), m.kn),
    "x.mm": lambda m, x: flat(x).mm(m.kn),
    "matmul": lambda m, x: torch.matmul(x, m.kn),
    "x.matmul": lambda m, x: x.matmul(m.kn),
    "x @ w": lambda m, x: x @ m.kn,
    "F.linear(x, w.t())": lambda m, x: F.linear(x, m.kn.t(), m.bias),
}
SPELLINGS = {**STORED_NK, **STORED_KN}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_result_stays_bit_equal(name):
    graph = captured(Spelled(SPELLINGS[name]), X)
    before = outputs(graph)
    passed(graph, "canonicalize-linears")
    (linear,) = graph.calls(LINEAR)
    assert len(linear.args) == 3 and not linear.kwargs
    assert torch.equal(outputs(graph), before)


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_matrix_is_seen_as_rows_of_output_features(name):
    model = Spelled(SPELLINGS[name])
    graph = captured(model, X)
    passed(graph, "annotate-linears")
    (matrix,) = graph.matrices.values()
    assert (matrix.n, matrix.k, matrix.kept_float) == (N, HIDDEN, "")
    assert torch.equal(matrix.stored(), model.nk if name in STORED_NK else model.kn.t())


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_is_quantized(name):
    model = Spelled(SPELLINGS[name])
    weight = model.nk if name in STORED_NK else model.kn.t()
    with torch.no_grad():
        y, exact = compiled(model)(X), model(X)
        biased = not torch.equal(exact.reshape(-1, N), flat(X) @ weight.t())
        expected = oracle_linear(X, weight, model.bias if biased else None)
        assert_quantized(y.reshape(expected.shape), exact.reshape(expected.shape), expected)


def test_square_weights_are_not_taken_for_their_transpose():
    """Shapes cannot tell [N, K] from [K, N] here; the way the graph reads the weight can."""

    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(HIDDEN, HIDDEN) / 9)

        def forward(self, x):
            return (x @ self.w).relu() @ self.w.t()

    model = Square().eval()
    with torch.no_grad():
        hidden = oracle_linear(X, model.w.t()).relu()
        assert_quantized(compiled(model)(X), model(X), oracle_linear(hidden, model.w))


UNTOUCHED = {
    "two activations": lambda m, x: flat(x) @ flat(x).t(),
    "the constant on the left": lambda m, x: m.nk @ flat(x).t(),
    "two constants": lambda m, x: x.sum() * (m.nk @ m.kn),
    "alpha": lambda m, x: torch.addmm(m.bias, flat(x), m.kn, alpha=2),
    "beta": lambda m, x: torch.addmm(m.bias, flat(x), m.kn, beta=0.5),
    "a matrix added": lambda m, x: torch.addmm(flat(x)[:, :1], flat(x), m.kn),
    "a computed weight": lambda m, x: F.linear(x, m.nk * 2),
    "a vector": lambda m, x: x @ m.kn[:, 0],
    "a slice": lambda m, x: F.linear(x, m.nk[:64]),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_is_no_linear_of_a_constant_matrix_stays(name):
    graph = captured(Spelled(UNTOUCHED[name]), X)
    before = outputs(graph)
    text = str(graph.graph)
    passed(graph, "canonicalize-linears")
    assert str(graph.graph) == text
    assert torch.equal(outputs(graph), before)
    passed(graph, "annotate-linears", partial=True)
    assert not graph.matrices


def test_what_a_linear_was_is_reported():
    graph = captured(Spelled(lambda m, x: x @ m.kn), X)
    changes = CanonicalizeLinears()(graph, Context(Options()))
    assert changes.lines == [("matmul", "matmul → linear")]


def test_conv1d_keeps_its_place_in_the_source():
    """What a node was traced from goes with it: module, stack trace, example value."""
    graph = captured(causal_lm("gpt2", layers=1), token_ids(1, 5), use_cache=False)
    before = {n.name: n for n in graph.calls(torch.addmm)}
    metas = [n.meta["nn_module_stack"] for n in before.values()]
    exact = outputs(graph)
    passed(graph, "canonicalize-linears")
    linears = [n for n in graph.calls(LINEAR) if n.meta["nn_module_stack"] in metas]
    assert len(linears) == len(before) == 4
    assert all("example_value" in n.meta and n.stack_trace for n in linears)
    assert torch.equal(outputs(graph), exact)


def test_operator_matmul_has_the_spelling_dynamo_writes():
    """If Dynamo wrote `@` in another way, the tests above would test nothing."""
    graph = captured(Spelled(lambda m, x: x @ m.kn), X)
    assert graph.calls(operator.matmul, torch.matmul)
