"""Choose a lowering for every mixed linear and put its ops in.

The semantic ops stay where the reference is the best that the target has; elsewhere
`mixed_gemm` and `dequantize` become one lowered op whose arguments alone name its kernel.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import LoweringError
from ..ir import ops
from ..ir.annotations import QuantizedSite, annotate, quantized_experts_of, quantized_of
from ..ir.graph import MixGraph, layout_of
from ..lowering import lowered
from ..lowering.select import LOWERINGS, REFERENCE, KernelChoice, select
from .base import Changes, Pass

if TYPE_CHECKING:
    from .context import Context


class SelectKernels(Pass):
    name = "select-kernels"
    stage = "lower"
    requires = {"rewritten"}
    ensures = {"kernels-selected"}

    def run(self, graph: MixGraph, ctx: Context) -> Changes:
        changes = Changes()
        quantizers: set[str] = set()
        for dequantize in graph.calls(ops.DEQUANTIZE):
            site, layout = quantized_of(dequantize), layout_of(dequantize)
            if site is None or layout is None:
                continue  # written by a user's pass: it stays as it is
            gemm = dequantize.args[0]
            assert isinstance(gemm, fx.Node)
            mode = _mode_of(gemm)
            dtype = dequantize.args[6]
            assert isinstance(dtype, torch.dtype)
            choice = select(layout, mode, dtype, ctx.target, ctx.options.kernels)
            matrix = graph.matrices[site.matrix]
            matrix.kernel, matrix.packing = choice.name, choice.packing
            if choice.kernel:
                self._lower(graph, dequantize, gemm, site, choice)
            if choice.quantizer == "kernel":
                quantizers.add(choice.kernel)
            why = f" ({'; '.join(choice.reasons)})" if choice.reasons else ""
            changes.add(site.matrix, f"{matrix.kernel}{why}")
        self._lower_quantizers(graph, quantizers)
        for node in graph.calls(ops.GROUPED_LINEAR):
            experts = quantized_experts_of(node)
            names = experts.matrices if experts is not None else ()
            if ctx.options.kernels not in (None, REFERENCE):
                raise LoweringError(
                    f"{ctx.options.kernels} has no kernel for products with experts, and this "
                    "model has some; leave kernels out, or exclude them"
                )
            for name in names:
                matrix = graph.matrices[name]
                matrix.kernel, matrix.packing = REFERENCE, LOWERINGS[REFERENCE].packing
                changes.add(name, f"{REFERENCE} (products with experts have no kernel yet)")
        return changes

    @staticmethod
    def _lower(
        graph: MixGraph,
        dequantize: fx.Node,
        gemm: fx.Node,
        site: QuantizedSite,
        choice: KernelChoice,
    ) -> None:
        codes, scales, sums, packed, layout = gemm.args
        bias, dtype = dequantize.args[5:7]

        def build() -> fx.Node:
            args = (codes, scales, sums, packed, bias, layout, dtype, choice.kernel)
            node = graph.graph.call_function(lowered.LOWERED_LINEAR, args)
            annotate(node, QuantizedSite(site.matrix, "linear", choice.kernel))
            return node

        graph.replace(dequantize, build)
        graph.graph.erase_node(gemm)

    @staticmethod
    def _lower_quantizers(graph: MixGraph, with_kernel: set[str]) -> None:
        """A quantizer becomes a kernel when all of its readers are one lowering's that has one.

        A transform goes into the kernel with it; the op in front goes when its last reader does.
        """
        for quantizer in graph.calls(ops.QUANTIZE_ACTIVATION):
            readers = {r for output in quantizer.users for r in output.users}
            kernels = {str(r.args[-1]) for r in readers if r.target is lowered.LOWERED_LINEAR}
            if len(kernels) != 1 or any(r.target is not lowered.LOWERED_LINEAR for r in readers):
                continue
            (kernel,) = kernels
            if kernel not in with_kernel:
                continue
            x, mode, group = quantizer.args
            block: Any = 0
            rotation = x if isinstance(x, fx.Node) and x.target is ops.HADAMARD else None
            if rotation is not None:
                x, block = rotation.args
            args = (x, mode, group, block, kernel)
            node = graph.replace(
                quantizer, lambda: graph.graph.call_function(lowered.LOWERED_QUANTIZE, args)
            )
            record = QuantizedSite(_any_matrix(readers), "quantize_activation", kernel)
            annotate(node, record)


def _any_matrix(readers: set[fx.Node]) -> str:
    return next((s.matrix for r in readers if (s := quantized_of(r))), "")


def _mode_of(gemm: fx.Node) -> str:
    codes: Any = gemm.args[0]
    if codes.target is operator.getitem and codes.args[0].target is ops.QUANTIZE_ACTIVATION:
        return str(codes.args[0].args[1])
    return "group"
