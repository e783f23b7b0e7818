"""Float rows and their widths → a quantized matrix in its neutral form.

Every matrix is rounded to nearest. One that was packed before, for an earlier graph of the same
weights, comes from the cache.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..formats.layout import pack
from ..ir.graph import MixGraph
from ..quantizers.rtn import quantize_rtn
from ..runtime.weights import CACHE, packing_key
from .base import Changes, Pass

if TYPE_CHECKING:
    from .context import Context


class QuantizeWeights(Pass):
    name = "quantize-weights"
    stage = "rewrite"
    requires = {"planned"}
    ensures = {"quantized"}

    def run(self, graph: MixGraph, ctx: Context) -> Changes:
        changes = Changes()
        for matrix in graph.active():
            assert matrix.widths is not None
            key = packing_key(matrix, ctx.group, ctx.family)
            matrix.packed = CACHE.get(matrix.binding.tensor, key)
            if matrix.packed is not None:
                changes.add(matrix.name, "packed before")
                continue
            with torch.no_grad(), torch.inference_mode(False):
                weight = quantize_rtn(
                    matrix.value().clone(),
                    matrix.widths,
                    ctx.group,
                    matrix.transform,
                    ctx.family,
                    clip=ctx.family == "two-level",
                    spans=matrix.spans,
                )
                matrix.packed = pack(weight, "plain.v1")
            changes.add(matrix.name, f"{8 * weight.true_bytes() / (weight.n * weight.k):.3f} bits")
        return changes
