"""Scores of a captured graph: the one function that all doors call."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import compat
from ..errors import OptionError
from ..ir.graph import MixGraph
from .forward_only import ForwardOnly
from .kinds import GRADIENT_KINDS, ScoreSpec
from .replay import Found, Progress, Replay, Values
from .resume import Checkpoint


def score_graph(
    graph: MixGraph,
    batches: Sequence[Values],
    spec: ScoreSpec,
    token_weights: Tensor | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Found:
    """Scores of every matrix that will be quantized; works under no_grad and inference_mode.

    The loss is cross-entropy to drawn labels or to the text's next tokens, or a random projection
    of the floating-point outputs where there are no logits.

    Args:
        batches: values of all placeholders, per batch.
        spec: of any kind but weight-error.
        token_weights: [S, T] of all batches; see `supervise`.
        progress: called with (batches of segments done, in all).
        checkpoint: where to keep what is done, and to find what was; the graph is then cut between
            all blocks.

    Raises:
        UnsupportedModel: logits or gradients that are not finite.
        OptionError: the checkpoint is of another run, or this kind has no gradients.
    """
    if checkpoint is not None:
        if spec.kind not in GRADIENT_KINDS:
            raise OptionError(f"scores of kind {spec.kind!r} cannot be resumed; leave out resume")
        spec = dataclasses.replace(spec, budget=1)
    run = ForwardOnly if spec.kind == "zeroth-order" else Replay
    with torch.inference_mode(False), compat.fast_products():
        return run(graph, batches, spec, token_weights, progress, checkpoint).run()
