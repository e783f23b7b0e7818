"""Schemas and fake kernels of the semantic ops. Their meaning is in `reference.py`.

A linear y = x Wᵀ + b becomes

    x̂ = hadamard(x, block)                                  only if the weight was rotated
    codes, scales, sums = quantize_activation(x̂, mode, group)
    acc = mixed_gemm(codes, scales, sums, packed, layout)   packed row order
    y = dequantize(acc, scales, sums, packed, layout, bias, dtype)   model row order

and a product of sorted rows with the matrices of many experts is one op (`ir.experts`)

    y = grouped_linear(x, offsets, packed, layouts, mode, group, hadamard, dtype)

Shapes: x [..., K]; codes int8 [..., K'] with K' = K rounded up to whole groups; scales fp32
[..., G] in mode "group", [..., 1] in mode "token"; sums int32 [..., G], the sum of each group's
codes; acc [..., N], int32 for two-level rows in mode "token", else fp32; y [..., N]. `packed` is
one u8 blob, `layout` the text of its `formats.layout.Layout`. For experts x is [S, K], offsets int
[E], y [S, N]; `packed` is a list of E blobs, `layouts` the texts of theirs.

Ops are defined with `Library.define` and one implementation per device: 2.5 µs a call where
`custom_op` takes 6 to 9.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from ..formats.layout import Layout
from ..formats.row_format import groups_of, padded
from . import reference

MODES = ("token", "group")
P = ParamSpec("P")
R = TypeVar("R")

library = torch.library.Library("mixllm", "DEF")
library.define("hadamard(Tensor x, int block) -> Tensor")
library.define(
    "quantize_activation(Tensor x, str mode, int group)"
    " -> (Tensor codes, Tensor scales, Tensor sums)"
)
library.define(
    "mixed_gemm(Tensor codes, Tensor scales, Tensor sums, Tensor packed, str layout) -> Tensor"
)
library.define(
    "dequantize(Tensor acc, Tensor scales, Tensor sums, Tensor packed, str layout, Tensor? bias,"
    " ScalarType dtype) -> Tensor"
)
library.define(
    "grouped_linear(Tensor x, Tensor offsets, Tensor[] packed, str layouts, str mode, int group,"
    " int hadamard, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # the reference reads the offsets on the CPU
)


def _exact(kernel: Callable[P, R]) -> Callable[P, R]:
    """Run a kernel without the caller's autocast: its products of integers must not become bf16."""

    @functools.wraps(kernel)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        first: Any = args[0]
        if not torch.is_autocast_enabled(first.device.type):
            return kernel(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return kernel(*args, **kwargs)

    return run


# One Python kernel for every device: whoever lowers a graph puts its own ops in.
for _kernel in (
    reference.hadamard,
    reference.quantize_activation,
    reference.mixed_gemm,
    reference.dequantize,
    reference.grouped_linear,
):
    library.impl(_kernel.__name__, _exact(_kernel), "CompositeExplicitAutograd")


@torch.library.register_fake("mixllm::hadamard", lib=library)
def _(x: Tensor, block: int) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.register_fake("mixllm::quantize_activation", lib=library)
def _(x: Tensor, mode: str, group: int) -> tuple[Tensor, Tensor, Tensor]:
    k, lead = x.shape[-1], x.shape[:-1]
    g = groups_of(k, group)
    return (
        x.new_empty((*lead, padded(k, group)), dtype=torch.int8),
        x.new_empty((*lead, 1 if mode == "token" else g), dtype=torch.float32),
        x.new_empty((*lead, g), dtype=torch.int32),
    )


@torch.library.register_fake("mixllm::mixed_gemm", lib=library)
def _(codes: Tensor, scales: Tensor, sums: Tensor, packed: Tensor, layout: str) -> Tensor:
    spec = Layout.parse(layout)
    dtype = torch.int32 if reference.is_integer(spec, scales) else torch.float32
    return codes.new_empty((*codes.shape[:-1], spec.n), dtype=dtype)


@torch.library.register_fake("mixllm::dequantize", lib=library)
def _(
    acc: Tensor,
    scales: Tensor,
    sums: Tensor,
    packed: Tensor,
    layout: str,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    return acc.new_empty(acc.shape, dtype=dtype)


@torch.library.register_fake("mixllm::grouped_linear", lib=library)
def _(
    x: Tensor,
    offsets: Tensor,
    packed: list[Tensor],
    layouts: str,
    mode: str,
    group: int,
    hadamard: int,
    dtype: torch.dtype,
) -> Tensor:
    return x.new_empty((x.shape[0], Layout.parse_all(layouts)[0].n), dtype=dtype)


HADAMARD = torch.ops.mixllm.hadamard.default
QUANTIZE_ACTIVATION = torch.ops.mixllm.quantize_activation.default
MIXED_GEMM = torch.ops.mixllm.mixed_gemm.default
DEQUANTIZE = torch.ops.mixllm.dequantize.default
GROUPED_LINEAR = torch.ops.mixllm.grouped_linear.default
SEMANTIC = (HADAMARD, QUANTIZE_ACTIVATION, MIXED_GEMM, DEQUANTIZE, GROUPED_LINEAR)
