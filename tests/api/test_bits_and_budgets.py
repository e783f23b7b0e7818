"""True bits are one number, planned or counted in the tensors; budgets are met closely."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

import mixllm_compiler
from mixllm_compiler import PackedLinear, QuantizedWeight, Scores, true_bits
from tests.helpers import causal_lm, token_ids
from tests.models.support import build

IDS = token_ids(2, 40)


def counted_bits(weights: Iterable[QuantizedWeight]) -> float:
    """Bits per weight from the sizes of the stored tensors, four bits a row for its width."""
    bits = values = 0
    for weight in weights:
        stored = [t for rows in weight.rows.values() for t in rows.tensors()]
        bits += 8 * sum(t.numel() * t.element_size() for t in stored) + 4 * weight.n
        values += weight.n * weight.k
    return bits / values


@pytest.mark.parametrize("lm_head", [False, True])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_reported_bits_are_those_of_the_plan_and_of_the_packed_tensors(kind, lm_head):
    model = build(kind)
    scores = mixllm_compiler.score(model, IDS, kind="weight-error", lm_head=lm_head)
    plan = mixllm_compiler.plan(scores, bits=4.7, tile=1)
    (graph,) = mixllm_compiler.explain(model, IDS, options={"plan": plan}).graphs
    mixllm_compiler.quantize(model, plan)
    weights = [m.quantized_weight() for m in model.modules() if isinstance(m, PackedLinear)]
    assert len(weights) == len(plan.sites)
    bits = counted_bits(weights)
    assert true_bits(weights) == pytest.approx(bits, abs=1e-12)
    assert plan.true_bits == pytest.approx(bits, abs=1e-12)
    assert graph.true_bits() == pytest.approx(bits, abs=1e-12)
    (again,) = mixllm_compiler.explain(model, IDS).graphs
    assert again.true_bits() == pytest.approx(bits, abs=1e-12)
    assert 4.7 * 0.995 < bits <= 4.7


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_a_tied_head_counts_and_its_embedding_stays_float(kind):
    """The head's packed copy is new; the table it was tied to is read as before."""
    model = build(kind)
    scores = mixllm_compiler.score(model, IDS, kind="weight-error", lm_head=True)
    plan = mixllm_compiler.plan(scores, bits=4.7)
    table = model.get_input_embeddings().weight
    assert plan.sites["lm_head"].n == table.shape[0]
    values, parameters = table.clone(), sum(p.numel() for p in model.parameters())
    mixllm_compiler.quantize(model, plan)
    assert isinstance(model.get_output_embeddings(), PackedLinear)
    assert model.get_input_embeddings().weight is table and torch.equal(table, values)
    weights = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    sizes = {n: m.in_features * m.out_features for n, m in weights.items()}
    left = sum(p.numel() for p in model.parameters())
    assert parameters - left == sum(sizes.values()) - sizes["lm_head"]  # the table is still there
    assert plan.true_bytes == sum(m.quantized_weight().true_bytes() for m in weights.values())


@pytest.fixture(scope="module")
def scores() -> Scores:
    """Of a model large enough that bytes too few for another row do not matter: 14,336 rows."""
    model = causal_lm("llama", 4, hidden_size=512, intermediate_size=1024)
    widths = (2, 3, 4, 5, 6, 8)
    return mixllm_compiler.score(model, IDS, kind="weight-error", widths=widths)


@pytest.mark.parametrize("widths", [(4, 8), (3, 4, 5), (2, 3, 4, 5, 6, 8)], ids=str)
@pytest.mark.parametrize("bits", [4.4, 4.75, 5.0])
def test_budgets_are_used_up_and_the_allocation_is_nearly_optimal(scores, bits, widths):
    plan = mixllm_compiler.plan(scores, bits=bits, widths=widths, tile=1)
    assert bits * 0.995 < plan.true_bits <= bits
    assert 0 <= plan.certificate.gap <= 1e-4
    tiled = mixllm_compiler.plan(scores, bits=bits, widths=widths)
    assert bits * 0.995 < tiled.true_bits <= bits
    assert 0 <= tiled.certificate.gap <= 1e-2  # of 224 tiles
    assert plan.predicted_loss < tiled.predicted_loss < 1.1 * plan.predicted_loss
    assert plan.certificate.objective == pytest.approx(plan.predicted_loss)
    assert plan.predicted_loss == pytest.approx(summed_loss(plan, scores))


def summed_loss(plan: mixllm_compiler.Plan, scores: Scores) -> float:
    """What the rows' scores add up to under a plan."""
    total = 0.0
    for name, site in plan.sites.items():
        spans = [1] * site.n if site.spans is None else site.spans.tolist()
        formats = [(f.bits, f.group // scores.group) for f in scores.formats]
        rows = zip(site.widths.tolist(), spans, strict=True)
        column = torch.tensor([formats.index(row) for row in rows])
        total += float(scores.loss[name].double().gather(1, column[:, None]).sum())
    return total


def test_more_widths_never_predict_a_larger_loss(scores):
    few, many = (
        mixllm_compiler.plan(scores, bits=4.6, widths=widths, tile=1).certificate
        for widths in ((4, 8), (2, 3, 4, 5, 6, 8))
    )
    assert many.objective <= few.bound


def test_the_paper_rule_at_the_same_bits_never_predicts_a_smaller_loss(scores):
    paper = mixllm_compiler.plan(scores, preset="paper", widths=(4, 8))
    best = mixllm_compiler.plan(scores, bits=paper.true_bits, widths=(4, 8), tile=1)
    assert best.true_bits <= paper.true_bits
    assert best.predicted_loss <= paper.predicted_loss
