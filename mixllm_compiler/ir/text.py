"""A graph as Python that a person reads: annotations beside the calls, modules as headings."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from .annotations import grouped_of, quantized_experts_of, quantized_of, site_of
from .graph import Matrix, MixGraph


def render(graph: MixGraph, title: str) -> str:
    """The graph as text: header, `forward`, one line per node.

    Tensor shapes stand behind calls; weights are called by their names in the model.
    """
    lines = [f"# {title} · {_headline(graph)}"]
    names = {node: b.name for node, b in graph.bindings.items()}
    arguments = [n.name for n in graph.placeholders() if n not in names]
    lines.append(f"def forward(self, {', '.join(arguments)}):")
    unread = sum(1 for n in graph.placeholders() if n in names and not n.users)
    if unread:
        lines.append(f"    # {unread} float weights are no longer read")
    heading = None
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            continue
        place = _module(node)
        if place and place != heading and node.op.startswith("call"):
            heading = place
            lines.append(f"    # {place}")
        lines.append("    " + _line(graph, node, names))
    return "\n".join(lines) + "\n"


def _headline(graph: MixGraph) -> str:
    planned = [m for m in graph.matrices.values() if m.widths is not None]
    if not planned:
        return f"{len(graph.matrices)} constant matrices"
    state = "quantized" if all(m.packed is not None for m in planned) else "planned"
    return f"{len(planned)} of {len(graph.matrices)} linears {state}"


def _module(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    path = stack[-1][0] if stack else ""
    return path.partition("]")[2].lstrip(".") if path.startswith(("L[", "G[")) else path


def _line(graph: MixGraph, node: fx.Node, names: dict[fx.Node, str]) -> str:
    def show(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names.get(value, value.name)
        if isinstance(value, tuple):
            inner = ", ".join(show(v) for v in value)
            return f"({inner},)" if len(value) == 1 else f"({inner})"
        if isinstance(value, list):
            return "[" + ", ".join(show(v) for v in value) + "]"
        return repr(value)

    args = [show(a) for a in node.args]
    args += [f"{k}={show(v)}" for k, v in node.kwargs.items()]
    if node.op == "output":
        return f"return {show(node.args[0])}"
    if node.op == "get_attr":
        return f"{node.name} = self.{node.target}"
    if node.op == "call_method":
        call = f"{args[0]}.{node.target}({', '.join(args[1:])})"
    elif node.target is operator.getitem:
        call = f"{args[0]}[{args[1]}]"
    else:
        call = f"{_target(node.target)}({', '.join(args)})"
    comment = _comment(graph, node)
    return f"{node.name} = {call}" + (f"  # {comment}" if comment else "")


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return target.name().replace("::", ".")
    return getattr(target, "__name__", str(target)).removeprefix("torch.")


def _comment(graph: MixGraph, node: fx.Node) -> str:
    parts = []
    value = node.meta.get("example_value")
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        parts.append(f"{dtype}[{', '.join(str(s) for s in value.shape)}]")
    site, quantized = site_of(node), quantized_of(node)
    if site is not None:
        matrix = graph.matrices[site.matrix]
        parts.append(f"{site.matrix} [{site.n}×{site.k}]")
        parts.append(f"float: {site.kept_float}" if site.kept_float else _widths([matrix]))
    elif quantized is not None and quantized.role in ("mixed_gemm", "linear"):
        parts.append(quantized.matrix)
        if quantized.kernel != "reference":
            parts.append(quantized.kernel)
    grouped, experts = grouped_of(node), quantized_experts_of(node)
    if grouped is not None:
        parts.append(f"{_first_to_last(grouped.matrices)} [{grouped.n}×{grouped.k}]")
        matrices = [graph.matrices[name] for name in grouped.matrices]
        why = grouped.kept_float
        parts.append(f"float: {why}" if why else _widths(matrices))
    elif experts is not None:
        parts.append(_first_to_last(experts.matrices))
    return " · ".join(p for p in parts if p)


def _first_to_last(names: tuple[str, ...]) -> str:
    return f"{names[0]} to {names[-1].rpartition('.')[2]}"


def _widths(matrices: list[Matrix]) -> str:
    widths = [m.widths for m in matrices if m.widths is not None]
    if not widths:
        return "scored" if matrices[0].losses is not None else ""
    rows = torch.bincount(torch.cat(widths).long()).tolist()
    return " ".join(f"w{b}:{n}" for b, n in enumerate(rows) if n)
