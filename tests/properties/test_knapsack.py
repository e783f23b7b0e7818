"""The knapsack against brute force, and its certificate against the linear program."""

from __future__ import annotations

import itertools
import math
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings

from mixllm_compiler.allocation.knapsack import knapsack, limits, lower_bound
from mixllm_compiler.errors import BudgetError

LOSSES = st.one_of(
    st.floats(0, 10),
    st.integers(0, 4).map(float),  # ties
    st.just(math.inf),
)


@st.composite
def problems(draw, rows=5, formats=4):
    r, f = draw(st.integers(1, rows)), draw(st.integers(1, formats))
    loss = draw(st.lists(st.lists(LOSSES, min_size=f, max_size=f), min_size=r, max_size=r))
    sizes = st.lists(st.integers(0, 12), min_size=f, max_size=f)
    cost = draw(st.lists(sizes, min_size=r, max_size=r))
    loss, cost = torch.tensor(loss, dtype=torch.float64), torch.tensor(cost)
    assume(bool(loss.isfinite().any(1).all()))
    least, most = limits(loss, cost)
    return loss, cost, draw(st.integers(least, most + 3))


def best_by_trying_all(loss, cost, budget):
    best = math.inf
    for choice in itertools.product(range(loss.shape[1]), repeat=len(loss)):
        if sum(cost[r, f].item() for r, f in enumerate(choice)) <= budget:
            best = min(best, sum(loss[r, f].item() for r, f in enumerate(choice)))
    return best


def linear_optimum(loss, cost, budget):
    """The dual is concave and piecewise linear: its maximum lies at a slope between two points."""
    slopes = {0.0}
    for row_loss, row_cost in zip(loss.tolist(), cost.tolist(), strict=True):
        points = [p for p in zip(row_loss, row_cost, strict=True) if math.isfinite(p[0])]
        for (l1, c1), (l2, c2) in itertools.permutations(points, 2):
            if c2 > c1 and l1 > l2:
                slopes.add((l1 - l2) / (c2 - c1))
    return max(lower_bound(loss, cost, budget, slope) for slope in slopes)


@given(problems(), st.booleans())
def test_between_the_bound_and_one_step_of_the_optimum(problem, fill):
    loss, cost, budget = problem
    found = knapsack(loss, cost, budget, fill=fill)
    rows = torch.arange(len(loss))
    assert found.bytes == cost[rows, found.choice].sum() <= budget
    assert found.objective == pytest.approx(loss[rows, found.choice].sum().item())
    optimum = best_by_trying_all(loss, cost, budget)
    assert found.bound <= optimum + 1e-9
    assert optimum <= found.objective + 1e-9
    finite = torch.where(loss.isinf(), -1.0, loss)
    one_step = (finite.amax(1) - loss.amin(1)).max().item()
    assert found.objective <= optimum + one_step + 1e-9
    if found.objective:
        assert found.gap == pytest.approx((found.objective - found.bound) / found.objective)
    else:
        assert found.gap == 0


@given(problems())
def test_the_bound_is_the_linear_optimum(problem):
    loss, cost, budget = problem
    expected = linear_optimum(loss, cost, budget)
    assert knapsack(loss, cost, budget).bound == pytest.approx(expected, abs=1e-9)


@given(problems(), st.floats(0, 5))
def test_any_price_gives_a_valid_bound(problem, price):
    loss, cost, budget = problem
    assert lower_bound(loss, cost, budget, price) <= (best_by_trying_all(loss, cost, budget) + 1e-9)


@given(problems())
def test_nothing_that_helps_still_fits(problem):
    loss, cost, budget = problem
    found = knapsack(loss, cost, budget)
    left = budget - found.bytes
    for r, f in itertools.product(range(len(loss)), range(loss.shape[1])):
        chosen = found.choice[r]
        if loss[r, f] < loss[r, chosen]:
            assert cost[r, f] - cost[r, chosen] > left


@given(problems())
def test_below_the_minimum_is_refused(problem):
    loss, cost, _ = problem
    least, _ = limits(loss, cost)
    with pytest.raises(BudgetError, match=f"from {least:,} to"):
        knapsack(loss, cost, least - 1)


@given(problems(rows=12, formats=6))
def test_same_problem_same_choice(problem):
    loss, cost, budget = problem
    once, again = knapsack(loss, cost, budget), knapsack(loss.clone(), cost.clone(), budget)
    assert torch.equal(once.choice, again.choice)


@given(problems(rows=20, formats=6), st.booleans())
def test_deciding_clear_cases_before_sorting_changes_nothing(problem, fill):
    loss, cost, budget = problem
    sorted_whole = knapsack(loss, cost, budget, fill=fill)
    with mock.patch("mixllm_compiler.allocation.knapsack._SORT", 2):
        halved = knapsack(loss, cost, budget, fill=fill)
    assert torch.equal(halved.choice, sorted_whole.choice)
    assert halved.bound == sorted_whole.bound


@settings(max_examples=10)
@given(st.integers(0, 2**32), st.floats(2.3, 7.5))
def test_gap_is_small_at_real_size(seed, bits):
    draw = torch.Generator().manual_seed(seed)
    rows, widths = 20_000, torch.tensor([2, 3, 4, 5, 6, 8])
    k = torch.tensor([768, 2048, 5632])[torch.randint(3, (rows, 1), generator=draw)]
    cost = k * widths // 8 + 2 * (k // 128)
    scale = torch.exp(2 * torch.randn(rows, 1, generator=draw).double())
    wobble = torch.exp(0.2 * torch.randn(rows, 6, generator=draw).double())
    loss = scale * wobble * 4.0 ** -widths.double()
    budget = int(bits * k.sum() / 8)
    found = knapsack(loss, cost, budget)
    assert found.bytes <= budget
    assert found.gap <= 1e-4
