"""Recognize fused experts: parameters [E, ., .] and the products that they are in.

A product over sorted rows (`ir.experts`) is quantized, each expert a matrix of its own. Any other
way to multiply with such a parameter stays float and is listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import fx

from ..capture import module_path
from ..ir.annotations import GroupedSite, annotate
from ..ir.experts import gathers, grouped_product
from ..ir.graph import Binding, Matrix, MixGraph

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FROM_WEIGHT_TO_PRODUCT = {
    *("transpose", "permute", "getattr", "getitem", "index_select", "select", "unbind", "to"),
    *("contiguous", "unsqueeze", "reshape", "view", "expand"),
}


class Experts:
    """Finds the experts of one graph.

    Args:
        graph: matrices are added to it.
        reason: why a matrix stays float, "" if it is quantized.
    """

    def __init__(self, graph: MixGraph, reason: Callable[[Matrix], str]) -> None:
        self.graph, self.reason = graph, reason
        self._traced = gathers(graph.graph.nodes)
        self._by_weight: dict[tuple[int, bool], list[Matrix]] = {}

    def annotate(self, node: fx.Node) -> Iterator[tuple[str, str]]:
        """Record what a product with experts is.

        Yields:
            (name, shape or reason to stay float) of every expert.
        """
        product = grouped_product(node)
        binding = None if product is None else self.graph.weight_binding(product.weight)
        if product is None or binding is None or binding.tensor.dim() != 3:
            return
        # The product reads [E, K, N]: a parameter that it reads as it is, is stored [K, N].
        transposed = not self.graph.reads_transposed(product.weight)
        matrices = self._matrices(binding, transposed)
        first = matrices[0]
        untraced = "its rows cannot be followed back to tokens" if node not in self._traced else ""
        whys = [untraced or m.kept_float or self.reason(m) for m in matrices]
        kept = next((m for m, why in zip(matrices, whys, strict=True) if why), None)
        for matrix, why in zip(matrices, whys, strict=True):
            if kept is not None:  # one op computes all of them
                matrix.kept_float = why or f"{kept.name}, of the same product, stays float"
            yield matrix.name, matrix.kept_float or f"[{first.n}×{first.k}]"
        site = GroupedSite(
            tuple(m.name for m in matrices), module_path(node), first.n, first.k, first.kept_float
        )
        annotate(node, site)

    def _matrices(self, binding: Binding, transposed: bool) -> list[Matrix]:
        """The experts of one parameter, however often it is used."""
        known = self._by_weight.get((id(binding.tensor), transposed))
        if known is not None:
            return known
        count, *shape = binding.tensor.shape
        n, k = shape[::-1] if transposed else shape
        found = [
            Matrix(f"{binding.name}.{e}", binding, int(n), int(k), transposed, e)
            for e in range(count)
        ]
        self.graph.matrices |= {m.name: m for m in found}
        self._by_weight[id(binding.tensor), transposed] = found
        return found

    def others(self) -> dict[str, Matrix]:
        """Fused experts that are multiplied in another way; they stay float."""
        known = {id(m.binding.tensor) for m in self.graph.matrices.values()}
        found = {}
        for node, binding in self.graph.bindings.items():
            w = binding.tensor
            fused = isinstance(w, torch.nn.Parameter) and w.dim() == 3 and w.dtype in _FLOATS
            if fused and id(w) not in known and _is_multiplied(node):
                _, n, k = w.shape
                reason = f"fused expert weights {tuple(w.shape)}, not multiplied with sorted rows"
                found[binding.name] = Matrix(binding.name, binding, n, k, kept_float=reason)
        return found


def _is_multiplied(node: fx.Node) -> bool:
    """Whether matrix products read it, through views and gathers; convolutions are none."""
    for user in node.users:
        name = user.target if user.op == "call_method" else getattr(user.target, "__name__", "")
        if any(word in str(name) for word in ("mm", "matmul", "einsum", "linear")):
            return True
        if name in _FROM_WEIGHT_TO_PRODUCT and _is_multiplied(user):
            return True
    return False
