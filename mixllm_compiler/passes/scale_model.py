"""A copy of a model with scaled and shifted activations, and the same float function.

Weights are rewritten before anything is scored, so scores, plans, rotation and quantizers need
not know of it. What a norm or a linear in front of an activation cannot take stays in the model as
a multiplication (`InputChannels`). For comparisons: nothing here is on by default.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import OptionError, UnsupportedModel, nearest
from ..ir.annotations import LinearSite
from ..ir.graph import MixGraph
from ..options import Options
from ..transforms.channels import InputChannels
from ..transforms.hadamard import block_for
from .captured_model import capture_model
from .input_statistics import Sites, readers, statistics
from .producers import Producer, producer_of
from .scaling_methods import METHODS, SHIFTING, Inputs

_SAMPLE = 128  # tokens of each batch on which AWQ's search measures errors


def scale_model(
    model: nn.Module,
    batches: Sequence[Tensor],
    method: str,
    *,
    alpha: float | None = None,
    rotate: int = 0,
    **extra: Any,
) -> nn.Module:
    """A copy of a float model with the channels of its linears' inputs scaled.

    Args:
        batches: token ids [B, T] to calibrate on, all of one shape.
        method: "awq", "smoothquant", "outliertune" or "mergequant".
        alpha: exponent of AWQ (None searches one for each activation) and SmoothQuant (0.5).
        rotate: block of the Hadamard transform that the plan will use; AWQ's search knows of it.
        extra: further arguments of the model's forward.

    Raises:
        OptionError: an unknown method.
        GraphBreakError: the model does not capture in one graph.
        UnsupportedModel: the copy computes something else than the model.
    """
    if method not in METHODS:
        raise OptionError(f"unknown method {method!r}.{nearest(method, METHODS)}")
    twin = copy.deepcopy(model)
    captured = capture_model(twin, batches, Options(rotate=0, quiet=True), **extra)
    if method in SHIFTING and _give_biases(twin, captured.graph):
        captured = capture_model(twin, batches, Options(rotate=0, quiet=True), **extra)
    graph = captured.graph
    first = batches[0][:1].to(next(model.parameters()).device)
    search = method == "awq" and alpha is None
    with torch.no_grad():
        groups = readers(graph)
        seen = statistics(captured, groups, _SAMPLE if search else 0)
        for x, sites in groups.items():
            producer = producer_of(graph, x, [node for node, _ in sites], sites[0][1].k)
            weights = torch.cat([graph.matrices[s.matrix].stored() for _, s in sites])
            block = block_for(weights.shape[1], rotate) if rotate else 0
            inputs = Inputs(seen[x], weights, producer, block)
            scale, shift = METHODS[method](inputs, alpha)
            for node, site in sites:
                _scale_weight(graph, node, site, scale, shift)
            _scale_input(twin, producer, sites, scale, shift)
        check_equal(model(first, **extra), twin(first, **extra), method)
    return twin


def _give_biases(twin: nn.Module, graph: MixGraph) -> bool:
    """Zero biases for linears without one: a shift will need them, of producers as well."""
    modules: list[Any] = [twin.get_submodule(s.module) for _, s in graph.sites() if s.module]
    bare = [m for m in modules if getattr(m, "bias", None) is None]
    for module in bare:
        module.bias = nn.Parameter(module.weight.new_zeros(module.out_features))
    return bool(bare)


def _scale_weight(
    graph: MixGraph, node: fx.Node, site: LinearSite, scale: Tensor | None, shift: Tensor | None
) -> None:
    """W diag(s) and b + W z, in place."""
    weight, bias = graph.matrices[site.matrix].stored(), node.args[2]
    if shift is not None:
        assert isinstance(bias, fx.Node)
        tensor = graph.bindings[bias].tensor.detach()
        tensor.copy_(tensor.double() + weight.double() @ shift)
    if scale is not None:
        weight.copy_(weight.double() * scale)


def _scale_input(
    twin: nn.Module,
    producer: Producer | None,
    sites: Sites,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    """(x - z) / s: in the producer as far as it can, the rest in front of each linear."""
    if producer is not None:
        if shift is not None and producer.bias is not None:
            producer.shift(shift)
            shift = None
        if scale is not None:
            producer.scale(scale)
            shift = None if shift is None else shift / scale
            scale = None
    if scale is None and shift is None:
        return
    for _, site in sites:
        parent, _, leaf = site.module.rpartition(".")
        linear: Any = twin.get_submodule(site.module)
        rest = [None if t is None else t.to(linear.weight.dtype) for t in (scale, shift)]
        wrapped = nn.Sequential(InputChannels(*rest), linear)
        setattr(twin.get_submodule(parent), leaf, wrapped.train(linear.training))


def check_equal(before: Any, after: Any, method: str) -> None:
    """Producers are found by the form of the graph; this proves that they were the right ones.

    Raises:
        UnsupportedModel: the outputs differ.
    """
    before, after = (getattr(y, "logits", y) for y in (before, after))
    error = float((after - before).abs().max() / before.abs().max())
    if not error < (1e-3 if before.dtype == torch.float32 else 0.05):  # bf16 rounds anew
        raise UnsupportedModel(
            f"{method} changed the outputs of {type(before).__name__} by {error:.1%} of the "
            "largest: this model uses a weight in a way that the graph does not show"
        )
