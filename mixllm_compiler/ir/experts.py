"""Fused experts in a graph: sorted rows times a stack of matrices, each expert its own rows.

A product takes x [S, K], one row for each token and expert that it was routed to, sorted by expert;
weights [E, K, N]; and offsets [E]: rows offsets[e − 1] to offsets[e] belong to expert e.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import NamedTuple

from torch import fx

from . import ops

_PRODUCTS = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback", "grouped_mm_fallback.default"}
_CASTS = {"to", "contiguous", "float", "bfloat16", "half", "type_as"}


class GroupedProduct(NamedTuple):
    """Operands of a product; see the module."""

    x: fx.Node
    weight: fx.Node
    offsets: fx.Node


def grouped_product(node: fx.Node) -> GroupedProduct | None:
    """The operands of a node that is such a product, however torch or transformers spell it."""
    name = getattr(node.target, "__name__", "")
    if node.op != "call_function" or name not in _PRODUCTS or not 2 <= len(node.args) <= 3:
        return None
    given = {key: value for key, value in node.kwargs.items() if value is not None}
    offsets = node.args[2] if len(node.args) == 3 else given.pop("offs", None)
    found = (*node.args[:2], offsets)
    if given or not all(isinstance(operand, fx.Node) for operand in found):
        return None  # a bias, or another output type
    return GroupedProduct(*found)  # type: ignore[arg-type]


def gathers(nodes: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Product → the `v[index]` that made its rows from tokens v [T, K] with index [S].

    Products with the same offsets have the same rows: the second product of an expert reads what
    the first one made. A product whose rows nothing gathered is missing.
    """
    products = [(n, p) for n in nodes if (p := grouped_product(n)) is not None]
    by_offsets: dict[fx.Node, fx.Node] = {}
    for _, product in products:
        source = _uncast(product.x)
        if source.target is operator.getitem and isinstance(source.args[1], fx.Node):
            by_offsets.setdefault(product.offsets, source)
    return {n: by_offsets[p.offsets] for n, p in products if p.offsets in by_offsets}


def _uncast(node: fx.Node) -> fx.Node:
    """The value behind casts and rotations, which keep every row where it is."""
    while isinstance(node.args[0] if node.args else None, fx.Node):
        cast = node.op == "call_method" and node.target in _CASTS
        if not cast and node.target is not ops.HADAMARD:
            break
        node = node.args[0]  # type: ignore[assignment]
    return node
