"""Where a scale of a linear's input can be folded: the norm or the linear that makes the input."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..ir.annotations import site_of
from ..ir.graph import Binding, MixGraph

_SHAPES = {"view", "reshape", "contiguous", "flatten", "transpose", "dropout"}
_SPREADS = _SHAPES | {"getitem", "expand", "unsqueeze", "repeat_interleave"}
_NORMS = {"layer_norm": F.layer_norm, "rms_norm": getattr(F, "rms_norm", None)}


@dataclass(frozen=True)
class Producer:
    """Parameters whose rows a value's channels come from, by multiplication alone.

    Attributes:
        tensors: the live parameters to be scaled, rows first (views of transposed ones).
        bias: the one among them that is added last, so that a shift can be folded; None if none.
        rows: int64 [K] row of channel k; several channels may share one.
        heads: size of an attention head where the value is attention's output, else 0.
    """

    tensors: tuple[Tensor, ...]
    bias: Tensor | None
    rows: Tensor
    heads: int = 0

    def tied(self, channels: Tensor) -> Tensor:
        """[K] with the mean wherever channels share a row (grouped-query attention)."""
        used, place = self.rows.unique(return_inverse=True)
        sums = channels.new_zeros(len(used)).index_add_(0, place, channels)
        return (sums / place.bincount())[place]

    def scale(self, s: Tensor) -> None:
        """Make the value x / s, for a tied s [K]."""
        for tensor in self.tensors:
            factor = torch.ones(len(tensor), dtype=s.dtype, device=s.device)
            factor[self.rows] = s
            tensor.copy_(tensor.double() / factor.view(-1, *[1] * (tensor.dim() - 1)))

    def shift(self, z: Tensor) -> None:
        """Make the value x − z, for a tied z [K]."""
        assert self.bias is not None
        moved = torch.zeros(len(self.bias), dtype=z.dtype, device=z.device)
        moved[self.rows] = z
        self.bias.copy_(self.bias.double() - moved)


def producer_of(graph: MixGraph, x: fx.Node, readers: Iterable[fx.Node], k: int) -> Producer | None:
    """The producer of x [..., K], None where there is none that only these linears hear of."""
    if set(x.users) != set(readers):
        return None
    node = _back(x, _SHAPES, own=False)
    if node.op != "call_function" or (node is not x and len(node.users) > 1):
        return None
    name = getattr(node.target, "__name__", "")
    if name in _NORMS and node.target is _NORMS[name]:
        return _norm(graph, node, k)
    if node.target in (operator.mul, torch.mul):
        weights = [graph.bindings[a] for a in node.all_input_nodes if a in graph.bindings]
        if len(weights) == 1 and weights[0].tensor.shape == (k,):
            return _parameters(weights, None, k)
        factors = [_back(a, _SHAPES) for a in node.args if isinstance(a, fx.Node)]
        found = [p for f in factors if (p := _linear(graph, f, k, shift=False))]
        return found[0] if found else None
    if name == "relu" and isinstance(node.args[0], fx.Node):
        return _linear(graph, _back(node.args[0], _SHAPES), k, shift=False)
    if name == "scaled_dot_product_attention" and len(node.args) > 2:
        return _attention(graph, node, k)
    return None


def _back(node: fx.Node, through: set[str], own: bool = True) -> fx.Node:
    """Behind operations that keep numbers as they are, while nobody else reads them."""
    while (not own or len(node.users) == 1) and isinstance(node.args and node.args[0], fx.Node):
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        if node.op not in ("call_method", "call_function") or name not in through:
            break
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if name == "getitem" and _is_split(source):
            break
        node, own = source, True
    return node


def _is_split(node: fx.Node) -> bool:
    return node.target in ("split", "chunk", torch.split, torch.chunk)


def _norm(graph: MixGraph, node: fx.Node, k: int) -> Producer | None:
    given = dict(zip(("weight", "bias"), node.args[2:4], strict=False)) | node.kwargs
    if getattr(node.target, "__name__", "") == "rms_norm":
        given.pop("bias", None)  # its fourth argument is eps
    named = [given.get(key) for key in ("weight", "bias")]
    nodes = [n for n in named if isinstance(n, fx.Node)]
    found = [graph.bindings[n] for n in nodes if n in graph.bindings]
    shapes = {b.tensor.shape for b in found}
    if named[0] is None or len(found) < len(nodes) or shapes != {(k,)}:
        return None  # without weight, with one that is computed, or not over these channels
    return _parameters(found, found[1] if len(found) > 1 else None, k)


def _parameters(found: list[Binding], bias: Binding | None, k: int) -> Producer | None:
    if any(len(b.node.users) > 1 for b in found):
        return None
    tensors = tuple(b.tensor.detach() for b in found)
    rows = torch.arange(k, device=tensors[0].device)
    return Producer(tensors, None if bias is None else bias.tensor.detach(), rows)


def _linear(
    graph: MixGraph, node: fx.Node, k: int, shift: bool, part: slice | None = None, heads: int = 0
) -> Producer | None:
    """Rows of a linear, or a part of them; with `heads`, each head as often as queries read it."""
    if site_of(node) is None or len(node.users) > 1:
        return None
    weight, bias = graph.weight_binding(node.args[1]), node.args[2]
    if weight is None or len(weight.node.users) > 1:
        return None
    if any(isinstance(a, fx.Node) and len(a.users) > 1 for a in node.args[1:]):
        return None
    w = weight.tensor.detach()
    w = w.t() if graph.reads_transposed(node.args[1]) else w
    tensors = [w]
    if isinstance(bias, fx.Node):
        if bias not in graph.bindings:
            return None
        tensors.append(graph.bindings[bias].tensor.detach())
    source = torch.arange(len(w), device=w.device)[part or slice(None)]
    if heads:
        if len(source) % heads or k % len(source):
            return None
        source = source.view(-1, heads).repeat_interleave(k // len(source), 0).flatten()
    if len(source) != k:
        return None
    moved = tensors[1] if shift and len(tensors) > 1 else None
    return Producer(tuple(tensors), moved, source, heads)


def _attention(graph: MixGraph, node: fx.Node, k: int) -> Producer | None:
    """Rows of v. Attention's weights sum to one, so that a shift of v is one of its output."""
    value = node.args[2]
    example = value.meta.get("example_value") if isinstance(value, fx.Node) else None
    if not isinstance(value, fx.Node) or not isinstance(example, Tensor):
        return None
    source, part = _back(value, _SPREADS), None
    if source.target is operator.getitem:
        split, index = source.args
        if len(source.users) > 1 or not isinstance(split, fx.Node) or not isinstance(index, int):
            return None
        sizes = [int(u.meta["example_value"].shape[-1]) for u in split.users]
        if len(set(sizes)) > 1 or len(sizes) <= index or not isinstance(split.args[0], fx.Node):
            return None
        part = slice(index * sizes[0], (index + 1) * sizes[0])
        source = _back(split.args[0], _SHAPES)
    return _linear(graph, source, k, shift=True, part=part, heads=int(example.shape[-1]))
