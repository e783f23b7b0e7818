"""Runs the generated libraries on tensors: through ctypes, so that nothing is built against torch.

The arguments of a lowered op are all that is needed. What they lead to (library, sizes) is kept,
so that a call costs a few look-ups.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import LoweringError
from ...formats.layout import Layout
from ...formats.row_format import group_size, groups_of, padded
from ...ir.ops import HADAMARD
from ..target import Target
from ..tensors import allocate, rows_of
from . import compiler, isa
from . import layout as panels
from .generate import VERSION, linear_source, quantizer_source
from .kernels import Scheme
from .support import OUTPUTS

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_BIAS = 3


class _Shape(ctypes.Structure):
    """`Shape` of linear.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "groups", "group", "panels")),
        *((name, ctypes.c_int32) for name in ("widths", "out_type", "bias_type")),
    ]


class _Quantizer(ctypes.Structure):
    """`Quantizer` of quantize.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("k", "groups", "group")),
        *((name, ctypes.c_int32) for name in ("type", "per_group", "block")),
    ]


class CppKernels:
    """The implementation behind kernel name `cpp.v1`."""

    def quantize_activation(
        self, x: Tensor, mode: str, group: int, hadamard: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ir.reference.quantize_activation`: the same codes, scales and sums.

        Raises:
            LoweringError: x is not on a CPU, or the library cannot be built.
        """
        if x.dtype not in _TYPES:
            x = (HADAMARD(x, hadamard) if hadamard else x).float()
            hadamard = 0
        k, lead = x.shape[-1], x.shape[:-1]
        if hadamard and k % hadamard:
            x, hadamard = HADAMARD(x, hadamard), 0  # says what is wrong
        _check_device(x)
        call, argument, length, scale_count, groups = _quantizer(k, mode, group, x.dtype, hadamard)
        codes = allocate((*lead, length), torch.int8, x.device)
        scales = allocate((*lead, scale_count), torch.float32, x.device)
        sums = allocate((*lead, groups), torch.int32, x.device)
        rows = rows_of(x)
        m = rows.shape[0]
        if m and k:
            call(
                argument,
                rows.data_ptr(),
                rows.stride(0),
                codes.data_ptr(),
                scales.data_ptr(),
                sums.data_ptr(),
                m,
                torch.get_num_threads(),
            )
        return codes, scales, sums

    def linear(
        self,
        codes: Tensor,
        scales: Tensor,
        sums: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        layout: Layout,
        dtype: torch.dtype,
    ) -> Tensor:
        """y [..., N] in model order, of `dtype`. See `ir.reference.mixed_gemm` and `dequantize`.

        Raises:
            LoweringError: arguments that are not on a CPU or do not fit the layout, no kernel for
                the dtype, or the library cannot be built.
        """
        panels.check_blob(packed, layout)
        if codes.shape[-1] != layout.padded_k or sums.shape[-1] != layout.groups:
            raise LoweringError(
                f"activation codes [..., {codes.shape[-1]}] with {sums.shape[-1]} groups do not "
                f"fit layout '{layout}', which needs [..., {layout.padded_k}] with "
                f"{layout.groups} groups"
            )
        _check_device(codes)
        if bias is not None and bias.dtype not in _TYPES:
            bias = bias.float()
        # A K of one group makes the modes the same; then, as in the reference, it is "token".
        mode = "token" if scales.shape[-1] == 1 else "group"
        linear = _linear(layout, mode, dtype, None if bias is None else bias.dtype)
        lead = codes.shape[:-1]
        out = allocate((*lead, layout.n), dtype, codes.device)
        m = codes.numel() // layout.padded_k
        if m:
            codes, scales, sums = codes.contiguous(), scales.contiguous(), sums.contiguous()
            bias = None if bias is None else bias.contiguous()
            linear.call(
                linear.shape,
                codes.data_ptr(),
                scales.data_ptr(),
                sums.data_ptr(),
                packed.data_ptr(),
                None if bias is None else bias.data_ptr(),
                out.data_ptr(),
                m,
                torch.get_num_threads(),
            )
        return out

    def sources(
        self, layout: Layout, mode: str, dtype: torch.dtype, bias: bool, target: Target
    ) -> dict[str, str]:
        """File name → source of the libraries that run a linear and its quantizer."""
        scheme, chosen = Scheme(layout.family, mode), isa.current()
        name = f"{VERSION}-linear-{scheme.family}-{scheme.mode}-{chosen.name}.cpp"
        return {
            name: linear_source(scheme, chosen),
            f"{VERSION}-quantize-{chosen.name}.cpp": quantizer_source(chosen),
        }


def _check_device(x: Tensor) -> None:
    if x.device.type != "cpu":
        raise LoweringError(f"the C++ kernels need tensors on a CPU, these are on {x.device}")


@functools.lru_cache(maxsize=1024)
def _quantizer(
    k: int, mode: str, group: int, dtype: torch.dtype, hadamard: int
) -> tuple[Callable[..., None], Any, int, int, int]:
    """(function, its first argument; codes, scales and groups of a token)."""
    groups = groups_of(k, group)
    argument = _Quantizer(k, groups, group_size(k, group), _TYPES[dtype], mode == "group", hadamard)
    call = quantizer_library(isa.current()).mixllm_quantize
    scales = 1 if mode == "token" else groups
    return call, ctypes.pointer(argument), padded(k, group), scales, groups


@dataclass(frozen=True)
class _Linear:
    """What all calls of one linear have in common: the function and its first argument."""

    call: Callable[..., None]
    shape: Any


@functools.lru_cache(maxsize=4096)
def _linear(layout: Layout, mode: str, dtype: torch.dtype, bias: torch.dtype | None) -> _Linear:
    if dtype not in OUTPUTS:
        raise LoweringError(f"the C++ kernels write bf16, fp16 and fp32, not {dtype}")
    shape = _Shape(
        layout.n,
        layout.groups,
        layout.group,
        panels.panel_count(layout),
        sum(1 << bits for bits, _ in layout.widths),
        _TYPES[dtype],
        _NO_BIAS if bias is None else _TYPES[bias],
    )
    built = linear_library(Scheme(layout.family, mode), isa.current())
    return _Linear(built.mixllm_linear, ctypes.pointer(shape))


@functools.cache
def linear_library(scheme: Scheme, chosen: isa.Isa) -> ctypes.CDLL:
    """The library of a scheme, built if it is not in the cache.

    Raises:
        LoweringError: see `compiler.library`.
    """
    tag = f"cpp-linear-{scheme.family}-{scheme.mode}-{chosen.name}"
    built = compiler.library(linear_source(scheme, chosen), tag, chosen)
    pointers = [ctypes.c_void_p] * 7
    built.mixllm_linear.argtypes = [*pointers, ctypes.c_int64, ctypes.c_int32]
    built.mixllm_linear.restype = None
    return built


@functools.cache
def quantizer_library(chosen: isa.Isa) -> ctypes.CDLL:
    """The library of the activation quantizer, built if it is not in the cache.

    Raises:
        LoweringError: see `compiler.library`.
    """
    built = compiler.library(quantizer_source(chosen), f"cpp-quantize-{chosen.name}", chosen)
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    built.mixllm_quantize.argtypes = [
        *(pointer, pointer, size, pointer, pointer, pointer, size),
        ctypes.c_int32,
    ]
    built.mixllm_quantize.restype = None
    return built


@contextmanager
def using(name: str) -> Iterator[None]:
    """Inside, kernels use this instruction set: to measure or to test one."""
    caches = (_quantizer, _linear)
    with isa.forced(name):
        try:
            for cache in caches:
                cache.cache_clear()
            yield
        finally:
            for cache in caches:
                cache.cache_clear()
