"""The knapsack with a limit on formats, and the fewest bytes within a loss, against brute force."""

from __future__ import annotations

import itertools
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given

from mixllm_compiler.allocation.few_formats import few_formats
from mixllm_compiler.allocation.knapsack import cheapest, knapsack, limits
from mixllm_compiler.errors import BudgetError

LOSSES = st.one_of(st.floats(0, 10), st.integers(0, 4).map(float))


@st.composite
def problems(draw, rows=5, formats=4, losses=LOSSES):
    """(loss, cost)"""
    r, f = draw(st.integers(1, rows)), draw(st.integers(1, formats))
    loss = draw(st.lists(st.lists(losses, min_size=f, max_size=f), min_size=r, max_size=r))
    sizes = st.lists(st.integers(0, 12), min_size=f, max_size=f)
    cost = draw(st.lists(sizes, min_size=r, max_size=r))
    loss = torch.tensor(loss, dtype=torch.float64)
    assume(bool(loss.isfinite().any(1).all()))
    return loss, torch.tensor(cost)


def choices(loss, cost):
    """(choice, loss, bytes) of all of them."""
    for choice in itertools.product(range(loss.shape[1]), repeat=len(loss)):
        yield (
            choice,
            sum(loss[r, f].item() for r, f in enumerate(choice)),
            sum(cost[r, f].item() for r, f in enumerate(choice)),
        )


@given(problems(), st.data())
def test_at_most_so_many_formats_and_never_below_the_bound(problem, data):
    loss, cost = problem
    group = torch.tensor(
        data.draw(st.lists(st.integers(0, 1), min_size=len(loss), max_size=len(loss)))
    )
    limit = data.draw(st.integers(1, 3))

    def keeps(choice):
        return all(
            len({f for f, g in zip(choice, group.tolist(), strict=True) if g == own}) <= limit
            for own in (0, 1)
        )

    kept = [(lost, size) for choice, lost, size in choices(loss, cost) if keeps(choice)]
    budget = data.draw(st.integers(min(size for _, size in kept), limits(loss, cost)[1] + 1))
    best = min(lost for lost, size in kept if size <= budget)
    found = few_formats(loss, cost, budget, group=group, limit=limit)
    assert keeps(found.choice.tolist())
    assert found.bytes == cost.gather(1, found.choice[:, None]).sum() <= budget
    assert found.bound - 1e-9 <= best <= found.objective + 1e-9
    assert found.bound >= knapsack(loss, cost, budget).bound - 1e-9
    assert found.gap >= 0


@given(problems(), st.integers(4, 6))
def test_a_limit_that_limits_nothing_changes_nothing(problem, limit):
    loss, cost = problem
    budget = sum(limits(loss, cost)) // 2
    group = torch.zeros(len(loss), dtype=torch.int64)
    found = few_formats(loss, cost, budget, group=group, limit=limit)
    assert torch.equal(found.choice, knapsack(loss, cost, budget).choice)


@given(problems(rows=20, losses=st.floats(0.01, 10)), st.floats(0, 1))
def test_one_format_in_one_group_fits(problem, share):
    loss, cost = problem
    total = cost.sum(0)
    budget = int(total.min()) + int(share * int(total.max() - total.min()))
    group = torch.zeros(len(loss), dtype=torch.int64)
    found = few_formats(loss, cost, budget, group=group, limit=1)
    assert len(set(found.choice.tolist())) == 1
    assert found.bytes <= budget


@given(problems(losses=st.one_of(LOSSES, st.just(math.inf))), st.floats(0, 1))
def test_the_fewest_bytes_within_a_loss(problem, share):
    loss, cost = problem
    least = float(loss.amin(1).sum())
    most = float(torch.where(loss.isinf(), 0, loss).amax(1).sum())
    target = least + share * (most - least)
    found = cheapest(loss, cost, target)
    assert found.objective == pytest.approx(loss.gather(1, found.choice[:, None]).sum().item())
    assert found.objective <= target * (1 + 1e-9)
    assert found.bytes == cost.gather(1, found.choice[:, None]).sum()
    sizes = [(size, lost) for _, lost, size in choices(loss, cost)]
    # The bound is that of the target itself; a plan a rounding above it may be smaller.
    within = min((size for size, lost in sizes if lost <= target), default=math.inf)
    assert found.bound <= within + 1e-6
    best = min(size for size, lost in sizes if lost <= target * (1 + 1e-9))
    one_step = int((cost.amax(1) - cost.amin(1)).max())
    assert best <= found.bytes <= best + one_step


@given(problems())
def test_less_loss_than_the_best_formats_is_refused(problem):
    loss, cost = problem
    least = float(loss.amin(1).sum())
    assume(least > 1e-6)
    with pytest.raises(BudgetError, match="cannot be met"):
        cheapest(loss, cost, 0.9 * least)
