"""The function Dynamo calls: `torch.compile(model, backend="mixllm")`.

Capture, run the pipeline, guard the weights, hand the rest to Inductor. Nothing here may end in
the float model running silently: what Dynamo would turn into a warning becomes an error.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import fx

from . import compat
from .capture import capture
from .errors import MixLLMError
from .ir.graph import MixGraph
from .lowering.cpp import native
from .options import Options
from .passes.run import run_passes
from .passes.summary import summarize
from .runtime import records
from .runtime.weights import freshness_check, release

log = logging.getLogger("mixllm_compiler")
_announced: set[str] = set()


def mixllm(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """Backend of `torch.compile`; options are the fields of `options.Options`.

    Raises:
        MixLLMError: one of its subclasses, for everything a user can mend.
    """
    try:
        return _compile(gm, example_inputs, Options.parse(options), mode)
    except MixLLMError:
        raise
    except compat.fallback_exceptions() as error:
        # Dynamo would run the float model with a warning that nobody reads.
        raise RuntimeError(f"mixllm could not compile this graph: {error}") from error


def _compile(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, mode: str | None
) -> Callable[..., Any]:
    compat.self_test()
    graph = capture(gm, example_inputs)
    ctx = run_passes(graph, options)
    matrices = [m for m in graph.matrices.values() if m.widths is not None]
    baked = [m for m in graph.matrices.values() if m.attr]
    bound = {id(m.binding): m.binding for m in baked}.values()  # experts share one
    for binding in bound:
        # Recompile when another tensor stands where a quantized weight stood.
        if binding.source is not None:
            compat.guard_identity(binding.source)
    # A tied embedding still reads its table, and that one is never freed.
    freed = [m.binding for m in matrices if options.release and not m.binding.node.users]
    for binding in {id(b): b for b in freed}.values():
        release(binding.tensor)
    keep = drop_unread_weights(graph)
    graph.refuse_released()
    # Under freezing, weights are attributes and have no source; Dynamo's debugging aids compile
    # clones of the weights, which have none either and are gone before the first call.
    own = [b for b in bound if b.source or b.node.op == "get_attr"]
    if own:
        compat.guard_check(
            freshness_check(binding.tensor for binding in own),
            "a weight was changed in place since it was quantized",
        )
    record = summarize(graph, ctx)
    records.add(record)
    if record.note:
        log.warning("mixllm: %s", record.note)
    if matrices and not options.quiet and ctx.known is None:
        _say(record.headline())
    if record.linears and not record.quantized:
        kept = "; ".join(f"{line.name}: {line.kept_float}" for line in record.linears[:3])
        log.warning("%s (%s)", record.headline(), kept)
    _warn_near_the_limit()
    return _hand_over(graph, keep, options, mode)


def _warn_near_the_limit() -> None:
    """Dynamo allows a function some graphs (8), then runs it in float; models share functions."""
    graphs, limit = compat.graphs_of_frame() or (0, 0)
    if graphs and graphs == limit - 2:
        log.warning(
            "mixllm: Dynamo compiled %d graphs for one function, and after %d it runs further "
            "models and shapes in float. Models of one class share their function: compile them "
            "with mixllm_compiler.compile(model, …), which gives each its own, or call "
            "torch._dynamo.reset() between them",
            graphs,
            limit,
        )


def drop_unread_weights(graph: MixGraph) -> list[int]:
    """Erase float weights nobody reads from the graph's inputs; indices of the inputs kept.

    Dynamo writes its call from this very graph after the backend returns.
    """
    keep = []
    for index, node in enumerate(graph.placeholders()):
        if node in graph.bindings and not node.users:
            graph.graph.erase_node(node)
            del graph.bindings[node]
        else:
            keep.append(index)
    graph.inputs = [graph.inputs[i] for i in keep]
    graph.settle()
    return keep


def _hand_over(
    graph: MixGraph, keep: list[int], options: Options, mode: str | None
) -> Callable[..., Any]:
    """Compile or interpret the rewritten graph; without gradients, whatever the caller's mode."""
    grad = torch.is_grad_enabled()
    if grad:
        _strip_grad_mode(graph)
        _once("grad", "mixllm: quantized weights have no gradients; this model runs under no_grad")
    native.speed_up(graph.module)
    with torch.no_grad() if grad else nullcontext():
        if options.lower == "eager":
            inner: Callable[..., Any] = graph.module
        else:
            # Size assertions cost 0.5 µs per constant and call, and the constants are ours.
            patches = {"size_asserts": False, **compat.mode_patches(mode), **options.inductor}
            inner = compat.compile_with_inductor(graph.module, graph.inputs, patches)
    count = len(keep)

    def call(*args: Any) -> Any:
        if len(args) != count:  # Dynamo compiled a copy of the graph and passes every weight
            args = tuple(args[i] for i in keep)
        return inner(*args)

    def call_without_grad(*args: Any) -> Any:
        with torch.no_grad():
            return call(*args)

    return call_without_grad if grad else call


def _strip_grad_mode(graph: MixGraph) -> None:
    """The graph runs under no_grad as a whole: its own switches would turn gradients back on."""
    for node in graph.calls(torch._C._set_grad_enabled):
        graph.graph.erase_node(node)
    graph.settle()


def _say(line: str) -> None:
    log.info(line)
    sys.stderr.write(line + "\n")


def _once(key: str, line: str) -> None:
    if key not in _announced:
        _announced.add(key)
        _say(line)
