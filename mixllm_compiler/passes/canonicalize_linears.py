"""One spelling for every linear with a constant weight: `linear(x, W or W.t(), bias)`.

Covers F.linear and nn.Linear, transformers' Conv1D (`addmm(bias, x, w)` with w [K, N]), `mm`,
`matmul` and `@`. The results stay bit-equal: torch computes a linear by these very calls.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..ir.graph import MixGraph, is_transpose
from .base import Changes, Pass

if TYPE_CHECKING:
    from .context import Context

LINEAR = torch._C._nn.linear
_SPELLINGS = {torch.ops.aten.linear.default}  # F.linear is LINEAR itself
_PRODUCTS = {torch.mm, torch.matmul, operator.matmul}


class CanonicalizeLinears(Pass):
    name = "canonicalize-linears"
    stage = "annotate"
    ensures = {"canonical"}

    def run(self, graph: MixGraph, ctx: Context) -> Changes:
        changes = Changes()
        for node in list(graph.graph.nodes):
            found = self._operands(graph, node)
            if found is None:
                continue
            spelling = getattr(node.target, "__name__", str(node.target))
            x, weight, bias = found
            graph.replace(node, lambda: self._linear(graph, x, weight, bias))
            changes.add(node.name, f"{spelling} → linear")
        return changes

    @staticmethod
    def _linear(graph: MixGraph, x: fx.Node, weight: Any, bias: Any) -> fx.Node:
        if isinstance(weight, tuple):  # [K, N]: linear wants [N, K]
            (stored,) = weight
            if is_transpose(stored):  # x @ w.t(): the view of a view is the weight itself
                return graph.graph.call_function(LINEAR, (x, stored.args[0], bias))
            weight = graph.graph.call_method("t", (stored,))
            value = stored.meta.get("example_value")
            if isinstance(value, torch.Tensor):
                weight.meta["example_value"] = value.t()
        return graph.graph.call_function(LINEAR, (x, weight, bias))

    @staticmethod
    def _operands(graph: MixGraph, node: fx.Node) -> tuple[fx.Node, Any, Any] | None:
        """(x, weight, bias) of another spelling; a weight stored [K, N] comes as a 1-tuple."""
        if node.op == "call_method" and node.target in ("matmul", "mm"):
            target: Any = torch.matmul
        elif node.op == "call_function":
            target = node.target
        else:
            return None
        args: Any = node.args
        kwargs: dict[str, Any] = dict(node.kwargs)
        if target in _SPELLINGS or (target is LINEAR and (kwargs or len(args) < 3)):
            names = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
            if _constant(graph, names["weight"], dims=2):
                return names["input"], names["weight"], names.get("bias")
        elif target is torch.addmm:
            names = dict(zip(("input", "mat1", "mat2"), args, strict=False)) | kwargs
            plain = names.pop("beta", 1) == 1 and names.pop("alpha", 1) == 1
            bias = graph.weight_binding(names["input"])
            fits = bias is not None and bias.tensor.dim() == 1
            if plain and fits and _constant(graph, names["mat2"], dims=2):
                return names["mat1"], (names["mat2"],), names["input"]
        elif target in _PRODUCTS and len(args) == 2 and not kwargs:
            # The constant must be the right factor; two constants are folded by Inductor.
            constant = _constant(graph, args[1], dims=2) and not _constant(graph, args[0])
            return (args[0], (args[1],), None) if constant else None
        return None


def _constant(graph: MixGraph, node: object, dims: int | None = None) -> bool:
    binding = graph.weight_binding(node)
    return binding is not None and (dims is None or binding.tensor.dim() == dims)
