"""Gradients, inference mode, autocast and `mode=`: what the caller's state does to a graph."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mixllm_compiler
from mixllm_compiler import backend
from mixllm_compiler.errors import GradModeError, UnsupportedModel
from mixllm_compiler.runtime import records
from mixllm_compiler.runtime.weights import CACHE
from tests.helpers import (
    HIDDEN,
    activations,
    assert_quantized,
    compiled,
    mlp,
    oracle,
    oracle_linear,
    refusal,
)

X = activations(3)


def assert_right(run, model, x=X):
    with torch.no_grad():
        exact, expected = model(x), oracle(model)(x)
    assert_quantized(run(x), exact, expected)


# -- gradients -----------------------------------------------------------------------------------


def test_with_gradients_on_the_model_runs_without_them():
    model = mlp()
    run = compiled(model)
    assert torch.is_grad_enabled()
    assert_right(run, model)
    assert not run(X).requires_grad
    assert torch.is_grad_enabled()


def test_running_without_gradients_is_announced_once(monkeypatch, capsys):
    monkeypatch.setattr(backend, "_announced", set())
    compiled(mlp(0))(X)
    compiled(mlp(1))(X)
    with torch.no_grad():
        compiled(mlp(2))(X)
    assert capsys.readouterr().err.count("runs under no_grad") == 1


def test_frozen_weights_change_nothing():
    model = mlp().requires_grad_(False)
    assert_right(compiled(model), model)


class Switches(nn.Module):
    """Turns gradients off and on again in its forward."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        with torch.no_grad():
            x = self.a(x)
        return self.b(x)


@pytest.mark.parametrize("grad", [False, True])
def test_a_model_that_switches_gradients_itself(grad):
    model = Switches().eval()
    run = compiled(model)
    with torch.set_grad_enabled(grad):
        assert_right(run, model)
        assert not run(X).requires_grad
        assert torch.is_grad_enabled() == grad


def test_an_input_that_requires_a_gradient_is_refused():
    model = mlp()
    run = compiled(model)
    x = X.clone().requires_grad_()
    error = refusal(run, x)
    assert isinstance(error, GradModeError)
    assert "torch.no_grad()" in str(error)
    with torch.no_grad():
        assert_right(run, model, x)  # and the refusal was not cached
    model(x).sum().backward()
    assert x.grad is not None


def test_training_mode_is_refused():
    model = mlp().train()
    run = compiled(model)
    error = refusal(run, X)
    assert isinstance(error, UnsupportedModel)
    assert "model.eval()" in str(error)
    model.eval()
    assert_right(run, model)


# -- inference mode ------------------------------------------------------------------------------


def test_inference_mode_and_no_grad_share_packed_weights():
    model, before = mlp(), CACHE.packs
    run = compiled(model)
    seen = []
    with records.collect() as graphs:
        for context in (torch.no_grad, torch.inference_mode, torch.no_grad):
            with context():
                assert_right(run, model)
                seen.append(len(graphs))
    assert seen == [1, 2, 2]
    assert CACHE.packs - before == 2


def test_weights_made_in_inference_mode():
    """Inference tensors have no version counter; reading it would raise."""
    with torch.inference_mode():
        model = mlp()
        run = compiled(model)
        assert_right(run, model)
    with torch.no_grad():
        assert_right(run, model)


def test_a_replaced_inference_weight_is_quantized_again():
    with torch.inference_mode():
        model = mlp()
        run = compiled(model)
        run(X)
        model[0].weight = nn.Parameter(torch.randn(192, HIDDEN), requires_grad=False)
        assert_right(run, model)


def test_an_inference_weight_written_in_place_needs_invalidate():
    with torch.inference_mode():
        model = mlp()
        run = compiled(model)
        run(X)
        model[0].weight.mul_(2)
        mixllm_compiler.invalidate(model)
        assert_right(run, model)


def test_weights_made_in_inference_mode_can_be_scored():
    with torch.inference_mode():
        model = mlp()
        x = activations(2, 600)
        run = compiled(model, widths=(4, 8), bits=5)
        with records.collect() as graphs:
            y = run(x)
        assert not torch.equal(y, model(x))
    (graph,) = graphs
    assert graph.score == "fisher-sequence"
    assert {b for line in graph.quantized for b in line.rows} == {4, 8}


# -- autocast ------------------------------------------------------------------------------------


def in_bf16(model, x=X):
    """The quantized result where every linear returns bf16 and reads what it is given."""
    h = oracle_linear(x, model[0].weight, model[0].bias, dtype=torch.bfloat16)
    return oracle_linear(h.relu(), model[2].weight, model[2].bias, dtype=torch.bfloat16)


def test_autocast_around_the_call():
    model = mlp()
    run = compiled(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, exact = run(X), model(X)
    assert y.dtype == exact.dtype == torch.bfloat16
    with torch.no_grad():
        assert_quantized(y, exact, in_bf16(model))
        assert_right(run, model)
        assert run(X).dtype == torch.float32


class Autocasts(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(x)


def test_autocast_inside_the_model():
    model = Autocasts(mlp()).eval()
    with torch.no_grad():
        y, exact = compiled(model)(X), model(X)
        assert y.dtype == exact.dtype == torch.bfloat16
        assert_quantized(y, exact, in_bf16(model.inner))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_models_in_half_precision(dtype):
    model, x = mlp().to(dtype), X.to(dtype)
    run = compiled(model)
    assert run(x).dtype == dtype
    assert_right(run, model, x)


# -- torch.compile's mode ------------------------------------------------------------------------


@pytest.mark.slow
def test_mode_reduce_overhead_is_accepted():
    """transformers sends it to any backend; its settings reach Inductor."""
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN)).eval()
    seen = {}
    original = backend.compat.compile_with_inductor

    def watch(gm, inputs, patches):
        seen.update(patches)
        return original(gm, inputs, patches)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(backend.compat, "compile_with_inductor", watch)
        run = torch.compile(model, backend="mixllm", mode="reduce-overhead")
        y = run(X)
    assert seen["triton.cudagraphs"] is True
    assert not torch.equal(y, model(X))
    widths = {line.name: line.rows for line in records.recent()[-1].quantized}
    assert list(widths) == ["0"]


def test_the_default_mode_sends_nothing(monkeypatch):
    monkeypatch.setattr(
        backend.compat, "compile_with_inductor", lambda gm, inputs, patches: gm.forward
    )
    model = mlp()
    run = torch.compile(model, backend="mixllm", mode="default")
    with torch.no_grad():
        assert not torch.equal(run(X), model(X))
