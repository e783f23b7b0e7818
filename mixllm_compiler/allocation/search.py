"""Tiles and widths together: choose widths, sort rows into better tiles around them, again."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .budget import Budget
from .few_formats import few_formats
from .knapsack import Solution, Solver, knapsack
from .problem import Problem
from .tiles import Items, cut, free_rows, groups, regions, resort
from .tiling import Tiling

_ROUNDS = 2  # a third one gains less than a ten-thousandth of the loss


def best_tiles(
    problem: Problem, tiling: Tiling, budget: Budget, formats_per_layer: int | None = None
) -> tuple[Tensor, Solution]:
    """Formats of all rows, int64 [R] indices, and the solution over the items that they form.

    Raises:
        BudgetError: no plan meets the budget.
        OptionError: the rows cannot be tiled so.
    """

    # Left-over bytes are spent; left-over loss is kept.
    fill = budget.kl is None

    def solve(items: Items) -> Solution:
        solver: Solver = partial(knapsack, fill=fill)
        if formats_per_layer is not None:
            group = groups(problem, tiling)[items.tensor]
            solver = partial(few_formats, fill=fill, group=group, limit=formats_per_layer)
        return budget.solve(problem, items, solver)

    if tiling.tile == 1:
        solution = solve(free_rows(problem))
        return solution.choice, solution
    found = regions(problem, tiling)
    best, choice, rows = None, torch.empty(0), torch.empty(0)
    for _ in range(1 + (_ROUNDS if tiling.tile else 0)):
        if best is not None:
            found = [resort(problem, r, rows[r.rows[:: r.tile]]) for r in found]
        items = cut(problem, found)
        solution = solve(items)
        rows = solution.choice[items.of_row]
        if best is None or _size(solution, budget) < _size(best, budget):
            best, choice = solution, rows
    assert best is not None
    return choice, best


def _size(solution: Solution, budget: Budget) -> float:
    """What the budget leaves to be minimized."""
    return solution.objective if budget.kl is None else solution.bytes
