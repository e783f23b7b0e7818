"""Where a captured graph's loss is, and which of its linears to score."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..ir.graph import MixGraph
from .profiler import LossInputs, Probe


def probes_of(graph: MixGraph) -> dict[fx.Node, Probe]:
    """One probe per use of a matrix that will be quantized."""
    probes = {}
    for node, site in graph.sites():
        x = node.args[0]
        assert isinstance(x, fx.Node)
        probes[node] = Probe(site.matrix, x, graph.matrices[site.matrix].value)
    return probes


def gradient_stops(graph: MixGraph) -> str:
    """Why gradients cannot be taken in this graph, "" if they can."""
    packed = [m.name for m in graph.matrices.values() if m.packed is not None]
    if not packed:
        return ""
    return f"{len(packed)} linears are quantized already (first {packed[0]}) and have no gradient"


def loss_inputs(graph: MixGraph) -> LossInputs:
    """Token ids, their mask and the logits, by what the graph does with them.

    Ids are what the largest embedding table is read with; logits are a floating-point output
    that one linear made, seen through views, casts and element-wise operations. Shapes alone do
    not tell: hidden sizes and vocabularies collide.
    """
    place = {node: i for i, node in enumerate(graph.placeholders())}
    ids = _ids(graph, place)
    mask = next((i for n, i in place.items() if _is_mask(graph, n, i, ids)), None)
    return LossInputs(ids, mask, _logits(graph), _activations(graph, place))


def _activations(graph: MixGraph, place: dict[fx.Node, int]) -> tuple[int, ...]:
    def fits(node: fx.Node, index: int) -> bool:
        value = graph.inputs[index]
        plain = isinstance(value, Tensor) and node not in graph.bindings
        return plain and value.is_floating_point() and value.dim() >= 2

    return tuple(index for node, index in place.items() if fits(node, index))


def _ids(graph: MixGraph, place: dict[fx.Node, int]) -> int | None:
    best: tuple[int, int] | None = None
    for node in graph.calls(torch.nn.functional.embedding, torch.embedding):
        table = next((b for a in node.args if (b := graph.weight_binding(a))), None)
        rows = table.tensor.shape[0] if table is not None else 0
        for reader in map(_seen_through, node.args):
            if not isinstance(reader, fx.Node) or reader not in place:
                continue
            ids = reader not in graph.bindings and _is_ids(graph.inputs[place[reader]])
            if ids and (best is None or rows > best[0]):
                best = rows, place[reader]
    return best[1] if best else None


def _seen_through(node: object) -> object:
    """The value behind casts and views."""
    while isinstance(node, fx.Node) and node.op == "call_method" and node.args:
        if node.target not in ("view", "reshape", "long", "to", "contiguous", "unsqueeze"):
            break
        node = node.args[0]
    return node


def _is_ids(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.dim() == 2


def _is_mask(graph: MixGraph, node: fx.Node, index: int, ids: int | None) -> bool:
    value = graph.inputs[index]
    if ids is None or index == ids or not isinstance(value, Tensor):
        return False
    fits = value.shape == graph.inputs[ids].shape and not value.is_floating_point()
    return fits and "attention_mask" in node.name


def _logits(graph: MixGraph) -> int | None:
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    values = output.args[0]
    for i, value in enumerate(values if isinstance(values, tuple | list) else (values,)):
        if isinstance(value, fx.Node) and _made_by_linear(graph, value):
            return i
    return None


def _made_by_linear(graph: MixGraph, node: fx.Node) -> bool:
    """Whether one linear with a constant weight leads to this value, element by element."""
    for _ in range(64):
        if node.target is torch._C._nn.linear:
            shape = getattr(node.meta.get("example_value"), "shape", ())
            return graph.weight_binding(node.args[1]) is not None and len(shape) in (0, 3)
        tensors = [a for a in node.all_input_nodes if a not in graph.bindings]
        if node.op not in ("call_function", "call_method") or len(tensors) != 1:
            return False
        node = tensors[0]
    return False
