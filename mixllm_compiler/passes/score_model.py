"""Scores of a whole model: captured once, walked block by block over all batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import OptionError, UnsupportedModel
from ..formats.fingerprint import fingerprint
from ..options import Options
from ..salience.kinds import GRADIENT_KINDS, ScoreSpec, weight_error
from ..salience.probes import gradient_stops, siblings
from ..salience.replay import Found
from ..salience.resume import Checkpoint, data_digest
from ..salience.score_graph import score_graph
from ..salience.scores import Scores
from ..salience.supervision import check_tokens
from .captured_model import CapturedModel, capture_model, even_batch


def score_model(
    model: nn.Module,
    ids: Tensor,
    spec: ScoreSpec,
    options: Options,
    settings: Mapping[str, str],
    *,
    batch: int = 1,
    token_weights: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
    resume: Path | None = None,
) -> Scores:
    """Score every matrix of a model that will be quantized.

    Args:
        ids: token ids [S, T].
        settings: where the ids come from, for the record.
        batch: sequences at a time, at most; batches are of one size.
        token_weights: [S, T] of the loss of each token; its first is predicted by nothing.
        progress: called with (steps done, steps in all).
        resume: file that keeps what is done after every block; a run that finds one goes on there.

    Raises:
        GraphBreakError: the model does not capture in one graph.
        UnsupportedModel: there is nothing to score, part of it is quantized already, it is in
            float16, or its loss has no finite gradient.
        OptionError: too few tokens, weights that do not fit them, or a file of another run.
    """
    size = even_batch(len(ids), batch)
    batches = ids.split(size) if spec.kind != "weight-error" else ids[:1].split(1)
    captured = capture_model(model, batches, options)
    matrices = captured.graph.active()
    own = fingerprint({m.name: m.stored() for m in matrices})
    checkpoint = None
    if resume is not None:
        made = {
            "model": own.digest,
            "data": data_digest(ids, token_weights),
            "kind": f"{spec.kind}, labels {spec.labels}, seed {spec.seed}, clip {spec.clip}",
            "formats": ", ".join(map(str, spec.formats)),
            "rotate": str(options.rotate),
            "batch": str(size),
        }
        checkpoint = Checkpoint(resume, made)
    found = _found(captured, ids, spec, token_weights, progress, checkpoint)
    empty = {m.name: torch.zeros(m.n, len(spec.formats)) for m in matrices}
    settings = {**settings, "loss": found.loss, "rotate": str(captured.rotation)}
    if spec.kind in GRADIENT_KINDS:
        settings["labels"] = spec.labels
    return Scores(
        kind=spec.kind,
        formats=spec.formats,
        loss=empty | dict(found.losses),
        shapes={m.name: (m.n, m.k) for m in matrices},
        fingerprint=own,
        tokens=found.tokens,
        sequences=found.sequences,
        settings=settings,
        group=options.group,
        siblings=siblings(captured.graph),
        curvature={m.name: torch.zeros(m.n) for m in matrices} | dict(found.curvature)
        if found.curvature
        else {},
    )


def _found(
    captured: CapturedModel,
    ids: Tensor,
    spec: ScoreSpec,
    token_weights: Tensor | None,
    progress: Callable[[int, int], None] | None,
    checkpoint: Checkpoint | None,
) -> Found:
    graph = captured.graph
    if spec.kind == "weight-error":
        if checkpoint is not None:
            raise OptionError("scores of kind 'weight-error' cannot be resumed; leave out resume")
        losses = {}
        for i, matrix in enumerate(matrices := graph.active(), 1):
            losses[matrix.name] = weight_error(matrix.value(), spec.formats).cpu()
            if progress is not None:
                progress(i, len(matrices))
        return Found(losses, {}, 0, 0, "")
    stops = gradient_stops(graph) if spec.kind in GRADIENT_KINDS else ""
    if stops:
        raise UnsupportedModel(
            f"{stops}; score the float model in bfloat16 or float32, or without "
            "gradients (kind='zeroth-order', 'hessian' or 'weight-error')"
        )
    check_tokens(ids, token_weights)
    batches = [captured.inputs(i) for i in range(len(captured.batches))]
    return score_graph(graph, batches, spec, token_weights, progress, checkpoint)
