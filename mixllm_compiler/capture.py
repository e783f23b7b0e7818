"""Dynamo's graph in, a `MixGraph` out: real weights, names, and what cannot be captured."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from . import compat
from .errors import GradModeError, UnsupportedModel
from .ir.graph import Binding, MixGraph

_CONTAINERS = ("_modules", "_parameters", "_buffers", "__self__", "_orig_mod")


def capture(gm: fx.GraphModule, example_inputs: Iterable[Any]) -> MixGraph:
    """Bind every lifted tensor of Dynamo's graph to the real one and its name.

    Raises:
        UnsupportedModel: training mode, meta tensors, weights on two devices.
        GradModeError: an input requires gradients.
    """
    inline_regions(gm)
    graph = MixGraph(gm, list(example_inputs))
    placeholders = graph.placeholders()
    for node, value in zip(placeholders, graph.inputs, strict=True):
        if isinstance(value, Tensor) and compat.is_lifted_parameter(node, value):
            source = compat.source_of(node)
            graph.bindings[node] = Binding(node, value, weight_name(source, node), source)
    _bind_attributes(graph)
    graph.root = _root_of(graph)
    _refuse_what_cannot_run(graph)
    return graph


def _bind_attributes(graph: MixGraph) -> None:
    """Under Inductor's freezing, parameters arrive as get_attr nodes instead."""
    for node in graph.graph.nodes:
        if node.op == "get_attr":
            value = _attribute(graph.module, str(node.target))
            if isinstance(value, Tensor):
                graph.bindings[node] = Binding(node, value, str(node.target))


def _attribute(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part, None)
    return module


def weight_name(source: Any, node: fx.Node) -> str:
    """The tensor's name as in `state_dict()`, from the chain of attributes Dynamo recorded."""
    parts = [p for p in compat.source_path(source) if p not in _CONTAINERS]
    return ".".join(parts) or node.name


def module_path(node: fx.Node) -> str:
    """Path of the module whose forward made this node, "" if there is none."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    if not stack:
        return ""
    path = re.sub(r"^[LG]\['[^']*'\]", "", stack[-1][0])
    path = re.sub(r"\['(\w+)'\]|\[(\d+)\]", r".\1\2", path)
    parts = [p for p in path.split(".") if p and p not in _CONTAINERS]
    return ".".join(parts)


def inline_regions(gm: fx.GraphModule) -> None:
    """Inline `nested_compile_region` calls.

    All decoder blocks share one subgraph there, but their rows get different widths, and a pass
    over the outer graph would find no linear at all.
    """
    region = compat.invoke_subgraph()
    for node in [n for n in gm.graph.nodes if n.target is region]:
        body_name = node.args[0]
        body = gm.get_submodule(body_name.target)
        assert isinstance(body, fx.GraphModule)
        inline_regions(body)
        inner = [n for n in body.graph.nodes if n.op == "placeholder"]
        values: dict[fx.Node, Any] = dict(zip(inner, node.args[2:], strict=True))
        with gm.graph.inserting_before(node):
            results: Any = gm.graph.graph_copy(body.graph, values)
        for copy in values.values():
            if isinstance(copy, fx.Node) and copy.op not in ("placeholder", "get_attr"):
                copy.meta.pop("nn_module_stack", None)  # it names the first caller's modules
        for user in list(node.users):
            index: Any = user.args[1]
            user.replace_all_uses_with(results[index])
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
        if not body_name.users:
            gm.graph.erase_node(body_name)


def _root_of(graph: MixGraph) -> torch.nn.Module | None:
    for binding in graph.bindings.values():
        root = compat.root_module(binding.source)
        if root is not None:
            return root
    return None


def _refuse_what_cannot_run(graph: MixGraph) -> None:
    bound = graph.bindings.values()
    meta = [b.name for b in bound if b.tensor.device.type == "meta"]
    if meta:
        raise UnsupportedModel(
            f"{len(meta)} weights have no values (they are on the meta device), first {meta[0]}; "
            "load the checkpoint before compiling"
        )
    if graph.root is not None and graph.root.training:
        raise UnsupportedModel(
            f"{type(graph.root).__name__} is in training mode; quantized weights cannot be "
            "trained. Call model.eval() first"
        )
    if not torch.is_grad_enabled():
        return
    for node, value in zip(graph.placeholders(), graph.inputs, strict=True):
        if isinstance(value, Tensor) and value.requires_grad and node not in graph.bindings:
            raise GradModeError(
                f"the input {node.name} requires a gradient, and quantized weights have none; "
                "call the model under torch.no_grad(), or detach the input"
            )


def refuse_two_devices(bindings: Iterable[Binding]) -> None:
    """One graph, one device: packed weights and kernels are per device.

    Raises:
        UnsupportedModel: linear weights live on more than one device.
    """
    where: dict[str, str] = {}
    for binding in bindings:
        where.setdefault(str(binding.tensor.device), binding.name)
    if len(where) > 1:
        places = ", ".join(f"{name} on {device}" for device, name in where.items())
        raise UnsupportedModel(
            f"the linears of one graph live on {len(where)} devices ({places}); "
            "move the model to one device"
        )
