"""Block Hadamard transform of every linear's input; the float function stays equal.

x Wᵀ = (x T)(W T)ᵀ for orthonormal T. Siblings that read the same value share one transform.
Rotated inputs have no outliers, which makes one int8 scale per token as accurate as one per
group (QuaRot, arXiv 2404.00456). Blocks are the largest power of two from 32 up to the one asked
for that divides K; a linear without one stays as it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from ..ir import ops
from ..ir.annotations import LinearSite
from ..ir.graph import MixGraph
from ..transforms.hadamard import ROTATED_INPUT, block_for
from .base import Changes, Pass

if TYPE_CHECKING:
    from .context import Context


class RotateInputs(Pass):
    name = "rotate-inputs"
    stage = "transform"
    requires = {"annotated"}
    ensures = {"rotated"}

    def __init__(self, block: int = 0) -> None:
        self.block = block

    def run(self, graph: MixGraph, ctx: Context) -> Changes:
        changes = Changes()
        wanted = self.block or ctx.rotation
        if not wanted:
            return changes
        rotated: dict[tuple[fx.Node, int], fx.Node] = {}
        folded = _rotated_before(graph)
        for node, site in list(graph.sites()):
            if site.module in folded:
                ctx.rotated = wanted
                changes.add(site.matrix, "not rotated: its producer does it")
                continue
            block = block_for(site.k, wanted)
            if not block:
                changes.add(site.matrix, f"not rotated: no power of two ≥ 32 divides K = {site.k}")
                continue
            self._rotate(graph, node, site, block, rotated)
            ctx.rotated = wanted
            graph.matrices[site.matrix].transform = f"hadamard:{block}"
            changes.add(site.matrix, f"input in Hadamard blocks of {block}")
        for node, grouped in list(graph.grouped_sites()):
            first, block = grouped.matrices[0], block_for(grouped.k, wanted)
            if not block:
                why = f"not rotated: no power of two ≥ 32 divides K = {grouped.k}"
                changes.add(first, f"and all experts beside it {why}")
                continue
            self._rotate_experts(graph, node, block)
            ctx.rotated = wanted
            for name in grouped.matrices:
                graph.matrices[name].transform = f"hadamard:{block}"
                changes.add(name, f"input in Hadamard blocks of {block}")
        return changes

    @staticmethod
    def _rotate_experts(graph: MixGraph, node: fx.Node, block: int) -> None:
        """Rotate what a product with experts reads, and its weights [E, K, N] along K."""
        x, weight = node.args[:2]
        assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
        with graph.graph.inserting_before(node):
            turned = graph.graph.call_function(ops.HADAMARD, (x, block))
            turned.meta.update({k: v for k, v in x.meta.items() if k == "example_value"})
            rows = graph.graph.call_method("transpose", (weight, -2, -1))
            rows = graph.graph.call_function(ops.HADAMARD, (rows, block))
            columns = graph.graph.call_method("transpose", (rows, -2, -1))
        node.args = (turned, columns, *node.args[2:])

    @staticmethod
    def _rotate(
        graph: MixGraph,
        node: fx.Node,
        site: LinearSite,
        block: int,
        rotated: dict[tuple[fx.Node, int], fx.Node],
    ) -> None:
        x, weight, bias = node.args
        assert isinstance(x, fx.Node)
        with graph.graph.inserting_before(node):
            turned = rotated.get((x, block))
            if turned is None or graph.written_between(x, turned, node):
                turned = graph.graph.call_function(ops.HADAMARD, (x, block))
                turned.meta.update({k: v for k, v in x.meta.items() if k == "example_value"})
                rotated[x, block] = turned
            turned_weight = graph.graph.call_function(ops.HADAMARD, (weight, block))
        node.args = (turned, turned_weight, bias)


def _rotated_before(graph: MixGraph) -> set[str]:
    """Modules for which `fold_rotation` put the transform into what makes their input."""
    modules = {} if graph.root is None else dict(graph.root.named_modules())
    return {name for name, module in modules.items() if hasattr(module, ROTATED_INPUT)}
