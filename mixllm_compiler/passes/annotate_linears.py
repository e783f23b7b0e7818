"""Name every linear, and decide which of them stay float and why.

Decisions follow structure, never a list of model names: an output head is recognized by its
vocabulary-sized output that nothing but the graph's result reads, a router by its size, fused
experts by their third dimension.
"""

from __future__ import annotations

from fnmatch import fnmatch
from typing import TYPE_CHECKING

import torch
from torch import fx

from .. import compat
from ..capture import module_path, refuse_two_devices
from ..errors import OptionError, UnsupportedModel, nearest
from ..ir import ops
from ..ir.annotations import LinearSite, QuantizedSite, annotate
from ..ir.graph import Binding, Matrix, MixGraph
from .base import Changes, Pass
from .canonicalize_linears import LINEAR
from .experts import Experts

if TYPE_CHECKING:
    from ..allocation.plan import Plan
    from .context import Context

TILE = 64  # rows; a smaller matrix costs more to launch than it saves
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_FROM_LINEAR_TO_OUTPUT = {
    *("getitem", "view", "reshape", "flatten", "unflatten", "transpose", "squeeze", "unsqueeze"),
    *("float", "to", "contiguous", "type_as", "clone"),
}


class AnnotateLinears(Pass):
    name = "annotate-linears"
    stage = "annotate"
    requires = {"canonical"}
    ensures = {"annotated"}

    def run(self, graph: MixGraph, ctx: Context) -> Changes:
        changes = Changes()
        self._by_weight: dict[tuple[int, bool], Matrix] = {}
        _refuse_quantized(graph)
        heads = _head_linears(graph)
        experts = Experts(graph, lambda matrix: self._reason(matrix, False, ctx))
        for node in graph.graph.nodes:
            for name, what in experts.annotate(node):
                changes.add(name, what)
            binding = graph.weight_binding(node.args[1]) if node.target is LINEAR else None
            if binding is None or binding.tensor.dim() != 2:
                continue
            matrix = self._matrix(graph, node, binding)
            if not matrix.kept_float:
                matrix.kept_float = self._reason(matrix, node in heads, ctx)
            site = LinearSite(matrix.name, module_path(node), matrix.n, matrix.k, matrix.kept_float)
            annotate(node, site)
            changes.add(matrix.name, matrix.kept_float or f"[{matrix.n}×{matrix.k}]")
        for name, matrix in experts.others().items():
            graph.matrices[name] = matrix
            changes.add(name, matrix.kept_float)
        _bind_packed(graph)
        _check_patterns(graph, ctx)
        _refuse_if_there_are_none(graph, ctx)
        _refuse_if_all_too_small(graph)
        refuse_two_devices(m.binding for m in graph.active())
        return changes

    def _matrix(self, graph: MixGraph, node: fx.Node, binding: Binding) -> Matrix:
        """One matrix per parameter (and way to read it), however often it is used."""
        transposed = graph.reads_transposed(node.args[1])
        known = self._by_weight.get((id(binding.tensor), transposed))
        if known is not None:
            return known
        n, k = binding.tensor.shape[::-1] if transposed else binding.tensor.shape
        owner = module_path(node)
        # A tied head is called by lm_head but its weight is named after the embedding.
        called = owner and _is_linear_module(node)
        name = owner if called else binding.name.removesuffix(".weight")
        while name in graph.matrices:
            name += "_"
        matrix = Matrix(name, binding, int(n), int(k), transposed)
        self._by_weight[id(binding.tensor), transposed] = graph.matrices[name] = matrix
        return matrix

    @staticmethod
    def _reason(matrix: Matrix, head: bool, ctx: Context) -> str:
        """Why a matrix stays float; "" if it is quantized."""
        options, dtype = ctx.options, matrix.binding.tensor.dtype
        if dtype not in _FLOATS:
            raise UnsupportedModel(
                f"{matrix.parameter} is {str(dtype).removeprefix('torch.')}; linears are "
                "quantized from float32, bfloat16 or float16: convert the model first"
            )
        planned = None if ctx.plan is None else planned_name(ctx.plan, matrix.name)
        if ctx.plan is not None and planned and planned in ctx.plan.float_sites:
            return ctx.plan.float_sites[planned]
        for pattern in options.exclude:
            if fnmatch(matrix.name, pattern):
                return f"excluded by {pattern!r}"
        if head and not (options.lm_head or planned):
            return "the output head (quantize it with lm_head=True)"
        if matrix.k < ctx.group:
            return f"K = {matrix.k} is smaller than a group of {ctx.group}"
        if min(matrix.n, matrix.k) < TILE:
            return f"min(N, K) = {min(matrix.n, matrix.k)} is smaller than a tile of {TILE}"
        return ""


def planned_name(plan: Plan, name: str) -> str | None:
    """What a plan calls this matrix: its name, or its name behind a prefix either side has."""
    if name in plan.sites or name in plan.float_sites:
        return name
    known = (*plan.sites, *plan.float_sites)
    near = (k for k in known if k.endswith("." + name) or name.endswith("." + k))
    return next(near, None)


def _is_linear_module(node: fx.Node) -> bool:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    kind = stack[-1][1] if stack else None
    name = kind if isinstance(kind, str) else getattr(kind, "__name__", "")
    return name.rpartition(".")[2] in ("Linear", "Conv1D", "NonDynamicallyQuantizableLinear")


def _head_linears(graph: MixGraph) -> set[fx.Node]:
    """Linears as wide as an embedding table whose output only leaves the graph."""
    embedding = torch.nn.functional.embedding
    tables = [graph.weight_binding(n.args[1]) for n in graph.calls(embedding, torch.embedding)]
    sizes = {b.tensor.shape[0] for b in tables if b is not None and b.tensor.dim() == 2}
    tied = {id(b.tensor) for b in tables if b is not None}
    found = set()
    for node in graph.calls(LINEAR):
        binding = graph.weight_binding(node.args[1])
        if binding is None or binding.tensor.dim() != 2:
            continue
        wide = binding.tensor.shape[0] in sizes and _only_leaves(node)
        if id(binding.tensor) in tied or wide:
            found.add(node)
    return found


def _only_leaves(node: fx.Node) -> bool:
    for user in node.users:
        name = user.target if user.op == "call_method" else getattr(user.target, "__name__", "")
        if user.op != "output" and not (name in _FROM_LINEAR_TO_OUTPUT and _only_leaves(user)):
            return False
    return bool(node.users)


def _bind_packed(graph: MixGraph) -> None:
    """Matrices of `PackedLinear` modules: their ops are in the graph already."""
    from ..formats.layout import Layout, PackedWeight
    from ..formats.plain import spans_of

    for node in graph.calls(ops.MIXED_GEMM):
        blob = node.args[3]
        binding = graph.bindings.get(blob) if isinstance(blob, fx.Node) else None
        if binding is None:
            continue
        name = binding.name.removesuffix(".packed")
        layout = Layout.parse(str(node.args[4]))
        matrix = Matrix(name, binding, layout.n, layout.k, kept_float="quantized module")
        matrix.packed = PackedWeight(binding.tensor, layout)
        matrix.spans = spans_of(binding.tensor, layout)
        graph.matrices[name] = matrix
        annotate(node, QuantizedSite(name, "mixed_gemm"))
        for user in node.users:
            if user.target is ops.DEQUANTIZE:
                annotate(user, QuantizedSite(name, "dequantize"))


def _check_patterns(graph: MixGraph, ctx: Context) -> None:
    """A pattern that names nothing is a mistake; in one piece of several it may be fine."""
    names = list(graph.matrices)
    for pattern in (*ctx.options.exclude, *ctx.options.pins):
        if names and not ctx.options.partial and not any(fnmatch(n, pattern) for n in names):
            raise OptionError(
                f"the pattern {pattern!r} matches none of {len(names)} linears."
                f"{nearest(pattern, names)}"
            )


def _refuse_quantized(graph: MixGraph) -> None:
    """Weights in float8 or in integers, whatever op reads them."""
    for node, binding in graph.bindings.items():
        w = binding.tensor
        float8 = w.is_floating_point() and w.element_size() == 1
        integers = isinstance(w, torch.nn.Parameter) and not w.is_floating_point()
        if w.dim() >= 2 and node.users and (float8 or integers):
            raise UnsupportedModel(
                f"{binding.name} is {str(w.dtype).removeprefix('torch.')}: this model is already "
                "quantized (or in an 8-bit float); compile the original checkpoint"
            )


def _refuse_if_there_are_none(graph: MixGraph, ctx: Context) -> None:
    """A whole model without linears would run in float, and nobody asked for that."""
    piece = compat.is_resumed_frame() or compat.break_reason(graph.module) is not None
    if not (graph.matrices or piece or ctx.plan is not None or ctx.options.partial):
        root = "this graph" if graph.root is None else type(graph.root).__name__
        raise UnsupportedModel(
            f"no linear with a constant weight was found in {root}, so there is nothing to "
            "quantize; compile it without this backend. If it is a piece of a larger model, say "
            "so with options={'partial': True}"
        )


def _refuse_if_all_too_small(graph: MixGraph) -> None:
    linears = [m for m in graph.matrices.values() if m.binding.tensor.dim() == 2 and not m.packed]
    shape = [m for m in linears if "smaller than" in m.kept_float]
    if linears and len(shape) == len(linears):
        first = shape[0]
        raise UnsupportedModel(
            f"none of {len(shape)} linears can be quantized; {first.name}: {first.kept_float}. "
            "A smaller group (options={'group': 32}) may fit this model"
        )
