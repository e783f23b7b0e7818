"""Ways in which Dynamo would run the float model although nobody asked for it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mixllm_compiler
from mixllm_compiler.backend import mixllm
from mixllm_compiler.errors import UnsupportedModel
from mixllm_compiler.passes.registry import register_pass, unregister_pass
from mixllm_compiler.runtime import records
from tests.helpers import (
    HIDDEN,
    VOCABULARY,
    W4,
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


# -- the recompile limit -------------------------------------------------------------------------


class TinyLM(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.lin = nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, input_ids):
        return self.lm_head(self.lin(self.embed(input_ids)))


def test_twelve_models_of_one_class_are_all_quantized():
    """Dynamo stops compiling a code object after 8 graphs, and models of a class share theirs."""
    assert torch._dynamo.config.recompile_limit < 12
    ids = token_ids()
    models = [TinyLM(seed).eval() for seed in range(12)]
    exact = [model(ids) for model in models]
    expected = [oracle(model)(ids) for model in models]
    with records.collect() as graphs:
        for model in models:
            mixllm_compiler.compile(model, bits=4.5, data=token_ids(2, 16), **W4)
        for model, float_, quantized in zip(models, exact, expected, strict=True):
            assert_quantized(model(ids), float_, quantized)
    assert len(graphs) == 12


def test_models_that_share_a_function_are_warned_about_before_the_limit(caplog):
    """Compiled one by one with torch.compile, the ninth would run in float."""
    for seed in range(6):
        assert "in float" not in caplog.text
        compiled(TinyLM(seed).eval())(token_ids())
    assert "compiled 6 graphs for one function, and after 8 it runs" in caplog.text
    assert "mixllm_compiler.compile(model, …)" in caplog.text


def test_several_transformers_models_are_all_quantized():
    """They share one decorator frame; three models with three shapes each exceed its limit."""
    for seed in range(3):
        model = tiny_llama(1, seed)
        twin = oracle(model)
        exact = {n: model(token_ids(1, n)).logits for n in (1, 5, 9)}
        mixllm_compiler.compile(model, bits=4.5, data=token_ids(2, 16), dynamic=False, **W4)
        for n, float_ in exact.items():
            ids = token_ids(1, n)
            assert_quantized(model(ids).logits, float_, twin(ids).logits)


def test_compiling_a_model_again_stacks_nothing():
    model = TinyLM(0).eval()
    ids = token_ids()
    exact, expected = model(ids), oracle(model, 8)(ids)
    for bits in (4.5, 5, 8.5):
        widths = (4,) if bits == 4.5 else (8,) if bits == 8.5 else (4, 8)
        mixllm_compiler.compile(model, bits=bits, data=token_ids(2, 16), **{**W4, "widths": widths})
    with records.collect() as graphs:
        assert_quantized(model(ids), exact, expected)
    assert len(graphs) == 1


# -- errors inside the backend -------------------------------------------------------------------

library = torch.library.Library("mixllm_traps", "DEF")
library.define("shapeless(Tensor x) -> Tensor")
library.impl("shapeless", lambda x: x + 100, "CPU")


@pytest.fixture
def user_pass():
    """Register a function as the last pass for the duration of a test."""
    names = []

    def register(function, after="pack-weights"):
        name = function.__name__.replace("_", "-")
        register_pass(after=after)(function)
        names.append(name)
        return name

    yield register
    for name in names:
        unregister_pass(name)


def test_an_op_without_a_fake_kernel_is_an_error(user_pass):
    """Dynamo turns it into a warning and runs the float model."""

    def call_something_shapeless(gm):
        (output,) = gm.graph.find_nodes(op="output")
        with gm.graph.inserting_before(output):
            op = torch.ops.mixllm_traps.shapeless.default
            new = gm.graph.call_function(op, (output.args[0][0],))
        output.args = ((new,),)

    model = mlp()
    name = user_pass(call_something_shapeless)
    run = torch.compile(model, backend="mixllm", options={**W4, "lower": "inductor"})
    error = refusal(run, X)
    assert type(error) is RuntimeError
    assert "mixllm could not compile this graph" in str(error)
    assert "shapeless" in str(error)
    unregister_pass(name)
    assert_quantized(compiled(model)(X), model(X), oracle(model)(X))


@pytest.mark.parametrize(
    "kind",
    [ValueError, IndexError, NotImplementedError, AssertionError, torch._dynamo.exc.SkipFrame],
)
def test_no_exception_of_a_pass_runs_the_float_model(user_pass, kind):
    def break_down(gm):
        raise kind("something is wrong")

    user_pass(break_down)
    error = refusal(compiled(mlp()), X)
    assert "something is wrong" in str(error)


# -- graphs that hide their linears --------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(HIDDEN, 2 * HIDDEN), nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class MarkedBlock(Block):
    forward = torch.compiler.nested_compile_region(Block.forward)


class Stack(nn.Module):
    def __init__(self, block, depth=12):
        super().__init__()
        self.layers = nn.ModuleList(block() for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("depth", [12, 1])
def test_nested_compile_regions_are_quantized_layer_by_layer(depth):
    """Twelve calls of one subgraph, whose linears are no nodes of the graph itself."""
    model = Stack(MarkedBlock, depth).eval()
    twin = Stack(Block, depth).eval()
    twin.load_state_dict(model.state_dict())
    with records.collect() as graphs:
        y = compiled(model)(X)
    assert_quantized(y, twin(X), oracle(twin)(X))
    names = [line.name for line in graphs[0].quantized]
    assert len(set(names)) == 2 * depth
    assert names[:2] == ["layers.0.up", "layers.0.down"]


def test_nested_regions_of_several_outputs_and_levels():
    class Inner(Block):
        @torch.compiler.nested_compile_region
        def forward(self, x):
            return self.up(x), self.down(self.up(x))

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Inner(), Inner()

        @torch.compiler.nested_compile_region
        def forward(self, x):
            wide, y = self.a(x)
            wider, y = self.b(y)
            return wide + wider, y

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = Outer(), Outer()

        def forward(self, x):
            wide, x = self.one(x)
            wider, x = self.two(x)
            return x + (wide * wider).mean()

    model = Model().eval()
    with records.collect() as graphs:
        y = compiled(model)(X)
    assert_quantized(y, model(X), oracle(model)(X))
    assert len(graphs[0].quantized) == 8


# -- Dynamo's own debugging aids -----------------------------------------------------------------


def test_a_copy_of_the_graph_is_called_with_every_weight():
    """What `repro_after="dynamo"` does: Dynamo's own graph keeps the inputs that ours dropped."""
    model = mlp()

    def backend(gm, inputs):
        return mixllm(copy.deepcopy(gm), inputs, options=W4)

    run = torch.compile(model, backend=backend)
    for x in (X, activations(5), activations(9)):
        assert_quantized(run(x), model(x), oracle(model)(x))
    model[0].weight.mul_(2)
    assert_quantized(run(X), model(X), oracle(model)(X))


def test_repro_after_aot():
    model = mlp()
    with torch._dynamo.config.patch(repro_after="aot"):
        assert_quantized(compiled(model)(X), model(X), oracle(model)(X))


def test_verify_correctness_sees_that_quantized_is_not_float():
    """It compares with the float graph, so it must fail; and on the result, not on the call."""
    with torch._dynamo.config.patch(verify_correctness=True):
        error = refusal(compiled(mlp()), X)
    assert "incorrect" in str(error)


def test_the_compiled_function_accepts_the_weights_it_dropped():
    """Called as Dynamo calls a copy of the graph: with every input of the graph it captured."""
    model, seen = mlp(), {}

    def backend(gm, inputs):
        seen["run"] = mixllm(gm, list(inputs), options=W4)
        seen["inputs"] = list(inputs)
        return seen["run"]

    y = torch.compile(model, backend=backend)(X)
    (again,) = seen["run"](*seen["inputs"])
    assert torch.equal(again, y)
    assert len(seen["inputs"]) == 5
    assert_quantized(y, model(X), oracle(model)(X))


# -- nothing to quantize -------------------------------------------------------------------------


def test_a_model_of_small_linears_is_refused_and_not_run_in_float():
    error = refusal(compiled(nn.Sequential(nn.Linear(64, 64)).eval()), X[:, :64])
    assert isinstance(error, UnsupportedModel)
