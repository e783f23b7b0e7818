"""A captured graph in segments, so that a long model runs with the memory of one block.

Values that cross a cut are kept by the caller, who may run a segment again, with gradients, or with
other linears in it. Stored values stay as they are: a segment that writes in place gets copies.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from ..ir import ops, reference
from ..ir.graph import aliases, mutated_inputs

_OUTSIDE = ("placeholder", "get_attr")


@dataclass(frozen=True)
class Segment:
    """A run of consecutive nodes of a graph.

    Attributes:
        nodes: in graph order; placeholders, constants and the output are in no segment.
        inputs: computed values from before that it reads.
        outputs: values, its own or from before, that later segments or the graph's output read;
            also placeholders that were written to by now and are read later.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def cut(
    graph: fx.Graph, after: Sequence[fx.Node], reads: Mapping[fx.Node, fx.Node] | None = None
) -> list[Segment]:
    """The nodes of a graph in segments that end after the given nodes.

    A cut is left out where it would separate the two ends of an autocast region, or two views of
    memory that is written later.

    Args:
        reads: value → a node behind it, as if that one read it, too.
    """
    order = [n for n in graph.nodes if n.op not in (*_OUTSIDE, "output")]
    place = {n: i for i, n in enumerate(order)}
    last = {n: max((place.get(u, len(order)) for u in n.users), default=-1) for n in graph.nodes}
    for value, reader in (reads or {}).items():
        last[value] = max(last[value], place[reader])
    writes = [(place[n], v) for n in order for v in mutated_inputs(n)]

    def live(end: int) -> list[fx.Node]:
        """What is read at or after place `end` and known before."""
        written = {a for at, v in writes if at < end for a in aliases(v) if a.op in _OUTSIDE}
        found = [n for n in graph.nodes if n in written and last[n] >= end]
        return found + [n for n in order[:end] if last[n] >= end]

    def possible(end: int) -> bool:
        crossing = set(live(end))
        views = (aliases(v) & crossing for at, v in writes if at >= end)
        regions = any(n.target is torch.amp.autocast_mode._enter_autocast for n in crossing)
        return not regions and all(len(group) < 2 for group in views)

    ends = {place[n] + 1 for n in after if n in place} - {len(order)}
    bounds = [0, *(end for end in sorted(ends) if possible(end)), len(order)]
    segments = []
    for start, end in itertools.pairwise(bounds):
        nodes = tuple(order[start:end])
        read = {a for n in nodes for a in n.all_input_nodes}
        inputs = tuple(n for n in live(start) if n in read)
        segments.append(Segment(nodes, inputs, tuple(live(end))))
    return segments


class SegmentInterpreter(fx.Interpreter):
    """Runs one segment of a float graph at a time, with gradients if they are enabled.

    Args:
        gm: the graph's module.
        override: node → what to call with the node's arguments instead of its target.
    """

    def __init__(
        self, gm: fx.GraphModule, override: Mapping[fx.Node, Callable[..., Any]] | None = None
    ) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.override = override or {}

    def run_segment(self, segment: Segment, inputs: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
        """Values of `segment.outputs`.

        Args:
            inputs: values of placeholders and of `segment.inputs`. Nodes of the segment itself may
                be among them and are then not run: weights transformed once for all batches.
        """
        nodes = [n for n in segment.nodes if n not in inputs]
        last = {a: n for n in nodes for a in n.all_input_nodes}
        kept = set(segment.outputs)
        writes = any(mutated_inputs(n) for n in nodes)
        self.env = {
            n: _own(inputs[n], writes and n in last) for n in inputs if n in kept | last.keys()
        }
        for node in nodes:
            for source in node.all_input_nodes:
                if source.op == "get_attr" and source not in self.env:
                    self.env[source] = super().run_node(source)
            self.env[node] = self.run_node(node)
            for source in node.all_input_nodes:
                if last[source] is node and source not in kept:
                    self.env.pop(source, None)
            if node not in last and node not in kept:
                del self.env[node]
        found = {n: self.env[n] for n in segment.outputs}
        self.env = {}
        return found

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch._C._set_grad_enabled:
            return None  # a no_grad region of the model must not cut the gradient
        if n in self.override:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            return self.override[n](*args, **kwargs)
        return super().run_node(n)

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is ops.HADAMARD:  # the op has no gradient, its meaning in plain torch does
            target = reference.hadamard
        return super().call_function(target, args, kwargs)


def _own(value: Any, copy: bool) -> Any:
    """A value that a segment may read and, if it is a copy, write."""

    def own(leaf: Any) -> Any:
        if isinstance(leaf, torch.SymInt):
            return leaf.node.hint
        if isinstance(leaf, nn.Parameter):
            leaf, parameter = leaf.detach(), True
        else:
            parameter = False
        if isinstance(leaf, Tensor) and ((copy and not parameter) or leaf.is_inference()):
            return leaf.clone()  # inference tensors cannot be saved for a backward
        return leaf

    return pytree.tree_map(own, value)
