"""Plans that earlier graphs of the same weights were compiled with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import compat
from ..errors import GraphBreakError
from ..ir.graph import MixGraph
from ..runtime.weights import PLANS

if TYPE_CHECKING:
    from .context import Context


def look_up(graph: MixGraph, ctx: Context) -> None:
    """Take over the plan of an earlier graph: prefill, decode and recompiles must agree.

    Raises:
        GraphBreakError: this graph is one piece of a model that has no whole-model plan.
    """
    matrices = graph.active()
    if ctx.known is not None or not matrices:
        return
    digest = _digest(ctx)
    ctx.known = PLANS.find(digest, matrices)
    if ctx.known is not None:
        ctx.plan = ctx.known.plan
    elif ctx.plan is None and not ctx.options.partial:
        _refuse_second_piece(digest, graph)


def remember(graph: MixGraph, ctx: Context) -> None:
    """Keep the plan that was just put in force."""
    if ctx.known is None and ctx.plan is not None:
        broken = compat.break_reason(graph.module)
        PLANS.add(_digest(ctx), ctx.plan, graph.active(), graph.root, broken)


def _digest(ctx: Context) -> str:
    """Of what was asked for, and of what the pipeline did before planning."""
    return f"{ctx.options.planning_digest()} rotated {ctx.rotated}"


def _refuse_second_piece(digest: str, graph: MixGraph) -> None:
    before = PLANS.piece_before(digest, graph.root, graph.active())
    if before is None:
        return
    new = [m.name for m in graph.active() if m.name not in before.weights]
    where = before.broken or "the model was called in pieces"
    raise GraphBreakError(
        f"a graph break splits the model: {len(before.weights)} linears were planned in an earlier "
        f"piece, {len(new)} more came in this one (first {new[0]}). Bits must be planned over the "
        f"whole model.\n  broken by: {where}\n"
        "Remove the break; or score the whole model beforehand and compile with its plan "
        "(mixllm_compiler.compile(model, bits=…)); or accept one plan per piece with "
        "options={'partial': True}"
    )
