"""Score every output feature in every candidate format on the graph's own example inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..errors import OptionError
from ..formats.row_format import RowFormat
from ..ir.graph import MixGraph
from ..salience.kinds import GRADIENT_KINDS, ScoreSpec, weight_error
from ..salience.probes import gradient_stops, loss_inputs
from ..salience.score_graph import score_graph
from ..salience.supervision import supervised_tokens
from .base import Changes, Pass
from .known_plans import look_up

if TYPE_CHECKING:
    from .context import Context

MIN_TOKENS = 512  # fewer give a gradient score that ranks rows worse than their weight error


PASS_KINDS = ("auto", *GRADIENT_KINDS, "weight-error")


class AnnotateSalience(Pass):
    """Sets `Matrix.losses`; does nothing where a plan is known already."""

    name = "annotate-salience"
    stage = "plan"
    requires = {"annotated"}
    ensures = {"scored"}

    def __init__(self, kind: str = "auto") -> None:
        if kind not in PASS_KINDS:
            raise OptionError(f"unknown score {kind!r}; scores are {', '.join(PASS_KINDS)}")
        self.kind = kind

    def run(self, graph: MixGraph, ctx: Context) -> Changes:
        changes = Changes()
        matrices = graph.active()
        look_up(graph, ctx)
        if ctx.plan is not None or ctx.known is not None or not matrices:
            return changes
        formats = ctx.options.formats
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
        stops, forced = gradient_stops(graph), self.kind != "auto"
        inputs = dict(zip(graph.placeholders(), graph.inputs, strict=True))
        tokens = supervised_tokens(inputs, loss_inputs(graph))
        needed = 1 if forced else MIN_TOKENS
        if not stops and (forced or tokens >= needed):
            graph.refuse_released()
            for matrix in graph.active():
                matrix.checked()
            # Of the loss the text is known, where the logits cover it, and it costs one batch.
            spec = ScoreSpec(kind, formats, labels="text", budget=None)
            found = score_graph(graph, [inputs], spec)
            # `generate` asks for the last logits only: few tokens of a long prompt have a loss.
            tokens = found.tokens
            if tokens >= needed:
                for matrix in graph.active():
                    # No gradient reached a matrix whose output nothing uses: any row may go low.
                    empty = torch.zeros(matrix.n, len(formats))
                    matrix.losses = found.losses.get(matrix.name, empty)
                ctx.tokens, ctx.sequences = found.tokens, found.sequences
                return kind
        few = (
            f"the example inputs give a loss to {tokens} tokens, fewer than the {MIN_TOKENS} a "
            "gradient score needs"
        )
        ctx.score_note = (
            f"{stops or few}; rows were ranked by weight error. Score on text for a better "
            "plan: mixllm_compiler.compile(model, bits=…, data=…)"
        )
        return "weight-error"
