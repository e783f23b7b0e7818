"""What passes share besides the graph: options, target, the model's plan, the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import OptionError
from ..lowering.target import Target
from ..options import Options
from .base import Changes

if TYPE_CHECKING:
    from ..allocation.plan import Plan
    from ..runtime.weights import PlannedModel


@dataclass
class Record:
    """One pass that ran: its name, stage, what it did, and how long it took."""

    name: str
    stage: str
    changes: Changes
    seconds: float = 0.0


@dataclass
class Context:
    """Shared state of one run of a pipeline.

    Attributes:
        options: what the user asked for.
        target: where the kernels will run.
        plan: the allocation in force, once known.
        known: rows planned by an earlier graph of the same weights, or None.
        rotated: Hadamard block that linears' inputs were given, 0 if they stayed as they are.
        score_kind: how features were scored, for the report.
        tokens: supervised tokens that scoring saw.
        records: passes run so far.
    """

    options: Options
    target: Target = field(default_factory=lambda: Target("cpu"))
    plan: Plan | None = None
    known: PlannedModel | None = None
    rotated: int = 0
    score_kind: str = ""
    score_note: str = ""
    tokens: int = 0
    sequences: int = 0
    records: list[Record] = field(default_factory=list)

    @property
    def activation_mode(self) -> str:
        """The plan's; without one per token where inputs are rotated, which makes one scale enough,
        else per group.
        """
        if self.plan is not None:
            return self.plan.activation_mode
        return "token" if self.rotated else "group"

    @property
    def rotation(self) -> int:
        """Hadamard block to rotate by: the plan's, whatever the options say."""
        return self.plan.rotation if self.plan is not None else self.options.rotate

    @property
    def group(self) -> int:
        """Group size along K: the plan's, whatever the options say.

        Raises:
            OptionError: the plan has several.
        """
        return self._one_of("group")

    @property
    def family(self) -> str:
        """Format family: the plan's, whatever the options say.

        Raises:
            OptionError: the plan has several.
        """
        return self._one_of("family")

    def _one_of(self, field: str) -> Any:
        found = {getattr(s, field) for s in self.plan.sites.values()} if self.plan else set()
        if len(found) > 1:
            raise OptionError(f"a plan has one format {field}, not {sorted(found)}")
        return found.pop() if found else getattr(self.options, field)
