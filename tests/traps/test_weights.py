"""Whatever happens to a weight, the compiled model computes with the weights it has now."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mixllm_compiler
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
    oracle_linear,
    token_ids,
)

X = activations(3)


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


def assert_right(run, model, x=X):
    assert_quantized(run(x), model(x), oracle(model)(x))


# -- one weight in several places ----------------------------------------------------------------


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        return self.lin(self.lin(x))


def test_one_linear_applied_twice_in_a_row():
    model = Twice().eval()
    before = CACHE.packs
    with records.collect() as graphs:
        assert_right(compiled(model), model)
    assert CACHE.packs - before == 1
    assert [line.name for line in graphs[0].quantized] == ["lin"]


def test_one_weight_in_two_modules():
    model = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN)).eval()
    model[2].weight = model[0].weight
    before = CACHE.packs
    assert_right(compiled(model), model)
    assert CACHE.packs - before == 1


def test_one_weight_in_two_models_is_packed_once():
    first, second = mlp(0), mlp(1)
    second[0].weight = first[0].weight
    before = CACHE.packs
    assert_right(compiled(first), first)
    assert_right(compiled(second), second)
    assert CACHE.packs - before == 3


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.lin = nn.Linear(HIDDEN, HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        return self.lm_head(self.lin(self.embed(ids)))


def test_a_tied_head_stays_float_and_keeps_its_own_name():
    model, ids = Tied().eval(), token_ids()
    with records.collect() as graphs:
        assert_right(compiled(model), model, ids)
    assert {line.name: line.kept_float for line in graphs[0].linears} == {
        "lin": "",
        "lm_head": "the output head (quantize it with lm_head=True)",
    }


def test_a_tied_head_is_quantized_beside_a_float_embedding():
    model, ids = Tied().eval(), token_ids()
    hidden = oracle_linear(model.embed(ids), model.lin.weight, model.lin.bias)
    expected = oracle_linear(hidden, model.lm_head.weight)
    run = compiled(model, lm_head=True)
    assert_quantized(run(ids), model(ids), expected)
    assert_quantized(run(ids), oracle(model)(ids), expected)  # the head itself, too


# -- weights that change -------------------------------------------------------------------------


def other_state(model):
    torch.manual_seed(9)
    return {name: torch.randn_like(value) / 9 for name, value in model.state_dict().items()}


def replace_parameter(model):
    model[0].weight = nn.Parameter(torch.randn(192, HIDDEN))


def replace_module(model):
    model[2] = nn.Linear(192, HIDDEN)


def write_in_place(model):
    model[0].weight.copy_(torch.randn(192, HIDDEN))


def set_data(model):
    model[0].weight.data = torch.randn(192, HIDDEN)


def load(model):
    model.load_state_dict(other_state(model))


def load_assigning(model):
    model.load_state_dict(other_state(model), assign=True)


def cast_there_and_back(model):
    model.to(torch.bfloat16).to(torch.float32)


def multiply_bias_and_weight(model):
    model[2].weight.mul_(3)
    model[2].bias.mul_(3)


CHANGES = {
    replace_parameter: 1,
    replace_module: 1,
    write_in_place: 1,
    set_data: 1,
    load: 2,
    load_assigning: 2,
    cast_there_and_back: 2,
    multiply_bias_and_weight: 1,
}
"""Change → how many of the two weights it changes."""


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_weight_is_quantized_again(change):
    model = mlp()
    run = compiled(model)
    before = run(X)
    change(model)
    assert not torch.equal(run(X), before)
    assert_right(run, model)


@pytest.mark.parametrize("change", CHANGES)
def test_an_unchanged_neighbour_is_not_packed_again(change):
    model = mlp()
    run = compiled(model)
    run(X)
    before = CACHE.packs
    change(model)
    run(X)
    assert CACHE.packs - before == CHANGES[change]


def test_a_write_through_data_is_seen_after_invalidate():
    model = mlp()
    run = compiled(model)
    stale = run(X)
    model[0].weight.data.copy_(torch.randn(192, HIDDEN))
    assert torch.equal(run(X), stale)  # nothing can see it: documented
    assert mixllm_compiler.invalidate(model) == 2
    assert_right(run, model)


def test_invalidate_leaves_other_models_alone():
    model, other = mlp(0), mlp(1)
    run, run_other = compiled(model), compiled(other)
    run(X), run_other(X)
    before = CACHE.packs
    mixllm_compiler.invalidate(model)
    run(X), run_other(X)
    assert CACHE.packs - before == 2


# -- other instances -----------------------------------------------------------------------------


def test_a_second_instance_of_the_class_runs_with_its_own_weights():
    first, second = Twice().eval(), Twice().eval()
    assert_right(compiled(first), first)
    assert_right(compiled(second), second)
    assert_right(compiled(first), first)


def test_a_deep_copy_runs_with_its_own_weights():
    model = mlp()
    assert_right(compiled(model), model)
    twin = copy.deepcopy(model)
    twin[0].weight.mul_(-2)
    assert_right(compiled(twin), twin)
    assert_right(compiled(model), model)


def test_a_deep_copy_of_a_compiled_module_runs_with_its_own_weights():
    run = compiled(mlp())
    run(X)
    twin = copy.deepcopy(run)
    twin._orig_mod[0].weight.mul_(-2)
    assert_right(twin, twin._orig_mod)
    assert_right(run, run._orig_mod)


@pytest.fixture(params=["torch._dynamo.prepare_freezing", "torch._inductor.freezing"])
def freezing(request):
    """Dynamo leaves parameters on the graph's module instead of lifting them."""
    home, _, name = request.param.rpartition(".")
    with {"torch._dynamo": torch._dynamo, "torch._inductor": torch._inductor}[home].config.patch(
        {name: True}
    ):
        yield request.param


def test_parameters_that_arrive_as_attributes_are_quantized(freezing):
    model = mlp()
    with records.collect() as graphs:
        assert_right(compiled(model), model)
    assert [line.name for line in graphs[0].quantized] == [m.name for m in graphs[0].linears]
    assert len(graphs[0].quantized) == 2


def test_an_attribute_written_in_place_is_quantized_again(freezing):
    model = mlp()
    run = compiled(model)
    run(X)
    write_in_place(model)
    assert_right(run, model)
