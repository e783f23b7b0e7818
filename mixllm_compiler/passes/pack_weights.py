"""Lay every quantized matrix out as its kernel reads it, once per weight and process."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from ..formats.layout import PackedWeight, pack, unpack
from ..ir import ops
from ..ir.annotations import quantized_experts_of, quantized_of
from ..ir.graph import Matrix, MixGraph
from ..lowering import lowered
from ..runtime.weights import CACHE, packing_key, repacked
from .base import Changes, Pass

if TYPE_CHECKING:
    from .context import Context

_LAYOUT_AT = {ops.MIXED_GEMM: 4, ops.DEQUANTIZE: 4, lowered.LOWERED_LINEAR: 5}
_BLOB_AT = 3


class PackWeights(Pass):
    name = "pack-weights"
    stage = "lower"
    requires = {"kernels-selected"}
    ensures = {"packed"}

    def run(self, graph: MixGraph, ctx: Context) -> Changes:
        changes = Changes()
        by_matrix = _readers(graph)
        for matrix in graph.matrices.values():
            readers = by_matrix.get(matrix.name)
            if not readers or matrix.packed is None:
                continue
            wanted = matrix.packing
            if matrix.packed.layout.packing != wanted:
                with torch.no_grad(), torch.inference_mode(False):
                    matrix.packed = self._repack(matrix, wanted, ctx)
                self._point_to(graph, matrix, readers)
            elif matrix.widths is not None:
                self._remember(matrix, matrix.packed, ctx)
            changes.add(matrix.name, str(matrix.packed.layout))
        return changes

    def _repack(self, matrix: Matrix, packing: str, ctx: Context) -> PackedWeight:
        assert matrix.packed is not None
        if matrix.widths is None:  # a PackedLinear's own buffer
            return repacked(matrix.packed, packing)
        packed = pack(unpack(matrix.packed), packing)
        self._remember(matrix, packed, ctx)
        return packed

    @staticmethod
    def _remember(matrix: Matrix, packed: PackedWeight, ctx: Context) -> None:
        key = packing_key(matrix, ctx.group, ctx.family)
        known = CACHE.get(matrix.binding.tensor, key)
        if known is None or known.layout != packed.layout:  # the kernels' packing stays
            CACHE.put(matrix.binding.tensor, key, packed)

    @staticmethod
    def _point_to(graph: MixGraph, matrix: Matrix, readers: list[fx.Node]) -> None:
        """Let the ops read the new blob; its layout text changes with it."""
        assert matrix.packed is not None
        for reader in readers:
            with graph.graph.inserting_before(reader):
                blob = graph.constant(matrix, matrix.packed.blob)
            old = reader.args[_BLOB_AT]
            args = list(reader.args)
            args[_BLOB_AT], args[_LAYOUT_AT[reader.target]] = blob, str(matrix.packed.layout)  # type: ignore[index]
            reader.args = tuple(args)
            if isinstance(old, fx.Node) and not old.users and old not in graph.bindings:
                graph.graph.erase_node(old)


def _readers(graph: MixGraph) -> dict[str, list[fx.Node]]:
    """Matrix → the ops that read its blob. Experts are packed for the reference from the start."""
    found: dict[str, list[fx.Node]] = {}
    for node in graph.calls(*_LAYOUT_AT, ops.GROUPED_LINEAR):
        site, experts = quantized_of(node), quantized_experts_of(node)
        names = (site.matrix,) if site is not None else experts.matrices if experts else ()
        for name in names:
            found.setdefault(name, []).append(node)
    return found
