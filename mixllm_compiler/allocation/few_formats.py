"""The knapsack with at most so many different formats in a group of items: a kernel's switch.

A Lagrangian relaxation: at a price λ of a byte, each group takes the set of formats in which its
Σ min (loss + λ·bytes) is least. The smallest price at which that meets the budget (bisection)
decides the sets, and the knapsack then chooses within them. The sets that are best at a slightly
lower price, if the budget holds them too, are the other candidate.

No allocation that keeps the rule and the budget loses less than Σ_groups min_sets Σ_items
min (loss + λ·bytes) − λ·budget: the certificate's bound. It is at least that of the knapsack
without the rule. What the heuristic gives up is what the gap says: little where groups are many,
while of a few groups one may keep a set that leaves bytes over.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..errors import BudgetError, OptionError
from .knapsack import Solution, certified, knapsack, limits

_BISECTIONS = 20


def few_formats(
    loss: Tensor, cost: Tensor, budget: int, *, group: Tensor, limit: int, fill: bool = False
) -> Solution:
    """Choose as `knapsack` does, but at most `limit` different formats in each group.

    Args:
        loss, cost, budget, fill: as for `knapsack`.
        group: int64 [R], number of the group of each row, from 0 on.
        limit: at least 1.

    Raises:
        BudgetError: the smallest formats that keep the rule take more than the budget.
        OptionError: the rows of a group have no `limit` formats that all of them may be in.
    """
    free = knapsack(loss, cost, budget, fill=fill)
    if limit >= int(loss.isfinite().any(0).sum()):
        return free
    sets = _Sets(loss.double(), cost.long(), group, limit)
    low = high = sets.at(free.price)
    top, factor = _top_price(loss), 2.0
    while high.bytes > budget:
        if high.price >= top:
            raise BudgetError(
                f"{limit} formats a group take {high.bytes:,} bytes at least, the budget is "
                f"{budget:,}"
            )
        low, high = high, sets.at(min(top, max(factor * high.price, 1e-12 * top)))
        factor *= factor
    if high is low and high.price > 0:
        low = sets.at(0.0)
    for _ in range(_BISECTIONS if low.bytes > budget else 0):
        middle = sets.at(math.sqrt(low.price * high.price) if low.price else high.price / 4)
        low, high = (low, middle) if middle.bytes <= budget else (middle, high)
    if low.bytes <= budget:  # as much as helps fits
        high = low
    found = []
    for point in (high, low):
        allowed = loss.masked_fill(~sets.allowed(point), math.inf)
        if limits(allowed, cost)[0] <= budget:
            found.append(knapsack(allowed, cost, budget, fill=fill))
    best = min(found, key=lambda solution: solution.objective)
    # Each of these is a bound; at which price the best one lies is known to rounding only.
    bound = max(free.bound, *(point.total - point.price * budget for point in (low, high)))
    return certified(loss, cost, best.choice, bound, high.price)


def _top_price(loss: Tensor) -> float:
    """A price of a byte that no saving of loss is worth."""
    return 1.0 + float(loss.masked_fill(loss.isinf(), 0).amax(1).sum())


class _Point:
    """The best sets at one price.

    Attributes:
        price: λ of a byte.
        sets: int64 [G], index of the set that each group takes.
        total: Σ min (loss + λ·bytes) within them.
        bytes: of the formats that this takes.
    """

    def __init__(self, price: float, sets: Tensor, total: float, bytes: int) -> None:
        self.price, self.sets, self.total, self.bytes = price, sets, total, bytes


class _Sets:
    """All sets of `limit` formats."""

    def __init__(self, loss: Tensor, cost: Tensor, group: Tensor, limit: int) -> None:
        self.loss, self.cost, self.group = loss, cost, group
        used = loss.isfinite().any(0).nonzero().flatten().tolist()
        self.members = [list(s) for s in itertools.combinations(used, limit)]
        self.masks = torch.zeros(len(self.members), loss.shape[1], dtype=torch.bool)
        for i, members in enumerate(self.members):
            self.masks[i, members] = True
        self.groups = int(group.max()) + 1 if len(group) else 0

    def at(self, price: float) -> _Point:
        """Every group's best set at this price."""
        value = self.loss + price * self.cost
        sums = torch.zeros(len(self.members), self.groups, dtype=torch.float64)
        for i, members in enumerate(self.members):
            sums[i].index_add_(0, self.group, value[:, members].amin(1))
        total, sets = sums.min(0)
        if bool(total.isinf().any()):
            rows = int((self.group == int(total.isinf().nonzero()[0])).sum())
            raise OptionError(
                f"no {len(self.members[0])} formats fit all of {rows} rows that have infinite "
                "scores in some; allow more formats per layer, or other widths"
            )
        value.masked_fill_(~self.masks[sets][self.group], math.inf)
        best = value.argmin(1, keepdim=True)
        return _Point(price, sets, float(total.sum()), int(self.cost.gather(1, best).sum()))

    def allowed(self, point: _Point) -> Tensor:
        """bool [R, F]: the formats that each row may have."""
        return self.masks[point.sets][self.group]
