"""Replace each planned linear by quantize-activation, mixed GEMM and dequantize.

A product with the matrices of many experts becomes one op.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..formats.layout import join_layouts
from ..ir import ops
from ..ir.annotations import (
    GroupedSite,
    LinearSite,
    QuantizedExperts,
    QuantizedSite,
    annotate,
)
from ..ir.experts import grouped_product
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
        for node, grouped in list(graph.grouped_sites()):
            graph.replace(node, lambda: _grouped_linear(graph, node, grouped, ctx.activation_mode))
            for name in grouped.matrices:
                packed = graph.matrices[name].packed
                changes.add(name, str(packed.layout) if packed is not None else "")
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


def _grouped_linear(graph: MixGraph, node: fx.Node, site: GroupedSite, mode: str) -> fx.Node:
    product = grouped_product(node)
    assert product is not None
    matrices = [graph.matrices[name] for name in site.matrices]
    packed = [m.packed for m in matrices if m.packed is not None]
    blobs = [graph.constant(matrix, own.blob) for matrix, own in zip(matrices, packed, strict=True)]
    x: Any = product.x
    block: Any = 0
    if matrices[0].transform:  # the op turns its rows itself
        assert x.target is ops.HADAMARD
        x, block = x.args
    layouts, group = join_layouts(p.layout for p in packed), packed[0].layout.group
    dtype = output_dtype(node, matrices[0])
    args = (x, product.offsets, blobs, layouts, mode, group, block, dtype)
    new = graph.graph.call_function(ops.GROUPED_LINEAR, args)
    annotate(new, QuantizedExperts(site.matrices))
    return new


def output_dtype(node: fx.Node, matrix: Matrix) -> torch.dtype:
    """The linear's own output dtype: under autocast it is not the weight's."""
    example = node.meta.get("example_value")
    return example.dtype if isinstance(example, torch.Tensor) else matrix.binding.tensor.dtype
