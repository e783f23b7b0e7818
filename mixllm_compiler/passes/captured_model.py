"""A whole model captured once, with the inputs of every batch, and not run."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .. import compat
from ..capture import capture
from ..errors import GraphBreakError, MixLLMError, UnsupportedModel
from ..frames import own_frame
from ..ir.graph import MixGraph
from ..options import Options
from .annotate_linears import AnnotateLinears
from .canonicalize_linears import CanonicalizeLinears
from .context import Context
from .pipeline import Pipeline
from .rotate_inputs import RotateInputs

Values = dict[fx.Node, Any]


@dataclass(frozen=True)
class CapturedModel:
    """A float graph and what it is to be run with.

    Attributes:
        graph: canonical linears, annotated, inputs rotated if the options say so.
        options: those it was captured with.
        weights: placeholder → parameter or buffer, the same in every batch.
        batches: per batch, placeholder → input.
        rotation: Hadamard block that linears' inputs were given, 0 if none was.
    """

    graph: MixGraph
    options: Options
    weights: Values
    batches: tuple[Values, ...]
    rotation: int

    def inputs(self, batch: int) -> Values:
        """Everything that the graph takes in one batch."""
        return self.weights | self.batches[batch]


def even_batch(sequences: int, wanted: int) -> int:
    """The largest number of sequences up to `wanted` that divides all into equal batches."""
    return next(b for b in range(min(wanted, sequences), 0, -1) if sequences % b == 0)


def capture_model(
    model: nn.Module, batches: Sequence[Tensor], options: Options, **extra: Any
) -> CapturedModel:
    """Capture a model for batches of token ids [B, T], all of one shape.

    Dynamo calls the graph once a batch; that call keeps its arguments and computes nothing.

    Args:
        extra: further arguments of the model's forward; `use_cache=False` is added where it fits.

    Raises:
        GraphBreakError: the model does not capture in one graph.
        UnsupportedModel: it has no linear to quantize.
    """
    forward = getattr(model, "_mixllm_float_forward", model.forward)
    if "use_cache" in inspect.signature(forward).parameters:
        extra = {"use_cache": False, **extra}
    graphs: list[MixGraph] = []
    ctx = Context(options)
    calls: list[Sequence[Any]] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compat.self_test()
        outputs = _blank_outputs(gm)
        graph = capture(gm, inputs)
        Pipeline([CanonicalizeLinears(), AnnotateLinears(), RotateInputs()]).run(graph, ctx)
        if not graph.active():
            raise UnsupportedModel(no_linears(graph))
        graph.refuse_released()
        for matrix in graph.active():
            matrix.checked()
        graphs.append(graph)

        def call(*args: Any) -> Any:
            calls.append(args)
            return outputs

        return call

    compiled = torch.compile(own_frame(forward), backend=backend, fullgraph=True, dynamic=False)
    device = next(model.parameters()).device
    for ids in batches:
        _call(compiled, model, ids.to(device), extra)
    if len(graphs) != 1:
        raise GraphBreakError(
            f"{type(model).__name__} was captured {len(graphs)} times for {len(batches)} batches; "
            "give batches of one shape"
        )
    (graph,) = graphs
    names = graph.placeholders()
    weights = {n: v for n, v in zip(names, calls[0], strict=True) if n in graph.bindings}
    own = tuple(
        {n: v for n, v in zip(names, args, strict=True) if n not in graph.bindings}
        for args in calls
    )
    return CapturedModel(graph, options, weights, own, ctx.rotated)


def _call(
    compiled: Callable[..., Any], model: nn.Module, ids: Tensor, extra: Mapping[str, Any]
) -> None:
    try:
        with torch.no_grad():
            compiled(ids, **extra)
    except torch._dynamo.exc.Unsupported as error:
        raise GraphBreakError(
            f"{type(model).__name__} does not capture in one graph, so its linears cannot be "
            f"scored together:\n{str(error).strip()}"
        ) from error
    except torch._dynamo.exc.BackendCompilerFailed as error:
        if isinstance(error.inner_exception, MixLLMError):
            raise error.inner_exception from None  # ours; Dynamo's wrapping says nothing more
        raise


def _blank_outputs(gm: fx.GraphModule) -> Any:
    """Zeros of the outputs' shapes, all on one number: Dynamo puts them into the model's result."""
    (output,) = (n for n in gm.graph.nodes if n.op == "output")

    def blank(node: fx.Node) -> Any:
        value = node.meta.get("example_value")
        if not isinstance(value, Tensor):
            return value
        zero = torch.zeros((), dtype=value.dtype, device=value.device)
        return zero.expand([int(size) for size in value.shape])

    return pytree.tree_map_only(fx.Node, blank, output.args[0])


def no_linears(graph: MixGraph) -> str:
    """Why a captured model has nothing to quantize."""
    kept = [f"  {m.name}: {m.kept_float}" for m in graph.matrices.values()]
    if not kept:
        return "no linear with a constant weight was found in the captured graph"
    return "no linear can be quantized:\n" + "\n".join(kept[:8])
