"""Rows that choose the size of their groups, from scores to the compiled model."""

from __future__ import annotations

import pytest
import torch

import mixllm_compiler
from mixllm_compiler import Plan, true_bits
from mixllm_compiler.errors import OptionError
from mixllm_compiler.formats.spans import SPANS
from mixllm_compiler.passes.quantize_model import Recipe, quantize_model
from tests.helpers import causal_lm, token_ids

IDS = token_ids(8, 48)
OPTIONS = {"family": "two-level", "widths": (3, 4, 5, 8), "group": 32, "rotate": 32}


def model():
    return causal_lm("llama", 1)


@pytest.fixture(scope="module")
def scores():
    return mixllm_compiler.score(model(), IDS, kind="kfac", spans=(1, 2, 4), **OPTIONS)


@pytest.fixture(scope="module")
def plan(scores):
    return mixllm_compiler.plan(scores, bits=4.6, tile=1)


def test_rows_choose_among_group_sizes(scores, plan):
    assert scores.widths == (3, 4, 5, 8) and len(scores.formats) == 3 * len(SPANS) + 1
    chosen = {f.group for site in plan.sites.values() for f in site.rows_per_format()}
    assert chosen == {32, 64, 128}
    assert 4.6 * 0.99 < plan.true_bits <= 4.6


def test_a_choice_of_groups_loses_less_than_any_one_of_them(scores, plan):
    for span in SPANS:
        alone = mixllm_compiler.score(model(), IDS, kind="kfac", **{**OPTIONS, "group": 32 * span})
        other = mixllm_compiler.plan(alone, bits=4.6, tile=1)
        assert plan.predicted_loss < other.predicted_loss


def test_a_saved_plan_is_the_same_plan(plan, tmp_path):
    plan.save(tmp_path / "plan")
    again = Plan.load(tmp_path / "plan")
    assert again == plan and again.true_bits == plan.true_bits
    name = next(iter(plan.sites))
    assert torch.equal(again.sites[name].spans, plan.sites[name].spans)


@pytest.mark.parametrize("method", ["gptq", "rtn", "search"])
def test_weights_are_as_small_as_planned(plan, method):
    weights = quantize_model(model(), plan, IDS, Recipe(method=method), batch=4)
    assert true_bits(weights.values()) == pytest.approx(plan.true_bits)
    for name, weight in weights.items():
        assert torch.equal(weight.spans, plan.sites[name].spans)
        weight.check()


def test_the_longest_groups_are_512():
    scores = mixllm_compiler.score(model(), IDS, spans=(1, 4), widths=(3, 4))
    plan = mixllm_compiler.plan(scores, bits=3.7, tile=1)
    weights = quantize_model(model(), plan, IDS, Recipe(), batch=4)
    assert true_bits(weights.values()) == pytest.approx(plan.true_bits)


@torch.no_grad()
@pytest.mark.parametrize("data", [None, IDS])
def test_a_compiled_model_is_the_quantized_one(plan, data):
    quantized = mixllm_compiler.quantize(model(), plan, data)
    ids = token_ids(2, 9, seed=5)
    expected = quantized(ids).logits
    options = {"lower": "eager", "quiet": True, "plan": plan, **OPTIONS}
    if data is None:
        compiled = torch.compile(model(), backend="mixllm", options=options)
    else:
        compiled = torch.compile(quantized, backend="mixllm", options=options)
    assert float((compiled(ids).logits - expected).abs().max()) < 1e-4


def test_a_paper_plan_has_no_spans(scores):
    made = mixllm_compiler.plan(scores, preset="paper", widths=(4, 8), bits=5.0)
    assert all(site.spans is None for site in made.sites.values())


def test_asym_rows_have_no_spans():
    with pytest.raises(OptionError, match="two-level"):
        mixllm_compiler.score(model(), IDS, spans=(1, 2), family="asym")
