"""Replace each planned linear by quantize-activation, mixed GEMM and dequantize."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..ir import ops
from ..ir.annotations import LinearSite, QuantizedSite, annotate
from ..ir.graph import Matrix, MixGraph
from .base import Changes, Pass

if TYPE_CHECKING:
    from .context import Context


class RewriteLinears(Pass):
    name = "rewrite-linears"
    stage = "rewrite"
    requires = {"quantized"}
    ensures = {"rewritten"}

    def run(self, graph: MixGraph, ctx: Context) -> Changes:
        changes = Changes()
        for node, site in list(graph.sites()):
            matrix = graph.matrices[site.matrix]
            assert matrix.packed is not None
            mode = ctx.activation_mode
            graph.replace(node, lambda: _mixed_linear(graph, node, site, matrix, mode))
            changes.add(site.matrix, str(matrix.packed.layout))
        return changes


def _mixed_linear(
    graph: MixGraph, node: fx.Node, site: LinearSite, matrix: Matrix, mode: str
) -> fx.Node:
    """Insert the three ops; operands are read from the node now, not from when it was found: an
    earlier rewrite may have replaced them.
    """
    assert matrix.packed is not None
    x, _, bias = node.args
    layout = matrix.packed.layout
    blob = graph.constant(matrix, matrix.packed.blob)

    def op(target: Any, args: tuple[Any, ...], role: str) -> fx.Node:
        new = graph.graph.call_function(target, args)
        for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
            if key in node.meta:
                new.meta[key] = node.meta[key]
        annotate(new, QuantizedSite(site.matrix, role))
        return new

    quantized = op(ops.QUANTIZE_ACTIVATION, (x, mode, layout.group), "quantize_activation")
    codes, scales, sums = (
        graph.graph.call_function(operator.getitem, (quantized, i)) for i in range(3)
    )
    acc = op(ops.MIXED_GEMM, (codes, scales, sums, blob, str(layout)), "mixed_gemm")
    args = (acc, scales, sums, blob, str(layout), bias, output_dtype(node, matrix))
    return op(ops.DEQUANTIZE, args, "dequantize")


def output_dtype(node: fx.Node, matrix: Matrix) -> torch.dtype:
    """The linear's own output dtype: under autocast it is not the weight's."""
    example = node.meta.get("example_value")
    return example.dtype if isinstance(example, torch.Tensor) else matrix.binding.tensor.dtype
