"""Score every output feature in every candidate format on the graph's own example inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import OptionError
from ..formats.row_format import RowFormat
from ..ir.graph import MixGraph
from ..salience.probes import loss_inputs, probes_of
from ..salience.profiler import KINDS, Tally, profile, supervised_tokens, weight_error
from .base import Changes, Pass
from .known_plans import look_up

if TYPE_CHECKING:
    from .context import Context

MIN_TOKENS = 512  # fewer give a gradient score that ranks rows worse than their weight error


class AnnotateSalience(Pass):
    """Sets `Matrix.losses`; does nothing where a plan is known already."""

    name = "annotate-salience"
    stage = "plan"
    requires = {"annotated"}
    ensures = {"scored"}

    def __init__(self, kind: str = "auto") -> None:
        if kind not in ("auto", *KINDS):
            raise OptionError(f"unknown score {kind!r}; scores are auto, {', '.join(KINDS)}")
        self.kind = kind

    def run(self, graph: MixGraph, ctx: Context) -> Changes:
        changes = Changes()
        matrices = graph.active()
        look_up(graph, ctx)
        if ctx.plan is not None or ctx.known is not None or not matrices:
            return changes
        formats = tuple(RowFormat(b, ctx.options.group) for b in sorted(ctx.options.widths))
        kind = "paper" if ctx.options.preset == "paper" else "fisher-sequence"
        kind = self.kind if self.kind != "auto" else kind
        where = loss_inputs(graph)
        tokens = supervised_tokens(graph.inputs, where)
        if self.kind == "auto" and tokens < MIN_TOKENS:
            ctx.score_note = (
                f"the example inputs hold {tokens} tokens, fewer than the {MIN_TOKENS} a gradient "
                "score needs; rows were ranked by weight error. Score on text for a better plan: "
                "mixllm_compiler.compile(model, bits=…, data=…)"
            )
            kind = "weight-error"
        if kind == "weight-error":
            for matrix in matrices:
                matrix.losses = weight_error(matrix.value(), formats).cpu()
        else:
            tally = Tally(kind, formats)
            with torch.no_grad():
                profile(graph.module, graph.inputs, probes_of(graph), where, tally)
            losses = tally.losses()
            for matrix in matrices:
                # No gradient reached a matrix whose output nothing uses: any row may go low.
                matrix.losses = losses.get(matrix.name, torch.zeros(matrix.n, len(formats)))
            ctx.tokens, ctx.sequences = tally.tokens, tally.sequences
            ctx.score_note = ""
        ctx.score_kind = kind
        for matrix in matrices:
            assert matrix.losses is not None
            changes.add(
                matrix.name, f"{kind}, {float(matrix.losses[:, 0].sum()):.3g} at the lowest width"
            )
        return changes
