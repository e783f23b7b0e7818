"""Where a graph is cut: between decoder blocks, in pieces that fit a budget of memory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..calibration.segments import Segment, cut
from .kinds import FACTORED_KINDS, FORWARD_KINDS, ScoreSpec
from .probes import Probe

_VIEWS = {"view", "reshape", "transpose", "permute", "expand", "getitem", "unsqueeze", "split"}


def block_ends(graph: fx.Graph) -> list[fx.Node]:
    """The last node of every block but the last, of the list of modules that most nodes are in.

    What comes before the first block belongs to it, what comes after the last one to that.
    """
    found: dict[str, dict[fx.Node, str]] = {}
    for node in graph.nodes:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        for match in re.finditer(r"\.(\d+)(?=\.|$)|\[(\d+)\]", stack[-1][0] if stack else ""):
            index = match[1] or match[2]
            found.setdefault(match.string[: match.start()], {})[node] = index
    lists = {name: nodes for name, nodes in found.items() if len({*nodes.values()}) > 1}
    if not lists:
        return []
    inside = max(lists.values(), key=len)
    ends, previous, current = [], None, None
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        index = inside.get(node, current)
        if current is not None and index != current and previous is not None:
            ends.append(previous)
        current, previous = index, node
    return ends


def segments_within(
    graph: fx.Graph, probes: Mapping[fx.Node, Sequence[Probe]], spec: ScoreSpec
) -> list[Segment]:
    """Blocks joined into as few segments as the budget allows, one if all fit.

    Joined from the end: the last segment is the one that runs forward only once.
    """
    ends = block_ends(graph) if spec.budget is not None else []
    blocks = cut(graph, ends)
    if spec.kind in FORWARD_KINDS:
        return blocks  # nothing runs twice, or all of it many times
    kept: list[fx.Node] = []
    taken = 0
    for block, before in zip(reversed(blocks[1:]), reversed(blocks[:-1]), strict=True):
        taken += segment_bytes(block, probes, spec)
        if spec.budget is None or taken + segment_bytes(before, probes, spec) <= spec.budget:
            continue
        kept.append(before.nodes[-1])
        taken = 0
    return cut(graph, kept)


def segment_bytes(
    segment: Segment, probes: Mapping[fx.Node, Sequence[Probe]], spec: ScoreSpec
) -> int:
    """What a segment holds while gradients flow through it: activations and sums, roughly."""
    activations = sum(_bytes(node) for node in segment.nodes)
    inside = [probe for n in segment.nodes for probe in probes.get(n, ())]
    if spec.kind in FACTORED_KINDS:
        return activations + sum(4 * k * k for k in {p.input: p.matrix.k for p in inside}.values())
    weights = {p.matrix.name: p.matrix.n * p.matrix.k for p in inside}
    return activations + 4 * len(spec.formats) * sum(weights.values())


def _bytes(node: fx.Node) -> int:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    value = node.meta.get("example_value")
    if name in _VIEWS or not isinstance(value, Tensor) or not value.is_floating_point():
        return 0
    return elements(value.shape) * value.element_size()


def elements(shape: Sequence[Any]) -> int:
    """Product of sizes, which may be symbols with a hint."""
    total = 1
    for size in shape:
        total *= int(size.node.hint if isinstance(size, torch.SymInt) else size)
    return total
