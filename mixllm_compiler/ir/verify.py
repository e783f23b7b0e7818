"""Checks that a graph is what its facts claim; run after every pass in tests and on request."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from ..errors import VerifyError
from ..formats.layout import Layout, join_layouts, packing
from . import ops
from .annotations import grouped_of, quantized_experts_of, quantized_of, site_of
from .graph import MixGraph


def verify(graph: MixGraph, after: str) -> None:
    """Check every stage whose facts the graph has.

    Raises:
        VerifyError: names the pass, the node and the matrix.
    """
    _structure(graph, after)
    if "annotated" in graph.facts and "rewritten" not in graph.facts:
        _annotated(graph, after)
    if "planned" in graph.facts:
        _planned(graph, after)
    if "rewritten" in graph.facts:
        _rewritten(graph, after)
    if "packed" in graph.facts:
        _packed(graph, after)


def _fail(after: str, node: fx.Node | None, matrix: str, what: str) -> None:
    place = f" at {node.format_node()}" if node is not None else ""
    named = f" ({matrix})" if matrix else ""
    raise VerifyError(f"after {after}{named}: {what}{place}")


def _structure(graph: MixGraph, after: str) -> None:
    try:
        graph.graph.lint()
    except (RuntimeError, AssertionError) as error:
        raise VerifyError(f"after {after}: the graph is malformed: {error}") from error
    nodes = set(graph.graph.nodes)
    for node, binding in graph.bindings.items():
        if node not in nodes:
            _fail(after, None, binding.name, "the node of a bound weight was erased from the graph")
    if len(graph.placeholders()) != len(graph.inputs):
        _fail(after, None, "", "placeholders and example inputs no longer match")


def _annotated(graph: MixGraph, after: str) -> None:
    for node in graph.graph.nodes:
        one, many = site_of(node), grouped_of(node)
        site = one or many
        if site is None:
            continue
        for name in (one.matrix,) if one is not None else many.matrices if many else ():
            matrix = graph.matrices.get(name)
            if matrix is None:
                _fail(after, node, name, "the annotation names a matrix that is not there")
            elif (matrix.n, matrix.k) != (site.n, site.k):
                _fail(after, node, name, "annotation and matrix disagree about the shape")
            elif graph.weight_binding(node.args[1]) is not matrix.binding:
                _fail(after, node, name, "the linear reads another weight than annotated")


def _planned(graph: MixGraph, after: str) -> None:
    for matrix in graph.active():
        if matrix.widths is None or matrix.widths.shape != (matrix.n,):
            _fail(after, None, matrix.name, "planned, but its rows have no widths")


def _rewritten(graph: MixGraph, after: str) -> None:
    for node, site in graph.sites():
        _fail(after, node, site.matrix, "a linear of the plan is still float")
    for node, grouped in graph.grouped_sites():
        _fail(after, node, grouped.matrices[0], "experts of the plan are still float")
    for node in graph.calls(ops.GROUPED_LINEAR):
        _grouped(graph, node, after)
    for node in graph.calls(ops.MIXED_GEMM, ops.DEQUANTIZE):
        record = quantized_of(node)
        name = record.matrix if record else ""
        layout = Layout.parse(str(node.args[4]))
        blob = node.args[3]
        if not isinstance(blob, fx.Node):
            _fail(after, node, name, "the packed argument is no node")
        matrix = graph.matrices.get(name)
        if matrix is not None and (matrix.n, matrix.k) != (layout.n, layout.k):
            _fail(after, node, name, f"layout {layout} is not of a [{matrix.n}×{matrix.k}] matrix")
        codes = node.args[0] if node.target is ops.MIXED_GEMM else None
        example = codes.meta.get("example_value") if isinstance(codes, fx.Node) else None
        if isinstance(example, Tensor) and example.shape[-1] != layout.padded_k:
            _fail(after, node, name, f"codes of length {example.shape[-1]}, not {layout.padded_k}")


def _grouped(graph: MixGraph, node: fx.Node, after: str) -> None:
    experts = quantized_experts_of(node)
    if experts is None:
        return  # written by a user's pass
    first, blobs = experts.matrices[0], node.args[2]
    layouts = Layout.parse_all(str(node.args[3]))
    if not isinstance(blobs, list | tuple) or len(blobs) != len(layouts):
        _fail(after, node, first, f"there are {len(layouts)} layouts, but not as many blobs")
    if len(layouts) != len(experts.matrices):
        _fail(after, node, first, f"{len(layouts)} layouts for {len(experts.matrices)} experts")
    for name, layout in zip(experts.matrices, layouts, strict=True):
        matrix = graph.matrices[name]
        if (matrix.n, matrix.k) != (layout.n, layout.k):
            _fail(after, node, name, f"layout {layout} is not of a [{matrix.n}×{matrix.k}] matrix")


def _packed(graph: MixGraph, after: str) -> None:
    for node in graph.calls(ops.GROUPED_LINEAR):
        experts = quantized_experts_of(node)
        packed = [graph.matrices[name].packed for name in experts.matrices] if experts else []
        wanted = join_layouts(p.layout for p in packed if p is not None)
        if experts is not None and str(node.args[3]) != wanted:
            _fail(after, node, experts.matrices[0], "its layouts are not those of the experts")
        blobs: Any = node.args[2]
        for blob, own in zip(blobs, packed, strict=False):
            value = graph.module._buffers.get(str(blob.target))
            if value is not None and own is not None and value.data_ptr() != own.blob.data_ptr():
                _fail(after, node, str(blob.target), "is not the expert's packed blob")
    for node in graph.graph.nodes:
        site = quantized_of(node)
        if node.op != "call_function" or site is None or site.role == "quantize_activation":
            continue
        texts = [a for a in node.args if isinstance(a, str) and a.startswith("k") and " g" in a]
        matrix = graph.matrices.get(site.matrix)
        if not texts or matrix is None or matrix.packed is None:
            continue
        if texts[0] != str(matrix.packed.layout):
            _fail(after, node, site.matrix, f"reads {texts[0]!r}, packed as {matrix.packed.layout}")
        packing(matrix.packed.layout.packing)
        blob = node.args[3]
        value = graph.module._buffers.get(str(blob.target)) if isinstance(blob, fx.Node) else None
        if value is not None and value.data_ptr() != matrix.packed.blob.data_ptr():
            _fail(after, node, site.matrix, "the graph's constant is not the matrix' packed blob")
