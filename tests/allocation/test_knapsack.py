from __future__ import annotations

import math

import pytest
import torch

from mixllm_compiler.allocation.knapsack import knapsack, limits, lower_bound
from mixllm_compiler.errors import BudgetError


def problem(*rows):
    """(loss, cost) from rows of (loss, cost) points."""
    loss = torch.tensor([[point[0] for point in row] for row in rows], dtype=torch.float64)
    return loss, torch.tensor([[point[1] for point in row] for row in rows])


def test_a_larger_saving_that_fits_beats_a_better_one_per_byte_that_leaves_bytes_over():
    loss, cost = problem([(9.0, 1), (0.0, 3)], [(5.0, 1), (0.0, 2)])
    found = knapsack(loss, cost, 4)
    assert found.choice.tolist() == [1, 0]
    assert (found.objective, found.bytes) == (5.0, 4)
    # The linear program would take the second row's step and half of the first row's.
    assert found.bound == pytest.approx(9.0 - 4.5)
    assert found.gap == pytest.approx(0.1)


def test_the_row_that_saves_more_per_byte_goes_first():
    loss, cost = problem([(5.0, 1), (0.0, 3)], [(5.0, 1), (0.0, 2)])
    assert knapsack(loss, cost, 3).choice.tolist() == [0, 1]


def test_a_format_above_the_hull_is_never_worth_its_bytes():
    loss, cost = problem([(10.0, 1), (9.0, 2), (0.0, 3)])
    assert knapsack(loss, cost, 3).choice.tolist() == [2]


def test_left_over_bytes_buy_what_still_fits_even_off_the_hull():
    loss, cost = problem([(10.0, 1), (9.0, 2), (0.0, 3)])
    found = knapsack(loss, cost, 2)
    assert found.choice.tolist() == [1]
    assert found.bound == pytest.approx(5.0)


def test_equal_rows_are_served_in_order_and_evenly():
    row = [(4.0, 0), (2.0, 1), (0.0, 2)]
    loss, cost = problem(row, row, row)
    assert knapsack(loss, cost, 4).choice.tolist() == [2, 1, 1]


def test_infinite_loss_forbids_a_format():
    loss, cost = problem([(math.inf, 1), (5.0, 4), (math.inf, 9)], [(3.0, 1), (0.0, 2), (1.0, 2)])
    assert limits(loss, cost) == (5, 6)
    found = knapsack(loss, cost, 100)
    assert found.choice.tolist() == [1, 1]
    assert (found.objective, found.gap) == (5.0, 0.0)


def test_bytes_that_help_nobody_are_kept_unless_they_shall_be_filled():
    loss, cost = problem([(1.0, 1), (1.0, 2), (1.0, 3)], [(0.0, 1), (0.0, 2), (0.0, 3)])
    assert knapsack(loss, cost, 5).choice.tolist() == [0, 0]
    filled = knapsack(loss, cost, 5, fill=True)
    assert filled.choice.tolist() == [2, 1]
    assert filled.objective == 1.0


def test_more_than_enough_is_the_best_of_every_row():
    loss, cost = problem([(3.0, 1), (1.0, 2), (2.0, 3)])
    found = knapsack(loss, cost, 10)
    assert found.choice.tolist() == [1]
    assert (found.bound, found.gap) == (1.0, 0.0)


def test_too_little_says_how_much_it_takes():
    loss, cost = problem([(3.0, 1000), (1.0, 2500)], [(1.0, 500), (0.0, 900)])
    with pytest.raises(BudgetError, match=r"1,499 bytes cannot be met.*from 1,500 to 3,400 bytes"):
        knapsack(loss, cost, 1499)


def test_no_rows():
    found = knapsack(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.int64), 0)
    assert found.choice.shape == (0,)
    assert (found.objective, found.bytes, found.gap) == (0.0, 0, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), -1.0, -math.inf])
def test_a_loss_that_is_none_names_its_row(bad):
    loss, cost = problem([(3.0, 1), (1.0, 2)], [(bad, 1), (1.0, 2)])
    with pytest.raises(ValueError, match="row 1 has a loss that is NaN or negative"):
        knapsack(loss, cost, 4)


def test_a_row_without_a_format():
    loss, cost = problem([(3.0, 1)], [(math.inf, 1)])
    with pytest.raises(ValueError, match="row 1 has no allowed format"):
        knapsack(loss, cost, 4)


def test_shapes_and_costs_are_checked():
    loss, cost = problem([(3.0, 1)])
    with pytest.raises(ValueError, match=r"loss \[1, 1\] and cost \[1, 2\]"):
        knapsack(loss, cost.expand(1, 2), 4)
    with pytest.raises(ValueError, match="negative number of bytes"):
        knapsack(loss, -cost, 4)


def test_the_bound_is_computed_in_float64():
    """A price times whole bytes must not pass through torch's default dtype."""
    loss = torch.tensor([[1e-8, 1.0, 0.0]], dtype=torch.float64)
    cost = torch.tensor([[2**24 + 1, 0, 2**24 + 3]])
    price = 1.0
    assert lower_bound(loss, cost, 7, price) == pytest.approx(1.0 - 7, abs=0)
    assert lower_bound(loss[:, :1], cost[:, :1], 0, price) == 2**24 + 1 + 1e-8
