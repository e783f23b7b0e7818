"""Scores of a whole graph over many batches, one segment of it at a time.

First every batch runs forward without gradients through all segments but the last, and what crosses
a cut is kept on the CPU. Then segments run again from the last to the first, with gradients, each
for all batches: memory is that of one segment and of what crosses the cuts. The last segment runs
forward once only, and so does everything where the whole graph is one segment. Weights need no
gradient and get none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .. import compat
from ..calibration.segments import Segment, SegmentInterpreter
from ..ir.graph import MixGraph, mutated_inputs
from .blocks import segments_within
from .kinds import FORWARD_KINDS, ScoreSpec
from .probes import Probe, loss_inputs, probes_of
from .statistics import Statistics
from .supervision import (
    LossInputs,
    Supervision,
    everything,
    logit_gradient,
    projection_gradients,
    supervise,
)

Values = Mapping[fx.Node, Any]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """What scoring a graph found.

    Attributes:
        losses: matrix → fp32 [N, F]; a matrix that no gradient reached is missing.
        curvature: matrix → fp32 [N], E[δ²] per supervised token.
        tokens, sequences: supervised.
        loss: which loss was differentiated, for people; "" if there is none.
    """

    losses: Mapping[str, Tensor]
    curvature: Mapping[str, Tensor]
    tokens: int
    sequences: int
    loss: str


def score_graph(
    graph: MixGraph,
    batches: Sequence[Values],
    spec: ScoreSpec,
    token_weights: Tensor | None = None,
    progress: Progress | None = None,
) -> Found:
    """Scores of every matrix that will be quantized; works under no_grad and inference_mode.

    The loss is cross-entropy to drawn labels or to the text's next tokens, or a random projection
    of the floating-point outputs where there are no logits.

    Args:
        batches: values of all placeholders, per batch.
        spec: of any kind but weight-error and zeroth-order.
        token_weights: [S, T] of all batches; see `supervise`.
        progress: called with (batches of segments done, in all).

    Raises:
        UnsupportedModel: logits or gradients that are not finite.
    """
    with torch.inference_mode(False), compat.fast_products():
        return _Replay(graph, batches, spec, token_weights, progress).run()


class _Replay:
    def __init__(
        self,
        graph: MixGraph,
        batches: Sequence[Values],
        spec: ScoreSpec,
        token_weights: Tensor | None,
        progress: Progress | None,
    ) -> None:
        self.batches, self.spec, self.token_weights = batches, spec, token_weights
        self.progress = progress
        self.probes = probes_of(graph)
        self.where: LossInputs = loss_inputs(graph)
        self.sizes = [self.where.batch(values) for values in batches]
        self.firsts = [sum(self.sizes[:i]) for i in range(len(batches))]
        self.segments = segments_within(graph.graph, self.probes, spec)
        self.statistics = Statistics(spec, self.probes.values())
        self.writes = any(mutated_inputs(n) for n in graph.graph.nodes)
        override: dict[fx.Node, Callable[..., Any]] = {
            turned: _unchanged for probe in self.probes.values() for turned in probe.turned
        }
        override |= {node: self._linear(probe) for node, probe in self.probes.items()}
        self.run_graph = SegmentInterpreter(graph.module, override)
        self.varying = _varying(graph)
        self.shared: dict[fx.Node, Any] = {}
        # Of every segment and batch: what it reads from before, and the gradients there.
        self.stored: list[list[Values]] = [[{} for _ in batches] for _ in self.segments]
        self.gradients: list[dict[fx.Node, list[Tensor | None]]] = [{} for _ in batches]
        self.supervision: list[Supervision | None] = [None for _ in batches]
        self.weights = torch.zeros(sum(self.sizes), dtype=torch.float64)
        self.loss = ""
        self.done = 0
        self.at = 0  # batch that runs

    def run(self) -> Found:
        if self.spec.kind in FORWARD_KINDS:
            self._run_forward()
        else:
            self._run_both_ways()
        tokens = float(self.weights.sum())
        squares = self.statistics.squares.items()
        return Found(
            self.statistics.result(self.weights),
            {name: (found / max(tokens, 1e-30)).float() for name, found in squares},
            round(tokens),
            len(self.weights),
            self.loss,
        )

    def _run_both_ways(self) -> None:
        with torch.no_grad():
            for i in range(len(self.segments) - 1):
                for b in range(len(self.batches)):
                    self._forward(i, self.segments[i], b)
        with torch.enable_grad():
            for i in reversed(range(len(self.segments))):
                for b in range(len(self.batches)):
                    self._backward(i, self.segments[i], b)
                self._finish(i)
                self.stored[i] = []

    def _run_forward(self) -> None:
        with torch.no_grad():
            for b, values in enumerate(self.batches):
                self.supervision[b] = found = everything(values, self.where)
                self.weights[self.firsts[b] : self.firsts[b] + self.sizes[b]] = found.tokens
            for i, segment in enumerate(self.segments):
                for b in range(len(self.batches)):
                    self._forward(i, segment, b)
                self._finish(i)
                self.stored[i] = []

    def _finish(self, i: int) -> None:
        inside = [self.probes[n] for n in self.segments[i].nodes if n in self.probes]
        with torch.no_grad():
            self.statistics.finish(inside, self.weights)

    def _forward(self, i: int, segment: Segment, b: int) -> None:
        self.at = b
        self.statistics.start_batch()
        stored = {n: _back(v, self._device(b)) for n, v in self.stored[i][b].items()}
        given = {**self.batches[b], **self.shared, **stored}
        live = self.run_graph.run_segment(segment, given)
        for node, value in live.items():
            if node not in self.varying:
                self.shared.setdefault(node, value)
        if i + 1 < len(self.segments):
            self.stored[i + 1][b] = {n: _parked(v) for n, v in live.items() if n in self.varying}
        self._step()

    def _backward(self, i: int, segment: Segment, b: int) -> None:
        self.at = b
        self.statistics.start_batch()
        leaves = {n: _leaf(v, self._device(b)) for n, v in self.stored[i][b].items()}
        live = self.run_graph.run_segment(segment, {**self.batches[b], **self.shared, **leaves})
        if i == len(self.segments) - 1:
            roots, gradients = self._loss_roots({**leaves, **live}, b)
        else:
            roots, gradients = self._roots(live, self.gradients[b])
        if roots:
            torch.autograd.backward(roots, gradients)
        self.gradients[b] = {n: [_gradient(t) for t in _tensors(v)] for n, v in leaves.items()}
        self._step()

    @staticmethod
    def _roots(
        live: Values, known: Mapping[fx.Node, list[Tensor | None]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        roots, gradients = [], []
        for node, value in live.items():
            for tensor, gradient in zip(_tensors(value), known.get(node, ()), strict=False):
                if gradient is not None and tensor.requires_grad:
                    roots.append(tensor)
                    gradients.append(gradient.to(tensor.device))
        return roots, gradients

    def _loss_roots(self, live: Values, b: int) -> tuple[list[Tensor], list[Tensor]]:
        first, size = self.firsts[b], self.sizes[b]
        logits = live.get(self.where.logits) if self.where.logits is not None else None
        if isinstance(logits, Tensor) and logits.dim() == 3:
            with torch.no_grad():
                weights = self.token_weights
                own = None if weights is None else weights[first : first + size]
                found = supervise(logits, self.batches[b], self.where, self.spec, own)
                gradient, _ = logit_gradient(logits, found, self.spec, first)
            self.supervision[b], self.loss = found, found.name
            self.weights[first : first + size] = found.tokens
            return ([logits], [gradient]) if logits.requires_grad else ([], [])
        outputs = [live.get(n) for n in self.where.outputs]
        chosen, tokens = projection_gradients(outputs, self.spec, first)
        if chosen:
            self.loss = "random projection"
            self.weights[first : first + size] = tokens / size
        return [outputs[i] for i in chosen], list(chosen.values())  # type: ignore[misc]

    def _linear(self, probe: Probe) -> Callable[..., Tensor]:
        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y = F.linear(x, weight, bias)
            if not torch.is_grad_enabled():
                if self.spec.kind in FORWARD_KINDS:
                    found = self.supervision[self.at]
                    self.statistics.add_input(probe, x, None if found is None else found.reach)
                return y
            if not y.requires_grad:
                y = y.detach().requires_grad_()  # a leaf: nothing before it needs a gradient
            kept, batch = x.detach(), self.at
            kept = kept.clone() if self.writes else kept

            def take(dy: Tensor) -> None:
                with torch.no_grad():
                    found = self.supervision[batch]
                    reach = None if found is None else found.reach
                    first, size = self.firsts[batch], self.sizes[batch]
                    self.statistics.add_input(probe, kept, reach)
                    self.statistics.add_gradient(probe, kept, dy, first, size)

            y.register_hook(take)
            return y

        return linear

    def _device(self, b: int) -> torch.device:
        tensors = (v for v in self.batches[b].values() if isinstance(v, Tensor))
        return next((t.device for t in tensors), torch.device("cpu"))

    def _step(self) -> None:
        self.done += 1
        if self.progress is not None:
            passes = len(self.segments)
            passes = passes if self.spec.kind in FORWARD_KINDS else 2 * passes - 1
            self.progress(self.done, passes * len(self.batches))


def _varying(graph: MixGraph) -> set[fx.Node]:
    """Values that differ from batch to batch; others (masks, positions) are kept once."""
    varying = {n for n in graph.placeholders() if n not in graph.bindings}
    for node in graph.graph.nodes:
        if any(source in varying for source in node.all_input_nodes):
            varying.add(node)
            varying.update(mutated_inputs(node))
    return varying


def _unchanged(x: Tensor, *_: Any) -> Tensor:
    return x


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _parked(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.cpu(), value)


def _back(value: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.to(device), value)


def _leaf(value: Any, device: torch.device) -> Any:
    def leaf(t: Tensor) -> Tensor:
        t = t.to(device).detach()
        return t.requires_grad_() if t.is_floating_point() else t

    return pytree.tree_map_only(Tensor, leaf, value)


def _gradient(t: Tensor) -> Tensor | None:
    return None if t.grad is None else t.grad.cpu()
