"""Rows of a tile share a width, and have group sizes of their own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixllm_compiler.allocation.allocate import make_plan
from mixllm_compiler.allocation.budget import Budget
from mixllm_compiler.allocation.group_sizes import fold
from mixllm_compiler.allocation.knapsack import knapsack
from mixllm_compiler.allocation.problem import Problem
from mixllm_compiler.allocation.search import best_tiles
from mixllm_compiler.allocation.tiling import Tiling
from mixllm_compiler.errors import BudgetError
from mixllm_compiler.formats.row_format import RowFormat

Q, UP = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight"
FORMATS = tuple(
    RowFormat(bits, 16 * span, "two-level")
    for bits in (2, 3, 4, 5, 8)
    for span in (1, 2, 4)
    if span == 1 or bits < 8
)


@pytest.fixture
def scores(model, score):
    return score(model, group=16, formats=FORMATS)


@pytest.fixture
def one_size(model, score):
    return score(model, group=16, formats=tuple(f for f in FORMATS if f.group == 16))


def test_a_tile_has_one_width_and_rows_of_several_group_sizes(scores):
    plan = make_plan(scores, bits=4.4, tile=32)
    for name in (Q, UP):
        site = plan.sites[name]
        assert (torch.bincount(site.widths) % 32 == 0).all()
    spans = plan.sites[UP].spans
    assert set(spans.tolist()) == {1, 2, 4}
    assert any(int((spans == s).sum()) % 32 for s in (1, 2, 4))


@pytest.mark.parametrize("bits", [3.5, 4.4, 5.0])
@pytest.mark.parametrize("way", [{"tile": 32}, {"granularity": "linears"}], ids=str)
def test_between_free_rows_and_groups_of_one_size(scores, one_size, bits, way):
    plan = make_plan(scores, bits=bits, **way)
    free, fixed = make_plan(scores, bits=bits, tile=1), make_plan(one_size, bits=bits, **way)
    assert free.predicted_loss <= plan.predicted_loss < fixed.predicted_loss
    assert bits * 0.999 < plan.true_bits <= bits
    assert free.certificate.bound <= plan.certificate.bound * (1 + 1e-9)
    assert 0 <= plan.certificate.gap < 0.3  # of seven matrices


def test_a_kl_is_met_with_fewer_bytes_than_groups_of_one_size_take(scores, one_size):
    kl = make_plan(one_size, bits=4.4, tile=32).predicted_loss
    plan, fixed = (make_plan(s, kl=kl, tile=32) for s in (scores, one_size))
    assert plan.predicted_loss <= kl * (1 + 1e-9)
    assert plan.true_bytes < fixed.true_bytes
    assert plan.certificate.of == "bytes" and 0 <= plan.certificate.gap < 0.1


def test_a_limit_on_formats_counts_widths_alone(scores):
    plan = make_plan(scores, bits=4.4, tile=32, formats_per_layer=2, siblings=False)
    for site in plan.sites.values():
        assert len(site.rows_per_width()) <= 2
    assert any(len(site.rows_per_format()) > 2 for site in plan.sites.values())


def test_the_smallest_budget_can_be_met(scores):
    with pytest.raises(BudgetError) as refused:
        make_plan(scores, bits=1.5, tile=32)
    least = int(str(refused.value).split("(")[2].split(" ")[0].replace(",", ""))
    plan = make_plan(scores, bytes=least, tile=32)
    assert plan.true_bytes == least
    assert set(torch.cat([s.widths for s in plan.sites.values()]).tolist()) == {2}


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95), st.sampled_from([2, 3, 4]))
def test_no_choice_of_widths_and_sizes_goes_below_the_bound(seed, share, tile):
    """Every allocation of six rows to tiles, widths and sizes, against the answer."""
    draw = torch.Generator().manual_seed(seed)
    formats = tuple(RowFormat(b, g, "two-level") for b in (2, 4) for g in (16, 32))
    loss = torch.rand(6, 4, generator=draw, dtype=torch.float64).sort(descending=True).values
    cost = torch.tensor([[f.row_bytes(64) for f in formats]])
    problem = Problem(
        formats, (("w",),), ((6, 64),), (0,), loss, torch.zeros(1, 4).double(), cost,
        torch.ones(1, 4, dtype=torch.bool), torch.zeros(1, dtype=torch.bool),
    )  # fmt: skip
    least, most = 6 * int(cost.min()), 6 * int(cost.max())
    size = int(least + share * (most - least)) + problem.fixed_bytes
    choice, solution = best_tiles(problem, Tiling(tile, 0), Budget(bytes=size))
    spent = int(cost[0][choice].sum())
    assert spent == solution.bytes <= size - problem.fixed_bytes
    assert float(loss.gather(1, choice[:, None]).sum()) == pytest.approx(solution.objective)
    widths = torch.tensor([f.bits for f in formats])[choice]
    assert (torch.bincount(widths)[[2]] % tile).tolist() in ([0], [6 % tile])
    free = knapsack(loss, cost.expand(6, -1), size - problem.fixed_bytes)
    assert free.bound <= solution.objective + 1e-9
    assert solution.bound <= solution.objective


def test_folded_rows_take_what_is_best_at_the_price(scores):
    problem = Problem.build(scores, [Q, UP], (2, 3, 4, 5, 8), {})
    cheap, dear = fold(problem, 0.0), fold(problem, 1e3)
    assert [f.bits for f in cheap.formats] == [2, 3, 4, 5, 8]
    assert (cheap.loss <= dear.loss).all() and (cheap.row_cost >= dear.row_cost).all()
    assert (dear.row_cost[:, 0] == min(int(c) for c in problem.cost[0])).all()
    price = 1e-8
    found = fold(problem, price)
    rows = problem.cost[problem.tensor_of_row]
    value = problem.loss + price * rows
    best = torch.stack(
        [
            value[:, [i for i, f in enumerate(FORMATS) if f.bits == b]].amin(1)
            for b in (2, 3, 4, 5, 8)
        ],
        1,
    )
    assert torch.allclose(found.loss + price * found.row_cost, best, rtol=1e-12)
    assert math.isinf(float(Problem.build(scores, [Q], (4,), {}).loss[0, 0]))
