"""Where a captured graph's loss is, and which of its linears to score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..ir import ops
from ..ir.graph import Matrix, MixGraph
from .supervision import LossInputs

Use = tuple[fx.Node, int | None]
"""A node, and which expert of it if it is a product with many."""


@dataclass(frozen=True)
class Probe:
    """One linear to score: its node, its matrix, and the value [..., K] that it reads.

    Attributes:
        node: the linear, or the product that the matrix takes part in as an expert.
        x: the value before a rotation; the float function does not need it, so that statistics
            are taken there and rotated once.
        turned: rotations of the value and of the weight, to be left out of the run.
    """

    node: fx.Node
    matrix: Matrix
    x: fx.Node
    turned: tuple[fx.Node, ...] = ()

    @property
    def use(self) -> Use:
        """This one use of the matrix."""
        return self.node, self.matrix.expert

    @property
    def input(self) -> Use:
        """What it reads: a value that others may read too, or an expert's rows of one."""
        return self.x, self.matrix.expert


def probes_of(graph: MixGraph) -> dict[fx.Node, tuple[Probe, ...]]:
    """One probe per use of a matrix that will be quantized, by node; experts share one."""
    probes: dict[fx.Node, tuple[Probe, ...]] = {}
    for node, site in graph.sites():
        matrix, x, weight = graph.matrices[site.matrix], node.args[0], node.args[1]
        turned: tuple[fx.Node, ...] = ()
        assert isinstance(x, fx.Node)
        if matrix.transform:
            assert isinstance(weight, fx.Node) and isinstance(x.args[0], fx.Node)
            turned, x = (x, weight), x.args[0]
        probes[node] = (Probe(node, matrix, x, turned),)
    for node, grouped in graph.grouped_sites():
        matrices = [graph.matrices[name] for name in grouped.matrices]
        x, weight, turned = node.args[0], node.args[1], ()
        assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
        if matrices[0].transform:
            turned = tuple(n for n in (x, *weight.all_input_nodes) if n.target is ops.HADAMARD)
            x = x.all_input_nodes[0]
        probes[node] = tuple(Probe(node, matrix, x, turned) for matrix in matrices)
    return probes


def siblings(graph: MixGraph) -> dict[str, str]:
    """Matrix → the first matrix of those that read the same activation value."""
    first: dict[fx.Node, str] = {}
    found: dict[str, str] = {}
    for node, site in graph.sites():
        x = node.args[0]
        assert isinstance(x, fx.Node)
        # A matrix that is used at several places belongs to the first of them.
        found.setdefault(site.matrix, first.setdefault(x, found.get(site.matrix, site.matrix)))
    # Experts read rows of their own: each is alone.
    found |= {name: name for _, site in graph.grouped_sites() for name in site.matrices}
    return found


def gradient_stops(graph: MixGraph) -> str:
    """Why gradients cannot be taken in this graph, "" if they can."""
    packed = [m.name for m in graph.matrices.values() if m.packed is not None]
    if packed:
        return (
            f"{len(packed)} linears are quantized already (first {packed[0]}) and have no gradient"
        )
    half = [m.name for m in graph.active() if m.binding.tensor.dtype == torch.float16]
    if half:
        return f"gradients overflow or vanish in float16 ({len(half)} linears, first {half[0]})"
    return ""


def loss_inputs(graph: MixGraph) -> LossInputs:
    """Token ids, their mask and the logits, by what the graph does with them.

    Ids are what the largest embedding table is read with; logits are a floating-point output
    that one linear made, seen through views, casts and element-wise operations. Shapes alone do
    not tell: hidden sizes and vocabularies collide.
    """
    place = {node: i for i, node in enumerate(graph.placeholders())}
    ids = _ids(graph, place)
    mask = next((n for n, i in place.items() if _is_mask(graph, n, i, ids, place)), None)
    activations = tuple(n for n, i in place.items() if _is_activation(graph, n, i))
    (output,) = (n for n in graph.graph.nodes if n.op == "output")
    outputs = tuple(output.all_input_nodes)
    logits = next((n for n in outputs if _made_by_linear(graph, n)), None)
    return LossInputs(ids, mask, logits, activations, outputs)


def _is_activation(graph: MixGraph, node: fx.Node, index: int) -> bool:
    value = graph.inputs[index]
    plain = isinstance(value, Tensor) and node not in graph.bindings
    return plain and value.is_floating_point() and value.dim() >= 2


def _ids(graph: MixGraph, place: dict[fx.Node, int]) -> fx.Node | None:
    best: tuple[int, fx.Node] | None = None
    for node in graph.calls(torch.nn.functional.embedding, torch.embedding):
        table = next((b for a in node.args if (b := graph.weight_binding(a))), None)
        rows = table.tensor.shape[0] if table is not None else 0
        for reader in map(_seen_through, node.args):
            if not isinstance(reader, fx.Node) or reader not in place:
                continue
            ids = reader not in graph.bindings and _is_ids(graph.inputs[place[reader]])
            if ids and (best is None or rows > best[0]):
                best = rows, reader
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


def _is_mask(
    graph: MixGraph, node: fx.Node, index: int, ids: fx.Node | None, place: dict[fx.Node, int]
) -> bool:
    value = graph.inputs[index]
    if ids is None or node is ids or not isinstance(value, Tensor):
        return False
    fits = value.shape == graph.inputs[place[ids]].shape and not value.is_floating_point()
    return fits and "attention_mask" in node.name


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
