"""Tiles and widths together: choose widths, sort rows into better tiles around them, again.

Where rows may choose the size of their groups, the first choice is by tile, the others see the
sizes that are best at the price of a byte found so far, and the last word is every row's own.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from ..errors import BudgetError
from .budget import Budget
from .few_formats import few_formats
from .group_sizes import fold, may_fold, price_of, unfold, width_of
from .knapsack import Solution, Solver, knapsack
from .problem import Problem
from .tiles import Items, cut, free_rows, groups, regions, resort
from .tiling import Tiling

_ROUNDS = 3  # the third gains a ten-thousandth of the loss, and a price that makes the bound tight


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
    folds = may_fold(problem)
    found, columns = regions(problem, tiling), problem
    items = cut(columns, found)
    solution = best = solve(items)
    choice = rows = solution.choice[items.of_row]
    bound = best.bound
    for turn in range(_ROUNDS if tiling.tile else int(folds)):
        if folds:
            if turn == 0:
                choice = rows = width_of(problem, rows)
            columns = fold(problem, price_of(solution, budget, problem))
        found = [resort(columns, r, rows[r.rows[:: r.tile]]) for r in found]
        items = cut(columns, found)
        try:
            solution = solve(items)
        except BudgetError:  # the sizes that are best at this price are too large for all to have
            break
        rows = solution.choice[items.of_row]
        if _size(solution, budget) < _size(best, budget):
            best, choice = solution, rows
            bound = budget.bound(problem, items, columns.price) if folds else best.bound
    if folds:
        return unfold(problem, choice, budget, partial(knapsack, fill=fill), bound, best.price)
    return choice, best


def _size(solution: Solution, budget: Budget) -> float:
    """What the budget leaves to be minimized."""
    return solution.objective if budget.kl is None else solution.bytes
