"""One format for each row within a number of bytes: the multiple-choice knapsack.

Every row (or tile of rows, or whole matrix: whatever is chosen for as one) offers (bytes, loss)
points. Only points on the lower convex hull of a row can be worth
their bytes, and along a hull each step up saves less loss per byte than the step before. Taking
the best steps of all rows until the bytes run out solves the linear relaxation, up to the one
step that no longer fits; single steps that still fit then spend what is left.

How good the answer is does not depend on any of this: for every price λ ≥ 0 of a byte,
Σ_r min_f (loss + λ·bytes) − λ·budget is at most the loss of any allocation within the budget.

The other question, the fewest bytes within a loss, is the same problem with loss and bytes
exchanged, and is answered by the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import BudgetError

_CHUNK = 1 << 17  # rows that are worked on at a time: their columns stay in the cache
_SORT = 1 << 18  # steps that are sorted; of more, the clear cases are decided first
_PIVOTS = 1024  # steps that a pivot is the median of
_REFILL = 4096  # steps tried one by one in a round of spending what is left
_CORE = 96  # steps around the break that are chosen exactly
_SLOTS = 1 << 17  # numbers of bytes that this tells apart
_LOSS_UNITS = 1 << 50  # whole numbers that stand for losses, exact as float64


@dataclass(frozen=True)
class Solution:
    """An allocation and how far from the best it can be.

    Attributes:
        choice: int64 [R], index of the format of every row.
        objective: total loss of the choice.
        bytes: total bytes of the choice, at most the budget.
        bound: no allocation within the budget has a loss below it (to rounding, 1e-12 relative);
            of `cheapest`: no allocation within the loss takes fewer bytes.
        gap: (objective − bound) / objective, of `cheapest` (bytes − bound) / bytes; 0 for 0.
        price: λ of the bound, what another byte would save (`cheapest`: what another unit of
            loss would).
    """

    choice: Tensor
    objective: float
    bytes: int
    bound: float
    gap: float
    price: float


Solver = Callable[[Tensor, Tensor, int], Solution]
"""(loss [R, F], cost [R, F], budget) → allocation: `knapsack`, or one with further rules."""


def knapsack(loss: Tensor, cost: Tensor, budget: int, *, fill: bool = False) -> Solution:
    """Choose one format per row with Σ bytes ≤ budget and, nearly, the least Σ loss.

    Equal inputs give equal choices; among equally good steps the lower one of a row and then
    the earlier row goes first.

    Args:
        loss: float [R, F], at least 0; infinite where a row must not have a format.
        cost: int64 [R, F] bytes, at least 0.
        budget: bytes for all rows.
        fill: spend left-over bytes on larger formats that do not lower the loss, too.

    Raises:
        BudgetError: even the smallest formats take more than the budget.
        ValueError: shapes differ, a loss is NaN or negative, a cost is negative, or a row has
            no allowed format.
    """
    loss, cost = _checked(loss, cost)
    least, most = limits(loss, cost)
    if budget < least:
        raise BudgetError(
            f"a budget of {budget:,} bytes cannot be met: the rows take from {least:,} to "
            f"{most:,} bytes"
        )
    steps = _steps(loss, cost, fill)
    levels, price = _take(steps, budget - least)
    spent = _picked(cost, _formats(steps, levels)).sum()
    _polish(steps, levels, price, budget - int(spent))
    choice = _formats(steps, levels)
    _refill(loss, cost, choice, budget - int(_picked(cost, choice).sum()))
    return certified(loss, cost, choice, lower_bound(loss, cost, budget, price), price)


def certified(loss: Tensor, cost: Tensor, choice: Tensor, bound: float, price: float) -> Solution:
    """The solution that `choice` is, with the gap to a bound on the loss."""
    objective = float(_picked(loss, choice).sum())
    # Rounding can lift a tight bound above the objective by a few units in the last place.
    bound = min(bound, objective)
    gap = (objective - bound) / objective if objective > 0 else 0.0
    return Solution(choice, objective, int(_picked(cost, choice).sum()), bound, gap, price)


def cheapest(loss: Tensor, cost: Tensor, target: float, solver: Solver = knapsack) -> Solution:
    """Choose one format per row with Σ loss ≤ target and, nearly, the fewest bytes.

    Losses are rounded up to whole multiples of target · 2⁻⁵⁰ (of target · R · 2⁻⁶² if that is
    more), so the target holds; bytes take the place of the loss.

    Args:
        loss, cost: as for `knapsack`.
        target: for all rows, at least 0.
        solver: answers the exchanged problem.

    Raises:
        BudgetError: even the best formats lose more than the target.
        ValueError: as for `knapsack`.
    """
    loss, cost = _checked(loss, cost)
    best = float(loss.amin(1).sum())
    if best > target:
        raise BudgetError(f"a loss of {target:.4g} cannot be met: the rows lose {best:.4g} or more")
    units = min(_LOSS_UNITS, (1 << 62) // max(1, len(loss)))
    unit = target / units or 1.0
    # What loses more than the target alone is no choice, nor would a sum of it stay in int64.
    far = loss > target
    rounded = (loss.masked_fill(far, 0) / unit).ceil().long()
    # Rounding up must not refuse a target that the best formats meet just so.
    room = max(units, int(rounded.masked_fill(far, units).amin(1).sum()))
    swapped = solver(cost.double().masked_fill(far, math.inf), rounded, room)
    bytes_ = int(swapped.objective)
    # Without the rounding every row would be cheaper by at most one unit.
    bound = min(max(swapped.bound - swapped.price * (len(loss) + units - room), 0.0), bytes_)
    gap = (bytes_ - bound) / bytes_ if bytes_ else 0.0
    objective = float(_picked(loss, swapped.choice).sum())
    return Solution(swapped.choice, objective, bytes_, bound, gap, swapped.price / unit)


def limits(loss: Tensor, cost: Tensor) -> tuple[int, int]:
    """Fewest and most bytes that all rows can take with the formats that are allowed."""
    free = loss.isfinite()
    top = torch.iinfo(cost.dtype).max
    return (
        int(cost.masked_fill(~free, top).amin(1).sum()) if len(cost) else 0,
        int(cost.masked_fill(~free, -1).amax(1).sum()) if len(cost) else 0,
    )


def lower_bound(loss: Tensor, cost: Tensor, budget: float, price: float) -> float:
    """What no allocation within `budget` can go below, for any `price` ≥ 0 of a byte."""
    parts = [
        float((loss[rows].double() + price * cost[rows].double()).amin(1).sum())
        for rows in _chunks(loss)
    ]
    return math.fsum([*parts, -price * budget])


@dataclass(frozen=True)
class _Steps:
    """The steps along the hull of each row; L = F − 1, fewer are padded with worth −1.

    Attributes:
        formats: uint8 [L + 1, R], the format before the first and after each step.
        worth: float64 [L, R], loss saved per byte, never rising along a row's steps.
        extra: int64 [L, R], bytes a step adds.
    """

    formats: Tensor
    worth: Tensor
    extra: Tensor


def _steps(loss: Tensor, cost: Tensor, fill: bool) -> _Steps:
    r, f = loss.shape
    formats = torch.zeros(f, r, dtype=torch.uint8)
    worth = torch.full((f - 1, r), -1.0, dtype=torch.float64)
    extra = torch.zeros(f - 1, r, dtype=torch.int64)
    for rows in _chunks(loss):
        _walk(
            loss[rows].t().contiguous(),
            cost[rows].t().contiguous().double(),
            fill,
            formats[:, rows],
            worth[:, rows],
            extra[:, rows],
        )
    return _Steps(formats, worth, extra)


def _walk(
    loss: Tensor, cost: Tensor, fill: bool, formats: Tensor, worth: Tensor, extra: Tensor
) -> None:
    """Fill the steps of some rows from their points loss, cost float64 [F, r]."""
    count = loss.shape[0]
    # Start at the smallest format, and among equally small ones at the best.
    here_cost = torch.where(loss.isfinite(), cost, math.inf).amin(0)
    here_loss = torch.where(cost == here_cost, loss, math.inf).amin(0)
    for f in reversed(range(count)):
        at = (cost[f] == here_cost) & (loss[f] == here_loss)
        formats[0].masked_fill_(at, f)
    limit = torch.full_like(here_loss, math.inf)
    for step in range(count - 1):
        best = torch.full_like(here_loss, -1.0)
        to_cost, to_loss, to = here_cost.clone(), here_loss.clone(), formats[step].clone()
        for f in range(count):
            more, gain = cost[f] - here_cost, here_loss - loss[f]
            allowed = (more > 0) & ((gain >= 0) if fill else (gain > 0))
            value = torch.where(allowed, gain / more, -1.0)
            # Of formats on one line the smallest comes first: finer steps use the bytes better.
            better = (value > best) | (allowed & (value == best) & (cost[f] < to_cost))
            best = torch.where(better, value, best)
            to_cost = torch.where(better, cost[f], to_cost)
            to_loss = torch.where(better, loss[f], to_loss)
            to.masked_fill_(better, f)
        if not bool((best >= 0).any()):
            formats[step + 1 :] = formats[step]
            break
        # Along a hull the worth falls; rounding must not lift a step above the one before it.
        limit = torch.minimum(best, limit)
        worth[step], formats[step + 1] = limit, to
        extra[step] = (to_cost - here_cost).long()
        here_cost, here_loss = to_cost, to_loss


def _take(steps: _Steps, room: int) -> tuple[Tensor, float]:
    """Steps taken per row, int64 [R], and the worth of the first step that does not fit."""
    r = steps.worth.shape[1]
    levels = torch.zeros(r, dtype=torch.int64)
    # Flattened step by step, not row by row: a stable sort then takes steps of one row in
    # order, and equally good steps evenly over rows.
    worth, extra = steps.worth.flatten(), steps.extra.flatten()
    at = (worth >= 0).nonzero().squeeze(1)
    worth, extra = worth[at], extra[at]
    # Halve until little is left to sort. A half that fits is taken whole; the other half is then
    # too large for what is left, so the first step that does not fit is always among the rest.
    while len(at) > _SORT:
        better = worth > worth[:: max(1, len(at) // _PIVOTS)].median()
        size = int(extra[better].sum())
        fits = size <= room
        if fits:
            room -= size
            levels += torch.bincount(at[better] % r, minlength=r)
        rest = ~better if fits else better
        if bool(rest.all()):  # as good as the best, many times over
            break
        at, worth, extra = at[rest], worth[rest], extra[rest]
    worth, order = worth.sort(descending=True, stable=True)
    at, total = at[order], extra[order].cumsum(0)
    taken = int(torch.searchsorted(total, room, right=True)) if len(total) else 0
    levels += torch.bincount(at[:taken] % max(r, 1), minlength=r)
    return levels, float(worth[taken]) if taken < len(worth) else 0.0


def _polish(steps: _Steps, levels: Tensor, price: float, left: int) -> None:
    """Choose the steps nearest to the break best, in place: a 0/1 knapsack over that core.

    Taking steps by worth leaves bytes over that the next step is too large for. Which steps of
    nearly the same worth fill them best is a small dynamic programme; all far from the break
    are taken, or left, in any good solution.

    Args:
        levels: int64 [R] steps taken per row.
        price: worth of the first step that did not fit.
        left: bytes not spent yet.
    """
    last = len(steps.worth) - 1
    if last < 0:
        return
    # Of each row the step taken last, which can be undone, or the next one, whichever is nearer.
    down, up = (levels - 1).clamp_min(0), levels.clamp_max(last)
    far = _distance(steps, down, levels > 0, price), _distance(steps, up, levels <= last, price)
    undo, distance = far[0] <= far[1], torch.minimum(*far)
    core = distance.topk(min(_CORE, len(levels)), largest=False).indices.sort().values
    core = core[distance[core].isfinite()]
    step = torch.where(undo[core], down[core], up[core])
    size = steps.extra[step, core]
    gains = steps.worth[step, core] * size
    room = left + int(size[undo[core]].sum())
    picked = torch.tensor(_zero_one(size.tolist(), gains.tolist(), room), dtype=torch.int64)
    # Sizes in few slots are rounded up, so that what was taken already may be the best.
    if float((gains * picked).sum()) >= float(gains[undo[core]].sum()):
        levels[core] = step + picked


def _distance(steps: _Steps, step: Tensor, possible: Tensor, price: float) -> Tensor:
    """How far the worth of one step of each row is from the price; infinite if it has none."""
    worth = steps.worth.gather(0, step.unsqueeze(0)).squeeze(0)
    return (worth - price).abs().masked_fill_(~possible | (worth < 0), math.inf)


def _zero_one(sizes: list[int], gains: list[float], room: int) -> list[int]:
    """The 0/1 knapsack by dynamic programming over bytes: 1 for what is taken.

    Exact if the room has at most `_SLOTS` multiples of the sizes' common divisor; else sizes are
    rounded up to a multiple of room / `_SLOTS`.
    """
    room = min(room, sum(sizes))
    unit = math.gcd(*sizes) if sizes else 1
    unit = max(unit, -(-room // _SLOTS))
    slots = room // unit
    best = np.zeros(slots + 1)
    take = np.zeros((len(sizes), slots + 1), dtype=bool)
    for i, (size, gain) in enumerate(zip(sizes, gains, strict=True)):
        s = -(-size // unit)
        if s > slots:
            continue
        with_it = best[: slots + 1 - s] + gain
        take[i, s:] = with_it >= best[s:]  # equally good: left-over bytes are worth nothing
        best[s:] = np.maximum(best[s:], with_it)
    picked, left = [0] * len(sizes), slots
    for i in reversed(range(len(sizes))):
        if take[i, left]:
            picked[i], left = 1, left - -(-sizes[i] // unit)
    return picked


def _refill(loss: Tensor, cost: Tensor, choice: Tensor, room: int) -> None:
    """Spend `room` bytes on the single steps that are worth most, in place."""
    while room > 0:
        worth, target, more = _best_single(loss, cost, choice, room)
        order = worth.sort(descending=True, stable=True).indices[:_REFILL]
        order = order[worth[order] > 0]
        if not len(order):
            return
        for row, to, size in zip(
            order.tolist(), target[order].tolist(), more[order].tolist(), strict=True
        ):
            if size <= room:
                choice[row] = to
                room -= size


def _best_single(
    loss: Tensor, cost: Tensor, choice: Tensor, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Per row, the change of format that fits and saves most per byte.

    Returns:
        Its worth (0 if there is none), the format, the bytes it adds.
    """
    worth = torch.zeros(len(loss), dtype=torch.float64)
    target, more = choice.clone(), torch.zeros(len(loss), dtype=torch.int64)
    for rows in _chunks(loss):
        here = choice[rows].unsqueeze(1)
        extra = cost[rows] - cost[rows].gather(1, here)
        gain = loss[rows].gather(1, here) - loss[rows]
        # A format that is better and no larger is worth taking before any other.
        value = torch.where(extra > 0, gain / extra, math.inf)
        value = torch.where((gain > 0) & (extra <= room), value, 0.0)
        worth[rows], target[rows] = value.max(1)
        more[rows] = extra.gather(1, target[rows].unsqueeze(1)).squeeze(1)
    return worth, target, more


def _checked(loss: Tensor, cost: Tensor) -> tuple[Tensor, Tensor]:
    if loss.ndim != 2 or loss.shape != cost.shape or not loss.shape[1]:
        raise ValueError(f"loss {list(loss.shape)} and cost {list(cost.shape)} must both be [R, F]")
    loss, cost = loss.detach().cpu().double(), cost.detach().cpu().long()
    if bool((~(loss >= 0)).any()):
        row = int((~(loss >= 0)).any(1).nonzero()[0])
        raise ValueError(f"row {row} has a loss that is NaN or negative: {loss[row].tolist()}")
    if bool((cost < 0).any()):
        raise ValueError("a row has a negative number of bytes")
    stuck = loss.isinf().all(1)
    if bool(stuck.any()):
        raise ValueError(f"row {int(stuck.nonzero()[0])} has no allowed format")
    return loss, cost


def _formats(steps: _Steps, levels: Tensor) -> Tensor:
    """int64 [R] formats after so many steps."""
    return steps.formats.gather(0, levels.unsqueeze(0)).squeeze(0).long()


def _picked(values: Tensor, choice: Tensor) -> Tensor:
    return values.gather(1, choice.unsqueeze(1)).squeeze(1)


def _chunks(rows: Tensor) -> Iterator[slice]:
    for start in range(0, len(rows), _CHUNK):
        yield slice(start, start + _CHUNK)
