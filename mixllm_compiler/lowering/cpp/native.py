"""The lowered ops of `cpp.v1` as ops in C++: a quarter of the time a call takes through Python.

    codes, scales, sums = quantize_activation(x, group, per_group, block)
    y = linear(codes, scales, sums, packed, bias, n, groups, group, panels, widths, two_level, out)

They mean what the lowered ops mean; numbers instead of a layout's text, so that nothing is parsed.
`speed_up` puts them into a graph that leaves the compiler, where they can be had: they are
registered through torch's C interface, the first time that a graph wants them.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from ...errors import MixLLMError
from ...formats.layout import Layout
from ...formats.row_format import groups_of, padded
from .. import lowered
from . import compiler, isa, launch
from . import layout as panels
from .generate import VERSION, native_source
from .kernels import Scheme

OUTPUTS = (torch.float32, torch.bfloat16, torch.float16)

# In the order of `Torch` in native.h.
_FUNCTIONS = (
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_library_init_impl",
    "aoti_torch_library_impl",
)

library = torch.library.Library("mixllm_native", "DEF")
library.define(
    "quantize_activation(Tensor x, int group, int per_group, int block)"
    " -> (Tensor codes, Tensor scales, Tensor sums)"
)
library.define(
    "linear(Tensor codes, Tensor scales, Tensor sums, Tensor packed, Tensor? bias, int n,"
    " int groups, int group, int panels, int widths, int two_level, int out) -> Tensor"
)


@torch.library.register_fake("mixllm_native::quantize_activation", lib=library)
def _(x: Tensor, group: int, per_group: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    k, lead = x.shape[-1], x.shape[:-1]
    groups = groups_of(k, group)
    return (
        x.new_empty((*lead, padded(k, group)), dtype=torch.int8),
        x.new_empty((*lead, groups if per_group else 1), dtype=torch.float32),
        x.new_empty((*lead, groups), dtype=torch.int32),
    )


@torch.library.register_fake("mixllm_native::linear", lib=library)
def _(
    codes: Tensor,
    scales: Tensor,
    sums: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    n: int,
    groups: int,
    group: int,
    panels: int,
    widths: int,
    two_level: int,
    out: int,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], n), dtype=OUTPUTS[out])


NATIVE_QUANTIZE = torch.ops.mixllm_native.quantize_activation.default
NATIVE_LINEAR = torch.ops.mixllm_native.linear.default


@functools.cache
def _registered() -> ctypes.CDLL | None:
    """The library with both ops, registered; None where it cannot be had."""
    folder = Path(torch.__file__).parent / "lib"
    try:
        functions = ctypes.CDLL(str(next(folder.glob("libtorch_cpu.*"))))
        table = (ctypes.c_void_p * len(_FUNCTIONS))(
            *(ctypes.cast(getattr(functions, name), ctypes.c_void_p) for name in _FUNCTIONS)
        )
        built = compiler.library(native_source(), "cpp-native", isa.ISAS["plain"])
    except (MixLLMError, OSError, AttributeError, StopIteration):
        return None  # the ops in Python do the same
    built.mixllm_set_linear.argtypes = [ctypes.c_int32, ctypes.c_void_p]
    built.mixllm_set_quantize.argtypes = [ctypes.c_void_p]
    return None if built.mixllm_register(table) else built


def load(scheme: Scheme) -> bool:
    """Make both ops ready for linears of a scheme; False where they cannot be had.

    Raises:
        LoweringError: the kernels themselves cannot be had, see `launch.linear_library`.
    """
    ops = _registered()
    if ops is None:
        return False
    chosen = isa.current()
    quantize = launch.quantizer_library(chosen).mixllm_quantize
    linear = launch.linear_library(scheme, chosen).mixllm_linear
    which = 2 * (scheme.family == "two-level") + (scheme.mode == "group")
    ops.mixllm_set_quantize(ctypes.cast(quantize, ctypes.c_void_p))
    ops.mixllm_set_linear(which, ctypes.cast(linear, ctypes.c_void_p))
    return True


def speed_up(graph: fx.GraphModule) -> int:
    """Put the ops of this module in place of lowered ops with C++ kernels; how many were."""
    ours = [
        node
        for node in graph.graph.nodes
        if node.op == "call_function" and node.args[-1:] == (VERSION,)
    ]
    changed = 0
    # Linears first: they look at their quantizers' arguments.
    for target, native, arguments in (
        (lowered.LOWERED_LINEAR, NATIVE_LINEAR, _linear_arguments),
        (lowered.LOWERED_QUANTIZE, NATIVE_QUANTIZE, _quantize_arguments),
    ):
        for node in ours:
            args = arguments(node) if node.target is target else None
            if args is not None:
                node.target, node.args, changed = native, args, changed + 1
    if changed:
        graph.recompile()
    return changed


def _quantize_arguments(node: fx.Node) -> tuple[Any, ...] | None:
    x, mode, group, block, _ = node.args
    if _registered() is None or not group or not _is_float(x):
        return None
    launch.quantizer_library(isa.current())
    return x, group, int(mode == "group"), block


def _linear_arguments(node: fx.Node) -> tuple[Any, ...] | None:
    codes, scales, sums, packed, bias, text, dtype, _ = node.args
    layout = Layout.parse(str(text))
    quantizer: Any = codes.args[0] if isinstance(codes, fx.Node) and codes.args else None
    known = isinstance(quantizer, fx.Node) and quantizer.args[1:2] in (("token",), ("group",))
    if not known or not (bias is None or _is_float(bias)):
        return None
    mode = "token" if layout.groups == 1 else str(quantizer.args[1])
    if not load(Scheme(layout.family, mode)):
        return None
    assert isinstance(dtype, torch.dtype)
    widths = sum(1 << bits for bits, _ in layout.widths)
    sizes = (layout.n, layout.groups, layout.group, panels.panel_count(layout), widths)
    rest = (*sizes, int(layout.family == "two-level"), OUTPUTS.index(dtype))
    return codes, scales, sums, packed, bias, *rest


def _is_float(node: Any) -> bool:
    """Whether a node is known to be a tensor of a type that the ops read."""
    example = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return isinstance(example, Tensor) and example.dtype in OUTPUTS
