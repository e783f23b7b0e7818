"""annotate-salience and allocate-bits: every row gets a width, inside the budget."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mixllm_compiler
from mixllm_compiler.errors import BudgetError, OptionError, PlanMismatch
from mixllm_compiler.formats.row_format import RowFormat
from mixllm_compiler.options import Options
from mixllm_compiler.passes.allocate_bits import AllocateBits
from mixllm_compiler.passes.annotate_salience import AnnotateSalience
from mixllm_compiler.passes.context import Context
from mixllm_compiler.passes.pipeline import default_pipeline
from mixllm_compiler.salience.kinds import weight_error
from tests.helpers import (
    HIDDEN,
    LlamaBlock,
    activations,
    captured,
    outputs,
    passed,
    tiny_llama,
    token_ids,
)

X = activations(2, 5)
MIXED = {"widths": (4, 8), "bits": 5}


def scored(x=X, until="annotate-salience", **options):
    graph = captured(LlamaBlock(), x)
    return graph, passed(graph, until, **{**MIXED, **options})


# -- annotate-salience ---------------------------------------------------------------------------


def test_few_tokens_are_ranked_by_weight_error_and_it_says_so():
    graph, ctx = scored()
    assert ctx.score_kind == "weight-error"
    assert "fewer than the 512 a gradient score needs" in ctx.score_note
    assert "mixllm_compiler.compile" in ctx.score_note
    formats = (RowFormat(4), RowFormat(8))
    for matrix in graph.matrices.values():
        assert torch.equal(matrix.losses, weight_error(matrix.stored(), formats))


def test_enough_tokens_are_scored_by_gradients():
    graph, ctx = scored(activations(2, 300))
    assert (ctx.score_kind, ctx.score_note) == ("fisher-sequence", "")
    assert (ctx.sequences, ctx.tokens) == (2, 600)
    for matrix in graph.matrices.values():
        assert matrix.losses.shape == (matrix.n, 2)
        assert matrix.losses.dtype == torch.float32
        low, high = matrix.losses.unbind(1)
        assert low.sum() > 100 * high.sum() > 0


def test_the_paper_preset_uses_the_papers_score():
    _, ctx = scored(activations(2, 300), preset="paper", bits=None)
    assert ctx.score_kind == "paper"


@pytest.mark.parametrize("kind", ["fisher-sequence", "paper", "weight-error"])
def test_a_kind_asked_for_is_used_whatever_the_number_of_tokens(kind):
    graph = captured(LlamaBlock(), X)
    passed(graph, "annotate-linears")
    ctx = Context(Options.parse(MIXED))
    AnnotateSalience(kind=kind)(graph, ctx)
    assert ctx.score_kind == kind


def test_another_kind_is_refused():
    with pytest.raises(OptionError, match="unknown score 'hessian'"):
        AnnotateSalience(kind="hessian")


def test_scoring_changes_nothing_in_the_graph():
    graph = captured(LlamaBlock(), activations(2, 300))
    before = outputs(graph)
    text = str(graph.graph)
    passed(graph, "annotate-salience", **MIXED)
    assert str(graph.graph) == text
    assert torch.equal(outputs(graph), before)
    assert not any(p.grad is not None for p in graph.module.parameters())


def test_a_model_planned_before_is_not_scored_again():
    model = LlamaBlock()
    first, second = captured(model, X), captured(model, activations(2, 7))
    passed(first, "allocate-bits", **MIXED)
    ctx = passed(second, "allocate-bits", **MIXED)
    assert ctx.known is not None
    assert all(m.losses is None for m in second.matrices.values())
    for name, matrix in second.matrices.items():
        assert torch.equal(matrix.widths, first.matrices[name].widths)


def test_a_given_plan_is_not_scored():
    model = LlamaBlock()
    first = captured(model, X)
    plan = passed(first, "allocate-bits", **MIXED).plan
    twin = captured(LlamaBlock(), X)  # the same weights in other tensors: nothing is known of them
    ctx = passed(twin, "annotate-salience", **MIXED)
    assert ctx.known is None
    third = captured(LlamaBlock(), X)
    passed(third, "annotate-linears", **MIXED)
    ctx = Context(Options.parse(MIXED), plan=plan)
    assert len(AnnotateSalience()(third, ctx)) == 0


def test_a_linear_that_nothing_depends_on_scores_zero():
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x):
            self.b(x)
            return self.a(x)

    graph = captured(Dead().eval(), activations(2, 300))
    passed(graph, "annotate-salience", **MIXED)
    assert graph.matrices["a"].losses.sum() > 0
    assert graph.matrices["b"].losses.sum() == 0


# -- allocate-bits -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4.4, 5, 6.5, 8])
@pytest.mark.parametrize("tokens", [5, 300])
def test_the_budget_is_used_and_not_exceeded(bits, tokens):
    graph, ctx = scored(activations(2, tokens), "allocate-bits", bits=bits, tile=1)
    assert bits * 0.995 < ctx.plan.true_bits <= bits
    # The bound may split one row; a plan cannot.
    steps = torch.cat([m.losses[:, 0] - m.losses[:, 1] for m in graph.matrices.values()])
    certificate = ctx.plan.certificate
    assert 0 <= certificate.objective - certificate.bound <= float(steps.max())
    widths = torch.cat([m.widths for m in graph.matrices.values()])
    assert widths.dtype == torch.uint8
    assert set(widths.tolist()) <= {4, 8}


def test_rows_that_lose_most_get_the_bits():
    graph, _ = scored(activations(2, 300), "allocate-bits", tile=1)
    matrix = graph.matrices["mlp.gate_proj"]
    gain = matrix.losses[:, 0] - matrix.losses[:, 1]
    assert gain[matrix.widths == 8].min() >= gain[matrix.widths == 4].max()


def test_pins_fix_whole_matrices():
    graph, ctx = scored(
        until="allocate-bits", pins={"*.down_proj": 8, "self_attn.*": 4}, bits=5.5, tile=1
    )
    widths = {name: set(m.widths.tolist()) for name, m in graph.matrices.items()}
    assert widths["mlp.down_proj"] == {8}
    assert widths["self_attn.q_proj"] == {4}
    assert 5.47 < ctx.plan.true_bits <= 5.5


def test_tiles_cross_matrices_that_read_one_activation():
    """64 rows of q, k and v together have one width; so few of one matrix need not be a tile."""
    graph, _ = scored(activations(2, 300), "allocate-bits", bits=5.5)
    widths = {name: m.widths for name, m in graph.matrices.items()}
    for names in (("q", "k", "v"), ("o",)):
        rows = torch.cat([widths[f"self_attn.{name}_proj"] for name in names])
        assert all(count % 64 == 0 for count in torch.bincount(rows).tolist())
    alone = [torch.bincount(w).tolist() for w in widths.values()]
    assert any(count % 64 for counts in alone for count in counts)


def test_the_paper_preset_gives_a_tenth_of_the_rows_eight_bits():
    graph, ctx = scored(activations(2, 300), "allocate-bits", preset="paper", bits=None)
    widths = torch.cat([m.widths for m in graph.matrices.values()])
    assert (widths == 8).sum() == round(0.1 * len(widths))
    assert set(widths.tolist()) == {4, 8}
    assert ctx.plan.asked.startswith("paper")


def test_a_budget_that_no_plan_meets():
    with pytest.raises(BudgetError, match="Raise the budget or allow smaller widths"):
        scored(until="allocate-bits", bits=4)


def test_a_matrix_in_both_a_plan_and_a_graph_must_agree():
    model = tiny_llama(1)
    scores = mixllm_compiler.score(model, token_ids(2, 16), kind="weight-error")
    plan = mixllm_compiler.plan(scores, bits=5, exclude=("*.o_proj",))
    graph = captured(model, token_ids(), use_cache=False)
    passed(graph, "annotate-salience", **MIXED)
    ctx = Context(Options.parse(MIXED), plan=plan)
    with pytest.raises(PlanMismatch, match=r"keeps .*o_proj float; exclude it here as well"):
        AllocateBits()(graph, ctx)


def test_a_plan_that_keeps_a_matrix_float_is_followed():
    model = tiny_llama(1)
    scores = mixllm_compiler.score(model, token_ids(2, 16), kind="weight-error")
    plan = mixllm_compiler.plan(scores, bits=5, exclude=("*.o_proj",))
    graph = captured(model, token_ids(), use_cache=False)
    default_pipeline().run(graph, Context(Options(), plan=plan))
    kept = graph.matrices["model.layers.0.self_attn.o_proj"]
    assert kept.kept_float == plan.float_sites["model.layers.0.self_attn.o_proj"]
    assert kept.widths is None
    assert len([m for m in graph.matrices.values() if m.widths is not None]) == 6
