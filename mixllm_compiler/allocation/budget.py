"""What a plan may take: true bits, bytes, or loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import BudgetError, OptionError
from .knapsack import Solution, Solver, cheapest, limits, lower_bound
from .problem import Problem
from .tiles import Items


@dataclass(frozen=True)
class Budget:
    """At most one of three limits, as the user gave it.

    Attributes:
        bits: true bits per quantized weight.
        bytes: of all quantized matrices.
        kl: predicted KL in nats per token; the plan is the smallest that meets it.
        constant, floor: predicted KL = constant · predicted loss + floor.
    """

    bits: float | None = None
    bytes: int | None = None
    kl: float | None = None
    constant: float = 1.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        given = [name for name in ("bits", "bytes", "kl") if getattr(self, name) is not None]
        if len(given) > 1:
            raise OptionError(f"give the budget as {' or as '.join(given)}, not both")
        for name in ("bits", "kl"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise BudgetError(f"{name} = {value} is no budget")
        if not (math.isfinite(self.constant) and self.constant > 0 and 0 <= self.floor < math.inf):
            raise OptionError(
                f"constant = {self.constant} and floor = {self.floor} predict no KL; the constant "
                "is above 0 and the floor at least 0"
            )

    @property
    def given(self) -> bool:
        return self.bits is not None or self.bytes is not None or self.kl is not None

    def __str__(self) -> str:
        if self.bits is not None:
            return (
                f"{self.bits:.2f} bits"
                if round(self.bits, 2) == self.bits
                else f"{self.bits:g} bits"
            )
        if self.bytes is not None:
            return f"{self.bytes:,} bytes"
        return f"KL {self.kl:g}" if self.kl is not None else ""

    def in_bytes(self, problem: Problem, items: Items) -> int:
        """Bytes for all items, what is there whatever is chosen taken off.

        Raises:
            BudgetError: no plan is that small.
        """
        weights = problem.weights
        if self.bits is not None:
            size = int(self.bits * weights / 8)
            # Asking for the true bits of another plan must not lose its last byte to rounding.
            size += 8 * (size + 1) / weights <= self.bits
        else:
            assert self.bytes is not None
            size = self.bytes
        fixed = problem.fixed_bytes
        least, most = (part + fixed for part in limits(items.loss, items.cost))
        if size < least:
            raise BudgetError(
                f"{8 * size / weights:.3f} true bits ({size:,} bytes) cannot be met: the "
                f"{len(problem.tensors)} matrices take from {8 * least / weights:.3f} bits "
                f"({least:,} bytes) to {8 * most / weights:.3f} bits ({most:,} bytes) in the "
                "widths they may have, scales and zero points included. Raise the budget or allow "
                "smaller widths."
            )
        return size - fixed

    def in_loss(self, items: Items) -> float:
        """The predicted loss that the KL allows, nats per token.

        Raises:
            BudgetError: no plan loses so little.
        """
        assert self.kl is not None
        # Asking for the KL of another plan must not lose it to rounding.
        target = (self.kl * (1 + 1e-12) - self.floor) / self.constant
        least = float(items.loss.amin(1).sum())
        if target < least:
            smallest = items.cost.masked_fill(items.loss.isinf(), items.cost.max() + 1).argmin(1)
            most = float(items.loss.gather(1, smallest.unsqueeze(1)).sum())
            low, high = (self.constant * loss + self.floor for loss in (least, most))
            raise BudgetError(
                f"a predicted KL of {self.kl:g} cannot be met: plans reach from {low:.4g} nats per "
                f"token in the best widths to {high:.4g} in the smallest. Raise the target or "
                "allow larger widths."
            )
        return target

    def solve(self, problem: Problem, items: Items, solver: Solver) -> Solution:
        """The formats of all items within this budget.

        Raises:
            BudgetError: no plan meets it.
        """
        if self.kl is not None:
            return cheapest(items.loss, items.cost, self.in_loss(items), solver)
        return solver(items.loss, items.cost, self.in_bytes(problem, items))

    def bound(self, problem: Problem, items: Items, price: float) -> float:
        """What no allocation within the budget can go below, at any price of a byte above 0."""
        if self.kl is None:
            return lower_bound(items.loss, items.cost, self.in_bytes(problem, items), price)
        target = self.in_loss(items)
        return max(0.0, lower_bound(items.cost, items.loss, target, 1 / price) if price else 0.0)
