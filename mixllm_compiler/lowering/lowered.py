"""Ops that kernels implement, and what each of them means in semantic ops.

    codes, scales, sums = quantize_activation(x, mode, group, hadamard, kernel)
    y = linear(codes, scales, sums, packed, bias, layout, dtype, kernel)

`kernel` is a short name with a version, such as "cuda.v1". It and the other arguments are all
that a call needs to find its code, so a graph from a warm cache runs in another process. `hadamard`
is the block of the transform applied to x first, 0 for none. Shapes: see `ir.ops`; y [..., N] is in
model order. Kernels of `WHOLE_SUMS` know two-level rows only, which need one sum a token: their
quantizer gives sums [..., 1].

`EXPANSIONS` gives the definition of every lowered op: the same arguments, semantic ops inside. They
read the lowered blob too, since a layout's text names its packing.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload

from ..errors import OptionError, nearest
from ..formats.layout import Layout
from ..formats.row_format import groups_of, padded
from ..ir.ops import DEQUANTIZE, HADAMARD, MIXED_GEMM, QUANTIZE_ACTIVATION
from .target import Target


class Kernels(Protocol):
    """What stands behind a kernel name."""

    def quantize_activation(
        self, x: Tensor, mode: str, group: int, hadamard: int
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def linear(
        self,
        codes: Tensor,
        scales: Tensor,
        sums: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        layout: Layout,
        dtype: torch.dtype,
    ) -> Tensor: ...

    def sources(
        self, layout: Layout, mode: str, dtype: torch.dtype, bias: bool, target: Target
    ) -> dict[str, str]: ...


IMPLEMENTATIONS = {
    "cpp.v1": ".cpp.launch:CppKernels",
    "cuda.v1": ".cuda.quantizers:CudaKernels",
    "triton.v1": ".triton.launch:TritonKernels",
}
"""Kernel name → `module:class`, imported at the first call: Triton only where it is used."""

WHOLE_SUMS = frozenset({"cuda.v1"})
"""Kernels whose quantizer sums the codes of a token, not of a group."""


@functools.cache
def implementation(kernel: str) -> Kernels:
    """The implementation of a kernel name.

    Raises:
        OptionError: there is none of that name.
    """
    if kernel not in IMPLEMENTATIONS:
        raise OptionError(f"unknown kernel {kernel!r}.{nearest(kernel, IMPLEMENTATIONS)}")
    module, name = IMPLEMENTATIONS[kernel].split(":")
    made: Kernels = getattr(importlib.import_module(module, __package__), name)()
    return made


library = torch.library.Library("mixllm_lowered", "DEF")
library.define(
    "quantize_activation(Tensor x, str mode, int group, int hadamard, str kernel)"
    " -> (Tensor codes, Tensor scales, Tensor sums)"
)
library.define(
    "linear(Tensor codes, Tensor scales, Tensor sums, Tensor packed, Tensor? bias, str layout,"
    " ScalarType dtype, str kernel) -> Tensor"
)


def _quantize_activation(
    x: Tensor, mode: str, group: int, hadamard: int, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    return implementation(kernel).quantize_activation(x, mode, group, hadamard)


def _linear(
    codes: Tensor,
    scales: Tensor,
    sums: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    layout: str,
    dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    parsed = Layout.parse(layout)
    return implementation(kernel).linear(codes, scales, sums, packed, bias, parsed, dtype)


library.impl("quantize_activation", _quantize_activation, "CompositeExplicitAutograd")
library.impl("linear", _linear, "CompositeExplicitAutograd")


@torch.library.register_fake("mixllm_lowered::quantize_activation", lib=library)
def _(
    x: Tensor, mode: str, group: int, hadamard: int, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    k, lead = x.shape[-1], x.shape[:-1]
    g = groups_of(k, group)
    return (
        x.new_empty((*lead, padded(k, group)), dtype=torch.int8),
        x.new_empty((*lead, 1 if mode == "token" else g), dtype=torch.float32),
        x.new_empty((*lead, 1 if kernel in WHOLE_SUMS else g), dtype=torch.int32),
    )


@torch.library.register_fake("mixllm_lowered::linear", lib=library)
def _(
    codes: Tensor,
    scales: Tensor,
    sums: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    layout: str,
    dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], Layout.parse(layout).n), dtype=dtype)


LOWERED_QUANTIZE = torch.ops.mixllm_lowered.quantize_activation.default
LOWERED_LINEAR = torch.ops.mixllm_lowered.linear.default
LOWERED = (LOWERED_QUANTIZE, LOWERED_LINEAR)


def expand_quantize_activation(
    x: Tensor, mode: str, group: int, hadamard: int, kernel: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of the lowered quantizer; `kernel` decides only what the sums are of."""
    x = HADAMARD(x, hadamard) if hadamard else x
    codes, scales, sums = QUANTIZE_ACTIVATION(x, mode, group)
    if kernel in WHOLE_SUMS:
        sums = sums.sum(-1, keepdim=True, dtype=torch.int32)
    return codes, scales, sums


def expand_linear(
    codes: Tensor,
    scales: Tensor,
    sums: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    layout: str,
    dtype: torch.dtype,
    kernel: str,
) -> Tensor:
    """The definition of the lowered linear; `kernel` does not matter."""
    acc = MIXED_GEMM(codes, scales, sums, packed, layout)
    return DEQUANTIZE(acc, scales, sums, packed, layout, bias, dtype)


EXPANSIONS: dict[OpOverload, Callable[..., Any]] = {
    LOWERED_QUANTIZE: expand_quantize_activation,
    LOWERED_LINEAR: expand_linear,
}
"""Lowered op → its definition: the same arguments, semantic ops inside; `fused` adds its own."""
