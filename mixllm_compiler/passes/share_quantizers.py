"""Quantize an activation once for all linears that read it.

q/k/v (and gate/up) read the same tensor; after `rewrite-linears` each of them has a quantizer of
its own. This pass keeps the first and points the others to it.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING

from torch import fx

from ..ir.graph import MixGraph
from .base import Changes, Pass

if TYPE_CHECKING:
    from .context import Context


class ShareQuantizers(Pass):
    name = "share-quantizers"
    stage = "rewrite"
    requires = {"rewritten"}
    ensures = {"quantizers-shared"}

    def run(self, graph: MixGraph, ctx: Context) -> Changes:
        changes = Changes()
        for value, quantizers in graph.quantizers_by_input().items():
            by_mode = sorted(quantizers, key=_mode)  # stable: graph order inside a mode
            for mode, twins in groupby(by_mode, key=_mode):
                left = list(twins)
                while left:
                    first, *left = left
                    # An in-place write between two readers makes them read different values.
                    same = [q for q in left if not graph.written_between(value, first, q)]
                    left = [q for q in left if q not in same]
                    for twin in same:
                        _share(graph, twin, first)
                    if same:
                        changes.add(value, f"{len(same) + 1} readers share one {mode} quantizer")
        return changes


def _mode(quantizer: fx.Node) -> str:
    _, mode, group = quantizer.args
    return f"{mode}/{group}"


def _share(graph: MixGraph, twin: fx.Node, first: fx.Node) -> None:
    """Let the three outputs of `first` stand for those of `twin`."""
    outputs = {user.args[1]: user for user in first.users}
    for user in list(twin.users):
        graph.replace_all_uses(user, outputs[user.args[1]])
    graph.graph.erase_node(twin)
