"""Score every output feature in every candidate format on the graph's own example inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import OptionError
from ..formats.row_format import RowFormat
from ..ir.graph import MixGraph
from ..salience.probes import gradient_stops, loss_inputs, probes_of
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
        if kind != "weight-error":
            kind = self._gradient_score(graph, ctx, kind, formats)
        if kind == "weight-error":
            for matrix in matrices:
                matrix.losses = weight_error(matrix.value(), formats).cpu()
        ctx.score_kind = kind
        for matrix in matrices:
            assert matrix.losses is not None
            changes.add(
                matrix.name, f"{kind}, {float(matrix.losses[:, 0].sum()):.3g} at the lowest width"
            )
        return changes

    def _gradient_score(
        self, graph: MixGraph, ctx: Context, kind: str, formats: tuple[RowFormat, ...]
    ) -> str:
        """Set `losses` from gradients, if the example inputs are good for it.

        Returns:
            The kind of score that the matrices (must) get.
        """
        where, tally = loss_inputs(graph), Tally(kind, formats)
        stops, forced = gradient_stops(graph), self.kind != "auto"
        tokens = supervised_tokens(graph.inputs, where)
        if not stops and (forced or tokens >= MIN_TOKENS):
            graph.refuse_released()
            for matrix in graph.active():
                matrix.checked()
            with torch.no_grad():
                profile(graph.module, graph.inputs, probes_of(graph), where, tally)
            # `generate` asks for the last logits only: few tokens of a long prompt have a loss.
            tokens = tally.tokens
        if stops or tally.tokens < (1 if forced else MIN_TOKENS):
            few = (
                f"the example inputs give a loss to {tokens} tokens, fewer than the {MIN_TOKENS} a "
                "gradient score needs"
            )
            ctx.score_note = (
                f"{stops or few}; rows were ranked by weight error. Score on text for a better "
                "plan: mixllm_compiler.compile(model, bits=…, data=…)"
            )
            return "weight-error"
        losses = tally.losses()
        for matrix in graph.active():
            # No gradient reached a matrix whose output nothing uses: any row may go low.
            matrix.losses = losses.get(matrix.name, torch.zeros(matrix.n, len(formats)))
        ctx.tokens, ctx.sequences = tally.tokens, tally.sequences
        return kind
