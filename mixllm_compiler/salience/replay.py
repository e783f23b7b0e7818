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

from ..calibration.routing import Routing
from ..calibration.segments import Segment, SegmentInterpreter
from ..ir.graph import MixGraph, mutated_inputs
from .blocks import segments_within
from .kinds import FORWARD_KINDS, GRADIENT_KINDS, ScoreSpec
from .probes import Probe, loss_inputs, probes_of
from .resume import Checkpoint
from .statistics import Statistics
from .supervision import (
    LossInputs,
    Supervision,
    everything,
    logit_gradient,
    projection_gradients,
    supervise,
    token_gradients,
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


class Replay:
    """One scoring run; see the module."""

    def __init__(
        self,
        graph: MixGraph,
        batches: Sequence[Values],
        spec: ScoreSpec,
        token_weights: Tensor | None,
        progress: Progress | None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.batches, self.spec, self.token_weights = batches, spec, token_weights
        self.progress = progress
        self.probes = probes_of(graph)
        self.where: LossInputs = loss_inputs(graph)
        self.sizes = [self.where.batch(values) for values in batches]
        self.firsts = [sum(self.sizes[:i]) for i in range(len(batches))]
        self.segments = segments_within(graph.graph, self.probes, spec)
        every = [probe for found in self.probes.values() for probe in found]
        self.statistics = Statistics(spec, every)
        self.writes = any(mutated_inputs(n) for n in graph.graph.nodes)
        override: dict[fx.Node, Callable[..., Any]] = {
            turned: _unchanged for probe in every for turned in probe.turned
        }
        self.routing = Routing(node for node, _ in graph.grouped_sites())
        override |= self.routing.override
        for node, found in self.probes.items():
            alone = found[0].matrix.expert is None
            override[node] = self._linear(found[0]) if alone else self._experts(node, found)
        self.head = _head(graph, self.where) if spec.kind in GRADIENT_KINDS else None
        self.head_call: tuple[Tensor, Tensor, Tensor | None] | None = None
        if self.head is not None:
            override[self.head] = self._take_head
        self.run_graph = SegmentInterpreter(graph.module, override)
        self.varying = _varying(graph)
        self.shared: dict[fx.Node, Any] = {}
        # Of every segment and batch: what it reads from before, and the gradients there.
        self.stored: list[list[Values]] = [[{} for _ in batches] for _ in self.segments]
        self.gradients: list[dict[fx.Node, list[Tensor | None]]] = [{} for _ in batches]
        self.reach: list[Tensor | None] = [None for _ in batches]
        self.weights = torch.zeros(sum(self.sizes), dtype=torch.float64)
        self.loss = ""
        passes = len(self.segments)
        passes = passes if spec.kind in FORWARD_KINDS else 2 * passes - 1
        self.done, self.total = 0, passes * len(batches)
        self.at = 0  # batch that runs

    def run(self) -> Found:
        """Go through all segments and batches."""
        if self.spec.kind in FORWARD_KINDS:
            self.run_forward()
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
        left = len(self.segments) if self.checkpoint is None else self.checkpoint.load(self)
        with torch.no_grad():
            for i in range(left - 1):
                for b in range(len(self.batches)):
                    self._forward(i, self.segments[i], b)
        with torch.enable_grad():
            for i in reversed(range(left)):
                for b in range(len(self.batches)):
                    self._backward(i, self.segments[i], b)
                self.finish(i)
                self.stored[i] = []
                if self.checkpoint is not None:
                    self.checkpoint.save(self, i)

    def run_forward(self) -> None:
        """Statistics that need no gradient."""
        with torch.no_grad():
            for b, values in enumerate(self.batches):
                found = self.supervised(values, b)
                self.reach[b] = found.reach
                self.weights[self.firsts[b] : self.firsts[b] + self.sizes[b]] = found.tokens
            for i, segment in enumerate(self.segments):
                for b in range(len(self.batches)):
                    self._forward(i, segment, b)
                self.finish(i)
                self.stored[i] = []

    def supervised(self, values: Values, b: int) -> Supervision:
        """What counts in a batch that has no loss."""
        return everything(values, self.where)

    def finish(self, i: int) -> None:
        """Scores of the linears of segment i, all of whose sums are complete."""
        with torch.no_grad():
            self.statistics.finish(self.inside(self.segments[i]), self.weights)

    def inside(self, segment: Segment) -> list[Probe]:
        """The linears of a segment."""
        return [probe for node in segment.nodes for probe in self.probes.get(node, ())]

    def _forward(self, i: int, segment: Segment, b: int) -> None:
        self.at = b
        self.statistics.start_batch()
        stored = {n: _back(v) for n, v in self.stored[i][b].items()}
        given = {**self.batches[b], **self.shared, **stored}
        live = self.run_graph.run_segment(segment, given)
        for node, value in live.items():
            if node not in self.varying:
                self.shared.setdefault(node, value)
        if i + 1 < len(self.segments):
            self.stored[i + 1][b] = {n: _parked(v) for n, v in live.items() if n in self.varying}
        self.step()

    def _backward(self, i: int, segment: Segment, b: int) -> None:
        self.at = b
        self.statistics.start_batch()
        leaves = {n: _leaf(_back(v)) for n, v in self.stored[i][b].items()}
        live = self.run_graph.run_segment(segment, {**self.batches[b], **self.shared, **leaves})
        if i == len(self.segments) - 1:
            roots, gradients = self._loss_roots({**leaves, **live}, b)
        else:
            roots, gradients = self._roots(live, self.gradients[b])
        if roots:
            torch.autograd.backward(roots, gradients)
        self.gradients[b] = {n: [_gradient(t) for t in _tensors(v)] for n, v in leaves.items()}
        self.step()

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
            weights = self.token_weights
            own = None if weights is None else weights[first : first + size]
            found = supervise(logits, self.batches[b], self.where, self.spec, own)
            self.reach[b], self.loss = found.reach, found.name
            self.weights[first : first + size] = found.tokens
            with torch.no_grad():
                if self.head_call is not None:
                    return self._head_roots(*self.head_call, found, first)
                gradient = logit_gradient(logits, found, self.spec, first)
            return ([logits], [gradient]) if logits.requires_grad else ([], [])
        outputs = [live.get(n) for n in self.where.outputs]
        chosen, tokens = projection_gradients(outputs, self.spec, first)
        if chosen:
            self.loss = "random projection"
            self.weights[first : first + size] = tokens / size
        return [outputs[i] for i in chosen], list(chosen.values())  # type: ignore[misc]

    def _take_head(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Leave the logits out of the run; they are made a few tokens at a time from x."""
        self.head_call = x, weight, bias
        shape = (*x.shape[:-1], len(weight))
        return torch.zeros((), dtype=x.dtype, device=x.device).expand(shape)

    def _head_roots(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, found: Supervision, first: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The gradient at the head's input [B, T', K], and the head's own statistics."""
        self.head_call = None
        gradient, kept = torch.zeros_like(x), x.detach()
        found_head = self.probes.get(self.head) if self.head is not None else None
        probe = found_head[0] if found_head is not None else None
        if probe is not None:
            self.statistics.add_input(probe, kept, found.weights > 0)
        for piece in token_gradients(
            lambda b, t: F.linear(kept[b, t], weight, bias), len(weight), found, self.spec, first
        ):
            b, t, dy = piece.sequence, piece.part, piece.gradient.to(x.dtype)
            gradient[b, t] = dy @ weight
            if probe is not None:
                exact = piece.curvature if found.labels is None else None
                self.statistics.add_gradient(probe, kept[b, t], dy, first + b, 1, exact)
        return ([x], [gradient]) if x.requires_grad else ([], [])

    def _linear(self, probe: Probe) -> Callable[..., Tensor]:
        def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            y = self.result(probe, F.linear(x, weight, bias))
            if not torch.is_grad_enabled():
                if self.spec.kind in FORWARD_KINDS:
                    self.statistics.add_input(probe, x, self.reach[self.at])
                return y
            if not y.requires_grad:
                y = y.detach().requires_grad_()  # a leaf: nothing before it needs a gradient
            kept, batch = x.detach(), self.at
            kept = kept.clone() if self.writes else kept

            def take(dy: Tensor) -> None:
                with torch.no_grad():
                    first, size = self.firsts[batch], self.sizes[batch]
                    self.statistics.add_input(probe, kept, self.reach[batch])
                    self.statistics.add_gradient(probe, kept, dy, first, size)

            y.register_hook(take)
            return y

        return linear

    def _experts(self, node: fx.Node, probes: tuple[Probe, ...]) -> Callable[..., Tensor]:
        """The product of `ir.experts`, an expert at a time."""

        def product(x: Tensor, weight: Tensor, offs: Tensor, **_: Any) -> Tensor:
            rows = self.routing.rows(node, offs)
            pairs = list(zip(probes, rows.experts, strict=True))
            parts = [self.result(p, x[at] @ weight[e]) for e, (p, at) in enumerate(pairs)]
            rest = len(x) - sum(map(len, parts))  # rows of no expert
            y = torch.cat((*parts, x.new_zeros(rest, weight.shape[-1])))
            used = [(p, at) for p, at in pairs if at.start < at.stop]

            def add_inputs(x: Tensor, batch: int) -> None:
                reach = rows.of_tokens(self.reach[batch])
                for probe, at in used:
                    self.statistics.add_input(probe, x[at], None if reach is None else reach[at])

            if not torch.is_grad_enabled():
                if self.spec.kind in FORWARD_KINDS:
                    add_inputs(x, self.at)
                return y
            if not y.requires_grad:
                y = y.detach().requires_grad_()
            kept, batch = x.detach(), self.at
            kept = kept.clone() if self.writes else kept

            def take(dy: Tensor) -> None:
                first, size = self.firsts[batch], self.sizes[batch]
                sequence = rows.sequences(size)
                with torch.no_grad():
                    add_inputs(kept, batch)
                    for p, at in used:
                        self.statistics.add_gradient(
                            p, kept[at], dy[at], first, size, sequence=sequence[at]
                        )

            y.register_hook(take)
            return y

        return product

    def result(self, probe: Probe, y: Tensor) -> Tensor:
        """What a linear's output goes on as."""
        return y

    def step(self) -> None:
        """Tell how far it is."""
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def _head(graph: MixGraph, where: LossInputs) -> fx.Node | None:
    """The linear whose output is the logits and nothing else; None if more is done to them."""
    node = where.logits
    if node is None or node.target is not torch._C._nn.linear:
        return None
    alone = all(user.op == "output" for user in node.users)
    return node if alone and len(_shape(node)) == 3 else None


def _shape(node: fx.Node) -> tuple[Any, ...]:
    """Shape of a node's example value, () if it has none."""
    return tuple(getattr(node.meta.get("example_value"), "shape", ()))


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


@dataclass(frozen=True)
class _Parked:
    """A tensor on the CPU, and where it came from."""

    tensor: Tensor
    home: torch.device


def _parked(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: _Parked(t.cpu(), t.device), value)


def _back(value: Any) -> Any:
    return pytree.tree_map_only(_Parked, lambda p: p.tensor.to(p.home), value)


def _leaf(value: Any) -> Any:
    def leaf(t: Tensor) -> Tensor:
        return t.detach().requires_grad_() if t.is_floating_point() else t.detach()

    return pytree.tree_map_only(Tensor, leaf, value)


def _gradient(t: Tensor) -> Tensor | None:
    return None if t.grad is None else t.grad.cpu()
