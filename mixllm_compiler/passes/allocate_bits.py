"""One global knapsack gives every output feature its width.

Inside the budget of true bytes the summed expected loss of all rows of all matrices is minimal
up to the plan's certificate (its gap to the linear-programming bound).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..allocation.allocate import make_plan
from ..allocation.plan import Plan
from ..errors import PlanMismatch
from ..formats.fingerprint import fingerprint
from ..ir.graph import MixGraph, Rows
from ..options import DEFAULT_BITS, Options
from ..salience.probes import siblings
from ..salience.scores import Scores
from .base import Changes, Pass
from .known_plans import look_up, remember

if TYPE_CHECKING:
    from .context import Context


class AllocateBits(Pass):
    name = "allocate-bits"
    stage = "plan"
    requires = {"scored"}
    ensures = {"planned"}

    def run(self, graph: MixGraph, ctx: Context) -> Changes:
        changes = Changes()
        matrices = graph.active()
        if not matrices:
            return changes
        look_up(graph, ctx)
        if ctx.known is not None:
            ctx.plan = ctx.known.plan
            rows = ctx.known.rows
        elif ctx.plan is not None:
            rows = rows_from(ctx.plan, graph)
        else:
            ctx.plan = plan_graph(graph, ctx)
            rows = {name: (site.widths, site.spans) for name, site in ctx.plan.sites.items()}
        for matrix in matrices:
            matrix.widths, matrix.spans = rows[matrix.name]
            counts = torch.bincount(matrix.widths.long()).tolist()
            mix = " ".join(f"w{b}:{n}" for b, n in enumerate(counts) if n)
            changes.add(matrix.name, mix)
        remember(graph, ctx)
        return changes


def plan_graph(graph: MixGraph, ctx: Context) -> Plan:
    """Plan all matrices of one graph from the scores that passes left on them."""
    matrices = graph.active()
    options = ctx.options
    scores = Scores(
        kind=ctx.score_kind,
        formats=options.formats,
        loss={m.name: m.losses for m in matrices if m.losses is not None},
        shapes={m.name: (m.n, m.k) for m in matrices},
        fingerprint=fingerprint({m.name: m.stored() for m in matrices}),
        tokens=ctx.tokens,
        sequences=ctx.sequences,
        settings={"rotate": str(ctx.rotated)},
        group=options.group,
        siblings=siblings(graph),
    )
    return make_plan(scores, **plan_arguments(options))


def plan_arguments(options: Options) -> dict[str, Any]:
    """What `make_plan` is asked for by these options."""
    bits = options.bits
    if bits is None and options.preset == "best":
        bits = DEFAULT_BITS
    return {
        "bits": bits,
        "preset": options.preset,
        "widths": options.widths,
        "pins": options.pins,
        "tile": options.tile,
        "window": options.window,
        "siblings": options.siblings,
        "tp": options.tp,
        "formats_per_layer": options.formats_per_layer,
    }


def rows_from(plan: Plan, graph: MixGraph) -> dict[str, Rows]:
    """Widths and spans of this graph's matrices from a plan of the whole model (or of this graph).

    Raises:
        PlanMismatch: the plan was made for another model.
    """
    own = fingerprint({m.name: m.stored() for m in graph.active()})
    names = plan.match(own, subset=True)
    rows: dict[str, Rows] = {}
    for name, planned in names.items():
        if planned not in plan.sites:
            raise PlanMismatch(f"the plan keeps {planned} float; exclude it here as well")
        rows[name] = plan.sites[planned].widths, plan.sites[planned].spans
    return rows
