"""Every private name of torch that this package uses, in one place.

Supported: torch 2.11 and newer. `self_test` touches each name and says which one moved; the
test suite runs it, and so does the backend on its first call, so that an unknown torch fails
with one sentence instead of somewhere inside a compilation.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from .errors import MixLLMError, WeightError


class IncompatibleTorch(MixLLMError):
    """This torch lacks a private interface that capture relies on."""


# -- where a lifted tensor comes from ------------------------------------------------------------


def source_of(node: fx.Node) -> Any | None:
    """Dynamo's `Source` of a placeholder, or None (a copied module has none)."""
    source = getattr(node, "_dynamo_source", None)
    if source is None and (arg := node.meta.get("grapharg")) is not None:
        source = arg.source
    return source


def source_path(source: Any) -> list[str]:
    """Attribute names and indices from the root object to the tensor."""
    parts: list[str] = []
    while getattr(source, "base", None) is not None:
        key = getattr(source, "index", None)
        key = getattr(source, "member", None) if key is None else key
        if isinstance(key, str | int):
            parts.append(str(key))
        source = source.base
    return parts[::-1]


def is_lifted_parameter(node: fx.Node, value: object) -> bool:
    """Whether Dynamo lifted this placeholder from a module (parameter or buffer)."""
    static = node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type")
    return static is not None or isinstance(value, nn.Parameter)


def buffer_source(parent: Any, name: str) -> Any:
    """A `Source` for a constant that the backend adds beside a lifted weight."""
    from torch._dynamo.source import AttrSource

    return AttrSource(parent, name)


# -- the frame being compiled --------------------------------------------------------------------


def _translator() -> Any | None:
    """What translates the current frame; outside of Dynamo 2.13 has no such attribute, and after
    its first frame 2.11 says None.
    """
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx()
    except AttributeError:
        return None


def current_frame() -> tuple[str, dict[str, Any], dict[str, Any]] | None:
    """(code name, locals, globals) of the frame Dynamo is compiling; None outside of Dynamo."""
    tx = _translator()
    return None if tx is None else (tx.f_code.co_name, tx.f_locals, tx.f_globals)


def graphs_of_frame() -> tuple[int, int] | None:
    """(graphs compiled for the current frame's code, this one included; how many Dynamo allows).

    Past that many, Dynamo runs the function in float. None outside of Dynamo.
    """
    from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list

    tx = _translator()
    if tx is None:
        return None
    return len(_debug_get_cache_entry_list(tx.f_code)) + 1, torch._dynamo.config.recompile_limit


def root_module(source: Any) -> nn.Module | None:
    """The outermost module that a lifted tensor's source goes through."""
    frame = current_frame()
    if frame is None or source is None:
        return None
    chain = [source]
    while getattr(chain[-1], "base", None) is not None:
        chain.append(chain[-1].base)
    _, local, glob = frame
    name = getattr(chain[-1], "local_name", None)
    value = local.get(name) if name else glob.get(getattr(chain[-1], "global_name", ""))
    for link in reversed(chain[:-1]):
        value = getattr(value, "cell_contents", value)
        if isinstance(value, nn.Module):
            break
        member = getattr(link, "member", None)
        index = getattr(link, "index", None)
        try:
            value = getattr(value, member) if isinstance(member, str) else value[index]  # type: ignore[index]
        except (AttributeError, KeyError, IndexError, TypeError):
            return None
    return value if isinstance(value, nn.Module) else None


def is_resumed_frame() -> bool:
    """Whether the frame continues another one after a graph break."""
    from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX

    frame = current_frame()
    return frame is not None and frame[0].startswith(TORCH_DYNAMO_RESUME_IN_PREFIX)


def break_reason(gm: fx.GraphModule) -> str | None:
    """Why and where Dynamo ended this graph early, or None if the frame ends with it."""
    why = getattr(gm, "compile_subgraph_reason", None)
    if why is None or not why.graph_break:
        return None
    first = str(why.reason).strip().splitlines()[0]
    where = why.user_stack[-1] if getattr(why, "user_stack", None) else None
    return first if where is None else f"{first} ({where.filename}:{where.lineno} in {where.name})"


# -- guards --------------------------------------------------------------------------------------


def guard_identity(source: Any) -> None:
    """Recompile when another object stands where this tensor stood."""
    from torch._dynamo.guards import GuardBuilder, install_guard

    install_guard(source.make_guard(GuardBuilder.ID_MATCH))


def guard_check(check: Callable[[object], bool], reason: str) -> None:
    """Recompile when `check` returns False at the start of a call; outside of Dynamo, nothing."""
    from torch._dynamo.guards import install_guard
    from torch._dynamo.source import GlobalStateSource
    from torch._guards import TracingContext

    if TracingContext.try_get() is None:
        return

    def MIXLLM_WEIGHTS(builder: Any, guard: Any) -> None:
        builder.guard_manager.root.add_epilogue_lambda_guard(check, [reason], guard.user_stack)

    install_guard(GlobalStateSource().make_guard(MIXLLM_WEIGHTS))


# -- values and hand-over ------------------------------------------------------------------------


def hint(value: Any) -> Any:
    """The example integer behind a SymInt; `int()` of it would specialise the graph."""
    return value.node.hint if isinstance(value, torch.SymInt) else value


@functools.cache
def _fast_products_are_exact() -> bool:
    """Whether oneDNN's products in the mode below are as good as fp32 here.

    Where a CPU has bf16 units without AMX they are sums of split products, and 2.4 times as fast
    as the default library; where it has AMX they may round to bf16, so the answer is measured.
    """
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=draw) for _ in range(2))
    with _matmul_precision("bf16"):
        found = torch.nn.functional.linear(a, b)
    exact = a.double() @ b.double().t()
    return float((found - exact).norm() / exact.norm()) < 1e-5


@contextlib.contextmanager
def _matmul_precision(mode: str) -> Iterator[None]:
    matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = mode
    try:
        yield
    finally:
        matmul.fp32_precision = before


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """The fastest fp32 matrix products of the CPU that keep fp32's accuracy (1e-5)."""
    known = hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision")
    with contextlib.ExitStack() as stack:
        if known and torch.backends.mkldnn.is_available() and _fast_products_are_exact():
            stack.enter_context(_matmul_precision("bf16"))
        yield


def fallback_exceptions() -> tuple[type[BaseException], ...]:
    """Exceptions that Dynamo turns into a float model, with a warning or without."""
    from torch._dynamo.exc import SkipFrame, exceptions_allowed_to_be_fallback

    return (*exceptions_allowed_to_be_fallback, SkipFrame)


def mode_patches(mode: str | None) -> dict[str, Any]:
    """Inductor settings of a `torch.compile` mode."""
    import torch._inductor

    return dict(torch._inductor.list_mode_options(mode)) if mode else {}


def compile_with_inductor(
    gm: fx.GraphModule, inputs: list[Any], patches: dict[str, Any]
) -> Callable[..., Any]:
    """Hand a graph to Inductor with some of its settings patched."""
    from torch._inductor.compile_fx import compile_fx

    compiled: Any = compile_fx(gm, inputs, config_patches=patches)
    return cast("Callable[..., Any]", compiled)


def trace_artifact(name: str, text: Callable[[], str]) -> None:
    """A text in `TORCH_TRACE`, one per pass; tlparse shows it."""
    import torch._logging as logging

    logging.trace_structured(  # type: ignore[attr-defined]
        "artifact",
        metadata_fn=lambda: {"name": name, "encoding": "string"},
        payload_fn=text,
    )


def stamp(weight: Tensor) -> tuple[int | None, int, Any]:
    """Version counter, pointer and storage: what changes when a weight is written in place.

    A pointer alone does not tell: memory that `p.data = w` frees is what the next weight gets.
    The storage is referred to weakly, and its identity is not given away while we do. Inference
    tensors have no version; `p.data.copy_()` changes nothing (`invalidate` is for it).
    """
    from torch.multiprocessing.reductions import StorageWeakRef

    version = None if weight.is_inference() else weight._version
    return version, weight.data_ptr(), StorageWeakRef(weight.untyped_storage())


def unchanged(weights: Iterable[Tensor]) -> Callable[[], bool]:
    """A function: True while all these weights live and have the stamps they have now.

    A guard asks it at every call, so it compares in a fraction of the time that `stamp` takes.
    """
    snapshot = [(weakref.ref(w), *stamp(w)) for w in weights]
    expired: Any = torch.UntypedStorage._expired

    def same() -> bool:
        for ref, version, pointer, storage in snapshot:
            weight = ref()
            if weight is None or weight.data_ptr() != pointer or expired(storage.cdata):
                return False
            if version is not None and weight._version != version:
                return False
        return True

    return same


def is_released(weight: Tensor) -> bool:
    """Whether the float storage was freed; reading such a tensor is a segmentation fault."""
    return (
        weight.device.type != "meta" and weight.numel() > 0 and weight.untyped_storage().size() == 0
    )


def refuse_released(weight: Tensor, name: str) -> None:
    """To be asked before every read of a float weight.

    Raises:
        WeightError: its storage was released.
    """
    if is_released(weight):
        raise WeightError(
            f"the float weight {name} was released after an earlier compilation and cannot be "
            "read again; reload the model to compile it with other options"
        )


def keep_grouped_experts(model: nn.Module) -> None:
    """Let `generate` decode with the products over sorted rows that are quantized.

    Except on CPUs, transformers decodes with float weights gathered for every token instead.
    """
    if hasattr(model, "_optimize_model_for_decode"):
        model._optimize_model_for_decode = contextlib.nullcontext  # type: ignore[assignment]


@functools.cache
def invoke_subgraph() -> Any:
    """The op behind `torch.compiler.nested_compile_region`."""
    return torch.ops.higher_order.invoke_subgraph


def _names() -> Iterator[tuple[str, Callable[[], object]]]:
    yield (
        "torch._dynamo.symbolic_convert.InstructionTranslator.current_tx",
        lambda: (
            __import__(
                "torch._dynamo.symbolic_convert", fromlist=["x"]
            ).InstructionTranslator.current_tx
        ),
    )
    yield (
        "torch._dynamo.guards.install_guard",
        lambda: __import__("torch._dynamo.guards", fromlist=["x"]).install_guard,
    )
    yield (
        "torch._dynamo.guards.GuardBuilder.ID_MATCH",
        lambda: __import__("torch._dynamo.guards", fromlist=["x"]).GuardBuilder.ID_MATCH,
    )
    yield (
        "torch._dynamo.source.GlobalStateSource",
        lambda: __import__("torch._dynamo.source", fromlist=["x"]).GlobalStateSource().make_guard,
    )
    yield "torch._C._dynamo.eval_frame._debug_get_cache_entry_list", graphs_of_frame
    yield "torch._dynamo.exc.exceptions_allowed_to_be_fallback", fallback_exceptions
    yield "torch._inductor.list_mode_options", lambda: mode_patches("reduce-overhead")
    yield "torch.ops.higher_order.invoke_subgraph", invoke_subgraph
    yield "torch.multiprocessing.reductions.StorageWeakRef", unchanged([torch.zeros(1)])
    yield "torch._dynamo.resume_execution prefix", is_resumed_frame
    yield (
        "torch.fx.proxy._COPY_META_FIELDS with 'custom'",
        lambda: _must("custom" in __import__("torch.fx.proxy", fromlist=["x"])._COPY_META_FIELDS),
    )


def _must(condition: bool) -> None:
    if not condition:
        raise AttributeError("the field is gone")


@functools.cache
def self_test() -> None:
    """Touch every private name once.

    Raises:
        IncompatibleTorch: one of them is gone; names it.
    """
    for name, touch in _names():
        try:
            touch()
        except Exception as error:
            raise IncompatibleTorch(
                f"mixllm-compiler relies on {name}, which torch {torch.__version__} does not have "
                f"({type(error).__name__}: {error}). Tested versions are 2.11 and 2.13."
            ) from error
