"""Scoring runs over a whole model: batches of tokens through the captured float graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import compat
from ..capture import capture
from ..errors import GraphBreakError, MixLLMError, UnsupportedModel
from ..formats.fingerprint import fingerprint
from ..formats.row_format import RowFormat
from ..frames import own_frame
from ..ir.graph import MixGraph
from ..options import Options
from ..salience.probes import gradient_stops, loss_inputs, probes_of
from ..salience.profiler import Tally, profile, weight_error
from ..salience.scores import Scores
from .annotate_linears import AnnotateLinears
from .canonicalize_linears import CanonicalizeLinears
from .context import Context
from .pipeline import Pipeline
from .rotate_inputs import RotateInputs


class ScoringRun:
    """Captures a model once (per shape) and adds up scores over the batches it is fed."""

    def __init__(self, options: Options, kind: str, seed: int = 0) -> None:
        self.options = options
        self.kind = kind
        self.seed = seed
        self.formats = tuple(RowFormat(b, options.group) for b in sorted(options.widths))
        self.tally = Tally(kind, self.formats)
        self.graph: MixGraph | None = None
        self._compiled: Callable[..., Any] | None = None
        self._extra: dict[str, Any] = {}

    def feed(self, model: nn.Module, ids: Tensor) -> None:
        """Score one batch of token ids [B, T].

        Raises:
            GraphBreakError: the model does not capture in one graph.
            UnsupportedModel: there is nothing to score, or part of it is quantized already.
        """
        if self._compiled is None:
            forward = getattr(model, "_mixllm_float_forward", model.forward)
            parameters = inspect.signature(forward).parameters
            self._extra = {"use_cache": False} if "use_cache" in parameters else {}
            self._compiled = torch.compile(
                own_frame(forward), backend=self._backend, fullgraph=True, dynamic=False
            )
        device = next(model.parameters()).device
        try:
            with torch.no_grad():
                self._compiled(ids.to(device), **self._extra)
        except torch._dynamo.exc.Unsupported as error:
            raise GraphBreakError(
                f"{type(model).__name__} does not capture in one graph, so its linears cannot be "
                f"scored together:\n{str(error).strip()}"
            ) from error
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, MixLLMError):
                raise error.inner_exception from None  # ours; Dynamo's wrapping says nothing more
            raise

    def _backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compat.self_test()
        graph = capture(gm, inputs)
        ctx = Context(self.options)
        Pipeline([CanonicalizeLinears(), AnnotateLinears(), RotateInputs()]).run(graph, ctx)
        if not graph.active():
            raise UnsupportedModel(no_linears(graph))
        graph.refuse_released()
        for matrix in graph.active():
            matrix.checked()
        self.graph = graph
        if self.kind == "weight-error":
            return gm
        if stops := gradient_stops(graph):
            raise UnsupportedModel(f"{stops}; score the float model, or use kind='weight-error'")
        probes, where = probes_of(graph), loss_inputs(graph)

        def run(*args: Any) -> Any:
            # Batches draw labels of their own. (The CPU's generator reads 32 bits of a seed.)
            seed = 100_003 * self.seed + self.tally.sequences
            return profile(gm, args, probes, where, self.tally, seed=seed)

        return run

    def scores(self, settings: Mapping[str, str]) -> Scores:
        """Everything fed so far, as scores."""
        assert self.graph is not None, "nothing was fed"
        matrices = self.graph.active()
        if self.kind == "weight-error":
            loss = {m.name: weight_error(m.value(), self.formats).cpu() for m in matrices}
        else:
            found = self.tally.losses()
            empty = {m.name: torch.zeros(m.n, len(self.formats)) for m in matrices}
            loss = empty | found
        return Scores(
            kind=self.kind,
            formats=self.formats,
            loss=loss,
            shapes={m.name: (m.n, m.k) for m in matrices},
            fingerprint=fingerprint({m.name: m.stored() for m in matrices}),
            tokens=self.tally.tokens,
            sequences=self.tally.sequences,
            settings={**settings, "loss": self.tally.loss, "rotate": str(self.options.rotate)},
            group=self.options.group,
        )


def no_linears(graph: MixGraph) -> str:
    """Why a captured model has nothing to quantize."""
    kept = [f"  {m.name}: {m.kept_float}" for m in graph.matrices.values()]
    if not kept:
        return "no linear with a constant weight was found in the captured graph"
    return "no linear can be quantized:\n" + "\n".join(kept[:8])
