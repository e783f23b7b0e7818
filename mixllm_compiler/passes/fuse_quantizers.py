"""Let a quantizer make its input itself, where that is a norm or an activation.

The float result of a norm (with the addition of the residual in front of it) or of an activation
(with the factor of a gate) is written to memory only to be read by quantizers. Where no one else
reads it and the quantizers' kernel has the fused form, one op takes the place of all.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from torch import fx

from ..ir.annotations import annotate, quantized_of
from ..ir.graph import CARRIED_META, MixGraph, mutated_inputs
from ..lowering import fused, lowered
from .base import Changes, Pass
from .fusible import Match, match, tensor

if TYPE_CHECKING:
    from .context import Context

_VIEWS = ("view", "reshape", "contiguous")
_TOTAL = 3


class FuseQuantizers(Pass):
    name = "fuse-quantizers"
    stage = "lower"
    requires = {"kernels-selected"}
    ensures = {"quantizers-fused"}

    def run(self, graph: MixGraph, ctx: Context) -> Changes:
        changes = Changes()
        place = {node: i for i, node in enumerate(graph.graph.nodes)}
        writes = [place[node] for node in place if mutated_inputs(node)]
        done: set[fx.Node] = set()
        for quantizer in graph.calls(lowered.LOWERED_QUANTIZE):
            if quantizer in done:
                continue
            value = _behind_views(quantizer.args[0])
            views, readers = _readers(value)
            done |= set(readers)
            if not readers or not all(_can_fuse(value, reader) for reader in readers):
                continue
            found = match(graph, value)
            if found is None:
                continue
            start = place[found.sum or found.nodes[0]]
            first = min(place[node] for node in found.nodes)
            last = max(place[reader] for reader in readers)
            # A write between may be one into what is read: the op would read it too late or soon.
            written = any(first <= at <= last for at in writes)
            if written or any(place.get(node, start) > start for node in found.inputs()):
                continue
            record = quantized_of(readers[0])
            _fuse(graph, found, readers, views)
            with_other = " + residual" if found.sum else " · factor" if found.other else ""
            changes.add(record.matrix if record else value, found.name + with_other)
        return changes


def _behind_views(node: Any) -> fx.Node:
    while node.op == "call_method" and node.target in _VIEWS and tensor(node) is not None:
        source = tensor(node.args[0])
        if source is None or str(source.shape[-1]) != str(node.meta["example_value"].shape[-1]):
            break
        node = node.args[0]
    found: fx.Node = node
    return found


def _readers(value: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """Views of a value and the quantizers that read it or them; none if anyone else does, too."""
    views, readers, todo = [], [], [value]
    while todo:
        for user in todo.pop().users:
            if user.target is lowered.LOWERED_QUANTIZE:
                readers.append(user)
            elif _behind_views(user) is value:
                views.append(user)
                todo.append(user)
            else:
                return [], []
    return views, readers


def _can_fuse(value: fx.Node, quantizer: fx.Node) -> bool:
    example = tensor(value)
    if example is None or not isinstance(example.shape[-1], int):
        return False
    _, mode, _, hadamard, kernel = quantizer.args
    k = example.shape[-1]
    return fused.reason(str(kernel), example.dtype, k, str(mode), int(str(hadamard))) is None


def _fuse(graph: MixGraph, found: Match, readers: list[fx.Node], views: list[fx.Node]) -> None:
    """One op per quantizer. The first adds the residual, and its sum serves everybody else."""
    total: fx.Node | None = None
    for reader in sorted(readers):
        adds = found.sum is not None and total is None
        with graph.graph.inserting_before(found.sum if adds else reader):
            node = _call(graph, found, reader, total)
            if adds:
                assert found.sum is not None
                total = graph.graph.call_function(operator.getitem, (node, _TOTAL))
                if _reshape_of(reader) is not None:
                    total = graph.graph.call_method("reshape_as", (total, found.x))
                _carry(found.sum, total)
        _carry(reader, node)
        record = quantized_of(reader)
        if record is not None:
            annotate(node, record)
        graph.replace_all_uses(reader, node)
    if found.sum is not None and total is not None:
        found.sum.replace_all_uses_with(total)
    for node in [*reversed(views), *found.nodes]:
        if not node.users:
            graph.graph.erase_node(node)


def _call(graph: MixGraph, found: Match, reader: fx.Node, total: fx.Node | None) -> fx.Node:
    def shaped(node: fx.Node | None) -> fx.Node | None:
        view = _reshape_of(reader)
        if node is None or view is None:
            return node
        made = graph.graph.call_method("reshape", (node, *view.args[1:]), view.kwargs)
        _carry(view, made)
        return made

    quantizer = reader.args[1:]
    if found.name in fused.ACTIVATIONS:
        args: tuple[Any, ...] = (shaped(found.x), shaped(found.other), found.name)
        return graph.graph.call_function(fused.ACTIVATION_QUANTIZE, (*args, *quantizer))
    norm = (found.weight, found.bias, found.eps, found.name)
    if found.sum is None or total is not None:
        args = (shaped(total or found.x), *norm)
        return graph.graph.call_function(fused.NORM_QUANTIZE, (*args, *quantizer))
    args = (shaped(found.x), shaped(found.other), *norm)
    return graph.graph.call_function(fused.ADD_NORM_QUANTIZE, (*args, *quantizer))


def _reshape_of(reader: fx.Node) -> fx.Node | None:
    """The last change of shape in front of a quantizer: it alone decides the shape."""
    node: Any = reader.args[0]
    while node.op == "call_method" and node.target == "contiguous":
        node = node.args[0]
    changes = node.op == "call_method" and node.target in ("view", "reshape")
    return node if changes and _behind_views(node) is not node else None


def _carry(old: fx.Node, new: fx.Node) -> None:
    new.meta.update({key: old.meta[key] for key in CARRIED_META if key in old.meta})
