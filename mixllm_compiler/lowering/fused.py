"""Lowered ops that quantize what a norm or an activation makes, in one pass over memory.

    codes, scales, sums = norm_quantize(x, weight, bias, eps, norm, mode, group, hadamard, kernel)
    codes, scales, sums, total = add_norm_quantize(x, residual, weight, …)    total = x + residual
    codes, scales, sums = activation_quantize(x, factor, activation, mode, …)

All float tensors are [..., K] of one type, weight and bias [K]. `norm` and `activation` name the
arithmetic to the last rounding, since models differ in it:

    rms            (x · rsqrt(mean(x²) + eps)) in fp32, rounded to the type of x, then · weight
    rms_once       the same in fp32 with the weight, rounded once
    rms_plus_one   the same with 1 + weight
    rms_norm       `torch.nn.functional.rms_norm` (eps None: that of its computation's type)
    layer_norm     `torch.nn.functional.layer_norm`
    silu, gelu, gelu_tanh   torch's, rounded to the type of x, then · factor where there is one
    gelu_new       the tanh form written out op by op, as transformers' "gelu_new" is

A norm's weight and bias must be constants: a kernel may read them before its predecessor in the
stream has ended. The functions here are the definitions, in the model's own ops.
"""

from __future__ import annotations

import math
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from .lowered import (
    EXPANSIONS,
    LOWERED_QUANTIZE,
    expand_quantize_activation,
    implementation,
    library,
)

KERNELS = frozenset({"cuda.v1"})
"""Kernels that have these ops."""

NORMS = ("rms", "rms_once", "rms_plus_one", "rms_norm", "layer_norm")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "gelu_new")
TYPES = (torch.bfloat16, torch.float16, torch.float32)
BLOCKS = (0, 2, 4, 8, 16, 32, 64, 128, 256)
MAX_K = 32_768

Activation = tuple[Tensor, Tensor, Tensor]
Added = tuple[Tensor, Tensor, Tensor, Tensor]


def reason(kernel: str, dtype: torch.dtype, k: int, mode: str, hadamard: int) -> str | None:
    """Why a quantizer cannot be fused with what makes its input; None if it can.

    Args:
        kernel: name of the quantizer's kernel.
        dtype: of the input.
        k: its last dimension.
        mode, hadamard: arguments of the quantizer.
    """
    if kernel not in KERNELS:
        return f"{kernel} has no fused quantizers"
    if mode != "token":
        return f"fused quantizers give one scale a token, not mode {mode!r}"
    if dtype not in TYPES:
        return f"fused quantizers read bf16, fp16 and fp32, not {dtype}"
    if k > MAX_K:
        return f"fused quantizers hold K up to {MAX_K} in registers, not {k}"
    if hadamard not in BLOCKS:
        return f"fused quantizers transform in blocks up to {BLOCKS[-1]}, not {hadamard}"
    return None


class FusedKernels(Protocol):
    """What stands behind a kernel name of `KERNELS`, beside `lowered.Kernels`."""

    def norm_quantize(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float | None,
        norm: str,
        mode: str,
        group: int,
        hadamard: int,
    ) -> Activation: ...

    def add_norm_quantize(
        self,
        x: Tensor,
        residual: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float | None,
        norm: str,
        mode: str,
        group: int,
        hadamard: int,
    ) -> Added: ...

    def activation_quantize(
        self,
        x: Tensor,
        factor: Tensor | None,
        activation: str,
        mode: str,
        group: int,
        hadamard: int,
    ) -> Activation: ...


_NORM = "Tensor? weight, Tensor? bias, float? eps, str norm"
_QUANTIZER = "str mode, int group, int hadamard, str kernel"
_CODES = "Tensor codes, Tensor scales, Tensor sums"
library.define(f"norm_quantize(Tensor x, {_NORM}, {_QUANTIZER}) -> ({_CODES})")
library.define(
    f"add_norm_quantize(Tensor x, Tensor residual, {_NORM}, {_QUANTIZER})"
    f" -> ({_CODES}, Tensor total)"
)
library.define(
    f"activation_quantize(Tensor x, Tensor? factor, str activation, {_QUANTIZER}) -> ({_CODES})"
)


def _kernels(kernel: str) -> FusedKernels:
    return cast(FusedKernels, implementation(kernel))


def _norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    norm: str,
    mode: str,
    group: int,
    hadamard: int,
    kernel: str,
) -> Activation:
    return _kernels(kernel).norm_quantize(x, weight, bias, eps, norm, mode, group, hadamard)


def _add_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    norm: str,
    mode: str,
    group: int,
    hadamard: int,
    kernel: str,
) -> Added:
    found = _kernels(kernel)
    return found.add_norm_quantize(x, residual, weight, bias, eps, norm, mode, group, hadamard)


def _activation_quantize(
    x: Tensor,
    factor: Tensor | None,
    activation: str,
    mode: str,
    group: int,
    hadamard: int,
    kernel: str,
) -> Activation:
    return _kernels(kernel).activation_quantize(x, factor, activation, mode, group, hadamard)


for _op in (_norm_quantize, _add_norm_quantize, _activation_quantize):
    library.impl(_op.__name__.removeprefix("_"), _op, "CompositeExplicitAutograd")


@torch.library.register_fake("mixllm_lowered::norm_quantize", lib=library)
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    norm: str,
    mode: str,
    group: int,
    hadamard: int,
    kernel: str,
) -> Activation:
    return cast(Activation, LOWERED_QUANTIZE(x, mode, group, hadamard, kernel))


@torch.library.register_fake("mixllm_lowered::add_norm_quantize", lib=library)
def _(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    norm: str,
    mode: str,
    group: int,
    hadamard: int,
    kernel: str,
) -> Added:
    codes, scales, sums = LOWERED_QUANTIZE(x, mode, group, hadamard, kernel)
    return codes, scales, sums, x.new_empty(x.shape)


@torch.library.register_fake("mixllm_lowered::activation_quantize", lib=library)
def _(
    x: Tensor,
    factor: Tensor | None,
    activation: str,
    mode: str,
    group: int,
    hadamard: int,
    kernel: str,
) -> Activation:
    return cast(Activation, LOWERED_QUANTIZE(x, mode, group, hadamard, kernel))


NORM_QUANTIZE = torch.ops.mixllm_lowered.norm_quantize.default
ADD_NORM_QUANTIZE = torch.ops.mixllm_lowered.add_norm_quantize.default
ACTIVATION_QUANTIZE = torch.ops.mixllm_lowered.activation_quantize.default
FUSED = (NORM_QUANTIZE, ADD_NORM_QUANTIZE, ACTIVATION_QUANTIZE)


def normalized(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float | None, norm: str
) -> Tensor:
    """The norm of x [..., K] over its last dimension, in the type of x.

    Raises:
        ValueError: no norm of that name, or one that has no bias, or needs a number for eps.
    """
    if norm not in NORMS:
        raise ValueError(f"no norm is called {norm!r}; norms are {', '.join(NORMS)}")
    if bias is not None and norm != "layer_norm":
        raise ValueError(f"the norm {norm!r} has no bias")
    if norm == "rms_norm":
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    if eps is None:
        raise ValueError(f"the norm {norm!r} needs a number for eps")
    if norm == "layer_norm":
        return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if norm == "rms":
        return wide.to(x.dtype) if weight is None else weight * wide.to(x.dtype)
    if weight is not None:
        factor = weight.to(torch.float32)
        wide = wide * (1.0 + factor if norm == "rms_plus_one" else factor)
    return wide.to(x.dtype)


def activated(x: Tensor, factor: Tensor | None, activation: str) -> Tensor:
    """The activation of x [..., K], times the factor where there is one, in the type of x.

    Raises:
        ValueError: no activation of that name.
    """
    if activation == "silu":
        y = F.silu(x)
    elif activation == "gelu":
        y = F.gelu(x)
    elif activation == "gelu_tanh":
        y = F.gelu(x, approximate="tanh")
    elif activation == "gelu_new":
        inner = math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))
        y = 0.5 * x * (1.0 + torch.tanh(inner))
    else:
        raise ValueError(f"no activation is called {activation!r}; {', '.join(ACTIVATIONS)} are")
    return y if factor is None else y * factor


def expand_norm_quantize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    norm: str,
    mode: str,
    group: int,
    hadamard: int,
    kernel: str,
) -> Activation:
    """The definition: the model's norm, then the lowered quantizer's definition."""
    y = normalized(x, weight, bias, eps, norm)
    return expand_quantize_activation(y, mode, group, hadamard, kernel)


def expand_add_norm_quantize(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float | None,
    norm: str,
    mode: str,
    group: int,
    hadamard: int,
    kernel: str,
) -> Added:
    """The definition: x + residual, rounded to their type, is a result and what is quantized."""
    total = x + residual
    y = normalized(total, weight, bias, eps, norm)
    return (*expand_quantize_activation(y, mode, group, hadamard, kernel), total)


def expand_activation_quantize(
    x: Tensor,
    factor: Tensor | None,
    activation: str,
    mode: str,
    group: int,
    hadamard: int,
    kernel: str,
) -> Activation:
    """The definition: the model's activation, then the lowered quantizer's definition."""
    y = activated(x, factor, activation)
    return expand_quantize_activation(y, mode, group, hadamard, kernel)


EXPANSIONS.update(
    {
        NORM_QUANTIZE: expand_norm_quantize,
        ADD_NORM_QUANTIZE: expand_add_norm_quantize,
        ACTIVATION_QUANTIZE: expand_activation_quantize,
    }
)
"""Every lowered op has its definition in the one table."""
