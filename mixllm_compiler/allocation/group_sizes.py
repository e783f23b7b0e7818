"""Rows of a tile share a width; the size of its groups is every row's own.

At a price of a byte each row has one best group size for each width, whatever the others take. So
tiles choose widths over rows that are folded at that price, and once widths are chosen, the sizes
are a knapsack of free rows. What the folded rows cannot go below at that price is a bound for both
choices together.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .budget import Budget
from .knapsack import Solution, Solver, certified
from .problem import Problem
from .tiles import Items

_CHUNK = 1 << 17  # rows at a time


def fold(problem: Problem, price: float) -> Problem:
    """The problem of choosing widths, where rows have the group sizes that are best at a price.

    Args:
        price: of a byte, in nats per token.
    """
    columns = _columns(problem)
    tensor = problem.tensor_of_row
    shape = len(problem.loss), len(columns)
    loss = torch.empty(shape, dtype=torch.float64)
    cost = torch.empty(shape, dtype=torch.int32)
    for start in range(0, len(loss), _CHUNK):
        rows = slice(start, start + _CHUNK)
        bytes_ = problem.cost[tensor[rows]]
        value = problem.loss[rows] + price * bytes_
        for width, sizes in enumerate(columns):
            best = torch.tensor(sizes)[value[:, sizes].argmin(1)].unsqueeze(1)
            loss[rows, width] = problem.loss[rows].gather(1, best).squeeze(1)
            cost[rows, width] = bytes_.gather(1, best).squeeze(1).int()
    first = [sizes[0] for sizes in columns]
    return replace(
        problem,
        formats=tuple(problem.formats[i] for i in first),
        loss=loss,
        allowed=problem.allowed[:, first],
        row_cost=cost,
        price=price,
    )


def unfold(
    problem: Problem, width: Tensor, budget: Budget, solver: Solver, bound: float, price: float
) -> tuple[Tensor, Solution]:
    """The best group sizes of rows whose widths are chosen.

    Args:
        width: int64 [R], columns of the folded problem.
        bound, price: of the choice of widths and sizes together.

    Returns:
        Formats of all rows, int64 [R], and the solution over rows.
    """
    columns = _columns(problem)
    most = max(map(len, columns))
    sizes = torch.tensor([[*s, *[s[-1]] * (most - len(s))] for s in columns])[width]
    tensor = problem.tensor_of_row
    loss, cost = problem.loss.gather(1, sizes), problem.cost[tensor].gather(1, sizes)
    items = Items(loss, cost, tensor, torch.arange(len(tensor)))
    found = budget.solve(problem, items, solver)
    choice = sizes.gather(1, found.choice.unsqueeze(1)).squeeze(1)
    if budget.kl is None:
        return choice, certified(loss, cost, found.choice, bound, price)
    bound = min(bound, found.bytes)
    gap = (found.bytes - bound) / found.bytes if found.bytes else 0.0
    return choice, replace(found, bound=bound, gap=gap)


def price_of(solution: Solution, budget: Budget, problem: Problem) -> float:
    """Nats per token that a byte is worth there."""
    if budget.kl is None:
        return solution.price
    most = 1.0 + float(problem.loss.masked_fill(problem.loss.isinf(), 0).max())
    return min(most, 1 / solution.price) if solution.price else most


def may_fold(problem: Problem) -> bool:
    """Whether rows of some width have a choice of group sizes."""
    return len(_columns(problem)) < len(problem.formats)


def width_of(problem: Problem, choice: Tensor) -> Tensor:
    """int64 [R], columns of the folded problem from those of this one."""
    columns = _columns(problem)
    width = {i: w for w, sizes in enumerate(columns) for i in sizes}
    return torch.tensor([width[i] for i in range(len(problem.formats))])[choice]


def _columns(problem: Problem) -> list[list[int]]:
    """For every width the columns of its formats, small groups first."""
    found: dict[int, list[int]] = {}
    for i, fmt in enumerate(problem.formats):
        found.setdefault(fmt.bits, []).append(i)
    return list(found.values())
