"""Options travel through torch and transformers, which compare and copy them."""

from __future__ import annotations

import copy

import pytest
import torch

import mixllm_compiler
from mixllm_compiler.allocation.plan import Plan
from mixllm_compiler.options import Options
from mixllm_compiler.runtime import records
from mixllm_compiler.runtime.weights import CACHE
from tests.helpers import (
    EAGER,
    PLAIN,
    W4,
    activations,
    assert_quantized,
    mlp,
    oracle,
    tiny_llama,
    token_ids,
)

X = activations(3)


@pytest.fixture(scope="module")
def planned():
    """A small Llama and a mixed plan for it."""
    model = tiny_llama(1)
    scores = mixllm_compiler.score(model, token_ids(2, 64), kind="weight-error", **PLAIN)
    return model, mixllm_compiler.plan(scores, bits=5.5)


def assert_follows(plan, model, run, ids):
    widths = {name: site.widths for name, site in plan.sites.items()}
    with torch.no_grad():
        expected = oracle(model, widths)(ids).logits
        assert_quantized(run(ids).logits, model(ids).logits, expected)


def test_a_plan_is_its_own_deep_copy(planned):
    plan = planned[1]
    assert copy.deepcopy(plan) is plan
    assert copy.deepcopy({"plan": plan}) == {"plan": plan}


def test_a_model_compiled_twice_with_a_plan(planned):
    """Dynamo compares options with ==, which a tensor inside of them would break."""
    model, plan = planned
    ids = token_ids()
    with records.collect() as graphs:
        first = torch.compile(model, backend="mixllm", options={**EAGER, "plan": plan})
        assert_follows(plan, model, first, ids)
        second = torch.compile(model, backend="mixllm", options={**EAGER, "plan": plan})
        assert_follows(plan, model, second, ids)
    assert len(graphs) == 1


def test_deep_copied_options_give_no_second_graph(planned):
    model, plan = planned
    ids = token_ids()
    options = {**EAGER, "plan": plan, "inductor": {"max_autotune": False}}
    with records.collect() as graphs:
        for given in (options, copy.deepcopy(options)):
            run = torch.compile(model, backend="mixllm", options=given)
            assert_follows(plan, model, run, ids)
    assert len(graphs) == 1


def test_an_equal_plan_from_a_file_gives_no_second_graph(planned, tmp_path):
    model, plan = planned
    plan.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    assert again is not plan
    ids, before = token_ids(), CACHE.packs
    with records.collect() as graphs:
        for given in (plan, again):
            run = torch.compile(model, backend="mixllm", options={**EAGER, "plan": given})
            assert_follows(plan, model, run, ids)
    assert len(graphs) == 1
    assert CACHE.packs - before <= 7


def test_a_plan_as_a_path(planned, tmp_path):
    model, plan = planned
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    run = torch.compile(model, backend="mixllm", options={**EAGER, "plan": str(path)})
    assert_follows(plan, model, run, token_ids())


def test_the_options_given_are_not_changed(planned):
    model, plan = planned
    options = {**EAGER, "plan": plan}
    kept = dict(options)
    torch.compile(model, backend="mixllm", options=options)(token_ids())
    assert options == kept


def test_other_options_give_another_graph():
    model = mlp()
    low = torch.compile(model, backend="mixllm", options={**W4, "widths": (4,)})
    high = torch.compile(model, backend="mixllm", options={**W4, "widths": (8,), "bits": 9})
    with torch.no_grad(), records.collect() as graphs:
        assert_quantized(low(X), model(X), oracle(model, 4)(X))
        assert_quantized(high(X), model(X), oracle(model, 8)(X))
        assert_quantized(low(X), model(X), oracle(model, 4)(X))
    assert len(graphs) == 2


def test_lists_and_tuples_are_the_same_options():
    given = {"widths": [4, 8], "exclude": "lm_head", "disable": ["share-quantizers"]}
    options = Options.parse(given)
    assert options.widths == (4, 8)
    assert options.exclude == ("lm_head",)
    assert options == Options.parse({**given, "widths": (4, 8), "exclude": ("lm_head",)})


def test_options_that_change_no_plan_share_it():
    same = [{}, {"lower": "eager"}, {"quiet": True}, {"verify": True}, {"kernels": "reference"}]
    assert len({Options.parse(o).planning_digest() for o in same}) == 1


@pytest.mark.parametrize(
    "other",
    [
        {"bits": 4.5},
        {"preset": "paper"},
        {"widths": (3, 4)},
        {"group": 64},
        {"rotate": 128},
        {"lm_head": True},
        {"exclude": ("*.down_proj",)},
        {"pins": {"*.o_proj": 8}},
    ],
)
def test_options_that_change_the_plan_do_not_share_it(other):
    assert Options.parse(other).planning_digest() != Options.parse({}).planning_digest()
