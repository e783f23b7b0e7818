"""`MixGraph`: an FX graph, the real weights behind it, and the questions passes ask of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor, fx

from ..errors import WeightError
from ..formats.layout import Layout, PackedWeight
from ..transforms.hadamard import block_hadamard
from . import ops
from .annotations import GroupedSite, LinearSite, annotate, grouped_of, quantized_of, site_of

CARRIED_META = ("stack_trace", "nn_module_stack", "source_fn_stack", "example_value")


@dataclass
class Binding:
    """A lifted parameter or buffer: its node, the real tensor, its name in the model."""

    node: fx.Node
    tensor: Tensor
    name: str
    source: Any = None


Rows = tuple[Tensor, Tensor | None]
"""Widths and spans of a matrix's rows, see `Matrix`."""


@dataclass
class Matrix:
    """One constant matrix and how far it is on its way to a kernel argument.

    Attributes:
        name: module path of its first use, or the weight's own name.
        binding: the float parameter (for a `PackedLinear`, its packed buffer).
        transposed: whether the parameter is stored [K, N] (transformers' Conv1D).
        expert: which slice of a parameter [E, N, K] (or [E, K, N]) this is; None for a whole one.
        kept_float: why it is not quantized, "" if it is.
        transform: applied along K before quantizing, e.g. "hadamard:128".
        losses: fp32 [N, F] expected loss per row and candidate format (`annotate-salience`).
        widths: uint8 [N] bits per row (`allocate-bits`).
        spans: uint8 [N], see `SitePlan`; None if no groups share anything.
        packed: the blob that the graph's ops read (`quantize-weights`, `pack-weights`).
        attr: name of the graph's constant that holds the blob.
        kernel, packing: what `select-kernels` chose.
    """

    name: str
    binding: Binding
    n: int
    k: int
    transposed: bool = False
    expert: int | None = None
    kept_float: str = ""
    transform: str = ""
    losses: Tensor | None = None
    widths: Tensor | None = None
    spans: Tensor | None = None
    packed: PackedWeight | None = None
    attr: str = ""
    kernel: str = ""
    packing: str = ""

    @property
    def parameter(self) -> str:
        """What holds its values, for people."""
        return self.binding.name if self.expert is None else self.name

    def stored(self) -> Tensor:
        """The float matrix [N, K] as the checkpoint has it.

        Raises:
            WeightError: the storage was released.
        """
        w = readable(self.binding)
        if self.expert is not None:
            w = w[self.expert]
        return w.t() if self.transposed else w

    def checked(self) -> Tensor:
        """`stored()`, after a look at its values.

        Raises:
            WeightError: the storage was released, or values are not finite.
        """
        w = self.stored()
        if not bool(torch.isfinite(w).all()):
            bad = int((~torch.isfinite(w)).sum())
            raise WeightError(
                f"{self.parameter} has {bad} values that are NaN or infinite; "
                "repair the checkpoint, or exclude this matrix with options={'exclude': [...]}"
            )
        return w

    def value(self) -> Tensor:
        """The float matrix [N, K], transformed along K if a pass asked for it.

        Raises:
            WeightError: the storage was released, or values are not finite.
        """
        w = self.checked()
        if self.transform:
            block = int(self.transform.removeprefix("hadamard:"))
            w = block_hadamard(w.to(torch.promote_types(w.dtype, torch.float32)), block)
        return w


def readable(binding: Binding) -> Tensor:
    """The tensor behind a binding, detached.

    Raises:
        WeightError: its storage was released (reading it would crash the process).
    """
    from .. import compat

    compat.refuse_released(binding.tensor, binding.name)
    return binding.tensor.detach()


@dataclass
class MixGraph:
    """What a pipeline works on.

    Attributes:
        module: Dynamo's GraphModule. The same `fx.Graph` object from start to end: Dynamo writes
            its call from it after the backend returns.
        bindings: placeholder or get_attr node → the real tensor behind it.
        matrices: every constant matrix used by a linear, by name, in order of first use.
        inputs: example inputs, one per placeholder.
        facts: what has been established so far; passes declare what they need and add.
    """

    module: fx.GraphModule
    inputs: list[Any]
    bindings: dict[fx.Node, Binding] = field(default_factory=dict)
    matrices: dict[str, Matrix] = field(default_factory=dict)
    facts: set[str] = field(default_factory=set)
    root: torch.nn.Module | None = None

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    # -- questions -------------------------------------------------------------------------------

    def placeholders(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def linears(self) -> Iterator[tuple[fx.Node, LinearSite]]:
        """Annotated linears in graph order, those kept float included."""
        for node in self.graph.nodes:
            if (site := site_of(node)) is not None:
                yield node, site

    def sites(self) -> Iterator[tuple[fx.Node, LinearSite]]:
        """Linears that will be quantized."""
        return ((node, site) for node, site in self.linears() if not site.kept_float)

    def grouped_sites(self) -> Iterator[tuple[fx.Node, GroupedSite]]:
        """Products with stacks of matrices that will be quantized, in graph order."""
        for node in self.graph.nodes:
            if (site := grouped_of(node)) is not None and not site.kept_float:
                yield node, site

    def active(self) -> list[Matrix]:
        """Matrices that will be quantized and still are float, in order of first use."""
        used = {site.matrix for _, site in self.sites()}
        used.update(name for _, site in self.grouped_sites() for name in site.matrices)
        return [m for name, m in self.matrices.items() if name in used]

    def calls(self, *targets: Any) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "call_function" and n.target in targets]

    def dataflow(self) -> nx.DiGraph[fx.Node]:
        """Producers → consumers of every value."""
        flow: nx.DiGraph[fx.Node] = nx.DiGraph()
        for node in self.graph.nodes:
            flow.add_node(node)
            flow.add_edges_from((producer, node) for producer in node.all_input_nodes)
        return flow

    def quantizers_by_input(self) -> dict[fx.Node, list[fx.Node]]:
        """Activation quantizers grouped by the value they read, in graph order."""
        flow, place = self.dataflow(), {n: i for i, n in enumerate(self.graph.nodes)}
        found = {}
        for value in self.graph.nodes:
            readers = [c for c in flow.successors(value) if c.target is ops.QUANTIZE_ACTIVATION]
            if readers:
                found[value] = sorted(readers, key=place.__getitem__)
        return found

    def written_between(self, value: fx.Node, first: fx.Node, second: fx.Node) -> bool:
        """Whether something may write into `value` (or a view of it) between two of its readers."""
        same, between = aliases(value), False
        for node in self.graph.nodes:
            if node is first:
                between = True
            elif node is second:
                return False
            elif between and same & set(mutated_inputs(node)):
                return True
        return False

    def refuse_released(self) -> None:
        """To be asked before the graph runs with its real weights.

        Raises:
            WeightError: a float weight that it reads was released.
        """
        for node, binding in self.bindings.items():
            if node.users:
                readable(binding)

    # -- changes ---------------------------------------------------------------------------------

    def replace(self, node: fx.Node, build: Callable[[], fx.Node]) -> fx.Node:
        """Put what `build` inserts in place of `node`; erase only what that orphans."""
        with self.graph.inserting_before(node):
            new = build()
        for key in CARRIED_META:
            if key in node.meta:
                new.meta.setdefault(key, node.meta[key])
        operands = list(node.all_input_nodes)
        self.replace_all_uses(node, new)
        for operand in operands:
            self._erase_unused_view(operand)
        return new

    def replace_all_uses(self, node: fx.Node, by: fx.Node) -> None:
        """Point the users of `node` to `by` and erase `node`."""
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def _erase_unused_view(self, node: fx.Node) -> None:
        """Erase a rotation or a view of a weight that lost its last user. Never general dead-code
        elimination: Dynamo's graph holds in-place writes that have no users (static KV caches).
        """
        pure = node.target is ops.HADAMARD or self.weight_binding(node) is not None
        if node.users or not pure or node in self.bindings:
            return
        operands = list(node.all_input_nodes)
        self.graph.erase_node(node)
        for operand in operands:
            self._erase_unused_view(operand)

    def constant(self, matrix: Matrix, blob: Tensor) -> fx.Node:
        """A get_attr node for a matrix' blob, registered so that AOTAutograd accepts it.

        The buffer is persistent: a non-persistent one gives Inductor's cache another key in
        every process. Nodes are inserted at the current insertion point.
        """
        from .. import compat

        attr = "mixllm_" + matrix.name.replace(".", "_")
        if attr not in self.module._buffers:
            self.module.register_buffer(attr, blob)
            names = getattr(self.module, "_param_name_to_source", None)
            if names is not None and matrix.binding.source is not None:
                names[attr] = compat.buffer_source(matrix.binding.source, attr)
        else:
            self.module._buffers[attr] = blob
        matrix.attr = attr
        node = self.graph.get_attr(attr)
        node.meta["example_value"] = blob
        return node

    def weight_binding(self, node: object) -> Binding | None:
        """The binding behind a constant or a pure view of it (`t`, `transpose`, `hadamard`)."""
        while isinstance(node, fx.Node):
            if node in self.bindings:
                return self.bindings[node]
            if not is_weight_view(node):
                return None
            node = node.args[0]
        return None

    def reads_transposed(self, node: object) -> bool:
        """Whether the views between a constant and this node swap its dimensions."""
        swaps = 0
        while isinstance(node, fx.Node) and node not in self.bindings and node.args:
            swaps += is_transpose(node)
            node = node.args[0]
        return swaps % 2 == 1

    def settle(self) -> None:
        """Make the module's code follow its graph."""
        self.graph.lint()
        self.module.recompile()


def is_weight_view(node: fx.Node) -> bool:
    """A transpose of a matrix or a transform along K, as passes put them on weights."""
    return node.target is ops.HADAMARD or is_transpose(node)


def is_transpose(node: fx.Node) -> bool:
    """Whether a node swaps the last two dimensions of a weight, however it is spelled."""
    dims: tuple[Any, ...] = node.args[1:]
    if node.op == "call_function" and node.target is getattr:
        return dims in (("T",), ("mT",))
    named = node.op == "call_method" and node.target in ("t", "transpose", "permute")
    if node.kwargs or not (named or node.target in (torch.t, torch.transpose, torch.permute)):
        return False
    name = node.target if named else getattr(node.target, "__name__", "")
    if len(dims) == 1 and isinstance(dims[0], tuple | list):
        dims = tuple(dims[0])
    if name == "t" or len(dims) != 2 or not all(isinstance(d, int) for d in dims):
        return name == "t" and not dims
    first, second = (d % 2 for d in dims)
    return (first, second) == (1, 0) if name == "permute" else first != second


def mutated_inputs(node: fx.Node) -> list[fx.Node]:
    """Nodes whose values this node writes into."""
    nodes = [a for a in node.args if isinstance(a, fx.Node)]
    if node.op == "call_method":
        name = str(node.target)
        writes = name == "__setitem__" or _is_inplace_name(name)
        return nodes[:1] if writes else []
    if node.op != "call_function":
        return []
    written = [v for k, v in node.kwargs.items() if k == "out" and isinstance(v, fx.Node)]
    if node.kwargs.get("inplace") is True:
        written += nodes[:1]
    if isinstance(node.target, torch._ops.OpOverload):
        for schema, arg in zip(node.target._schema.arguments, node.args, strict=False):
            if schema.alias_info is not None and schema.alias_info.is_write:
                written += [arg] if isinstance(arg, fx.Node) else []
    elif node.target is operator.setitem or _is_inplace_name(getattr(node.target, "__name__", "")):
        written += nodes[:1]
    return written


_AUGMENTED = {"iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"} | {
    *("ilshift", "irshift", "iand", "ixor", "ior"),
}


def _is_inplace_name(name: str) -> bool:
    """`add_`, `iadd` (as in `operator`), `__iadd__`; not `operator.and_`, a plain `&`."""
    if name in ("and_", "or_", "not_", "is_"):
        return False
    if name.removeprefix("__").removesuffix("__") in _AUGMENTED:
        return True
    return name.endswith("_") and not name.endswith("__")


_VIEWS = {
    *("view", "view_as", "reshape", "flatten", "unflatten", "transpose", "permute", "t"),
    *("squeeze", "unsqueeze", "expand", "narrow", "select", "chunk", "split", "unbind"),
    *("getitem", "detach", "contiguous"),
}


def aliases(value: fx.Node) -> set[fx.Node]:
    """The value, the tensors it is a view of, and views of all of them."""
    base = value
    while _is_view(base) and isinstance(base.args[0], fx.Node):
        base = base.args[0]
    found, todo = {base}, [base]
    while todo:
        for user in todo.pop().users:
            if user not in found and _is_view(user):
                found.add(user)
                todo.append(user)
    return found


def _is_view(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return node.op in ("call_method", "call_function") and name in _VIEWS and bool(node.args)


def layout_of(node: fx.Node) -> Layout | None:
    """The layout text that a mixed op carries."""
    index = {ops.MIXED_GEMM: 4, ops.DEQUANTIZE: 4}.get(node.target)  # type: ignore[call-overload]
    return None if index is None else Layout.parse(str(node.args[index]))


__all__ = [
    "Binding",
    "LinearSite",
    "Matrix",
    "MixGraph",
    "aliases",
    "annotate",
    "is_transpose",
    "is_weight_view",
    "layout_of",
    "mutated_inputs",
    "quantized_of",
    "readable",
]
