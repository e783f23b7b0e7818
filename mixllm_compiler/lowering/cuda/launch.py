"""Runs the generated kernels on tensors: variant, source, machine code, grid, launch.

The arguments of a lowered op are all that is needed. What they lead to is kept, so that a call
costs a few look-ups and a launch on torch's current stream: no synchronization, no memory but
outputs.

Kernels are launched as programmatic dependents: they may begin, and request weights, before the
previous kernel of the stream has ended; activations are read and outputs written after that.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from ctypes import c_int, c_longlong, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import LoweringError
from ...formats.layout import Layout
from ..target import Target
from ..tensors import allocate as allocate
from . import compiling, dispatch, driver, support
from . import layout as tiles
from .generate import TYPES, VERSION, LinearSpec, generate
from .variants import Launch, Variant

_MAX_WIDTHS = 6
_MULTIPROCESSORS = 132  # of an H100 or H200, where sources are shown without a GPU
_SHOWN_TOKENS = (1, 64, 4096)  # whose kernels a dump shows

_forced: Variant | None = None
_programmatic = True


class _Weights(ctypes.Structure):
    _fields_ = [
        ("blob", c_void_p),
        ("n", c_int),
        ("tiles", c_int),
        ("groups", c_int),
        ("end", c_int * _MAX_WIDTHS),
        ("base", c_longlong * _MAX_WIDTHS),
    ]


class _Activations(ctypes.Structure):
    _fields_ = [("codes", c_void_p), ("scales", c_void_p), ("sums", c_void_p), ("m", c_int)]


class _Output(ctypes.Structure):
    _fields_ = [("y", c_void_p), ("bias", c_void_p), ("bias_type", c_int)]


class CudaLinears:
    """Mixed linears: the part of `quantizers.CudaKernels` that multiplies."""

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
        """y [..., N] in model order, of `dtype`, bit for bit that of `ir.reference`.

        Raises:
            LoweringError: no kernel for this device, type or mode, or arguments that do not fit the
                layout.
        """
        lead = codes.shape[:-1]
        tiles.check_blob(packed, layout)
        if codes.shape[-1] != layout.padded_k or scales.shape[-1] != 1:
            raise LoweringError(
                f"activation codes [..., {codes.shape[-1]}] with scales [..., {scales.shape[-1]}] "
                f"do not fit layout '{layout}', which needs [..., {layout.padded_k}] with one scale"
            )
        out = allocate((*lead, layout.n), dtype, codes.device)
        m = out.numel() // layout.n
        if m == 0:
            return out
        if sums.shape[-1] != 1:  # quantized by the definition, which sums every group
            sums = sums.sum(-1, keepdim=True, dtype=torch.int32)
        if bias is not None and bias.dtype not in TYPES:
            bias = bias.float()
        codes, scales, sums = codes.contiguous(), scales.contiguous(), sums.contiguous()
        bias = None if bias is None else bias.contiguous()
        linear = _linear(layout, dtype, codes.device)
        variant = linear.variant(m)
        kernel, launch = linear.kernel(m, variant)
        activations = _Activations(codes.data_ptr(), scales.data_ptr(), sums.data_ptr(), m)
        output = _Output(
            out.data_ptr(),
            None if bias is None else bias.data_ptr(),
            0 if bias is None else TYPES[bias.dtype],
        )
        arguments: list[Any] = [linear.weights(packed.data_ptr()), activations, output]
        if variant.reads_tiles:
            columns = layout.padded_k
            arguments.insert(0, driver.token_map(codes.data_ptr(), m, columns, variant.tokens))
        start(kernel, launch, codes.device, *arguments)
        return out

    def sources(
        self, layout: Layout, mode: str, dtype: torch.dtype, bias: bool, target: Target
    ) -> dict[str, str]:
        """File name → source of the kernels that run a linear for one, some and many tokens."""
        widths = tuple(bits for bits, _ in layout.widths)
        count = _MULTIPROCESSORS
        if torch.cuda.is_available():
            count = torch.cuda.get_device_properties("cuda").multi_processor_count
        found = {}
        for m in _SHOWN_TOKENS:
            variant = dispatch.choose(m, layout, target, count)
            name = f"{VERSION}-linear-{''.join(f'w{b}' for b in widths)}-{variant.regime}.cu"
            found[name] = generate(LinearSpec(widths, dtype, variant))
        return found


@dataclass(frozen=True)
class _Linear:
    """What all calls of one linear have in common."""

    layout: Layout
    dtype: torch.dtype
    device: torch.device
    target: Target
    multiprocessors: int
    template: _Weights

    def weights(self, blob: int) -> _Weights:
        made = _Weights.from_buffer_copy(self.template)
        made.blob = blob
        return made

    def variant(self, m: int) -> Variant:
        if _forced is not None:
            return _forced
        return dispatch.choose(m, self.layout, self.target, self.multiprocessors)

    def kernel(self, m: int, variant: Variant) -> tuple[driver.Kernel, Launch]:
        widths = tuple(bits for bits, _ in self.layout.widths)
        launch = variant.launch(m, self.template.tiles, self.multiprocessors)
        spec = LinearSpec(widths, self.dtype, variant)
        return _kernel(spec, self.target, self.device, launch.shared), launch


@functools.lru_cache(maxsize=4096)
def _linear(layout: Layout, dtype: torch.dtype, device: torch.device) -> _Linear:
    target = Target.of(device)
    problem = support.reason(layout, "token", dtype, target)
    if problem is not None:
        raise LoweringError(f"the CUDA kernels cannot run layout '{layout}' here: {problem}")
    first, at = tiles.first_bytes(layout), 0
    template = _Weights(None, layout.n, 0, layout.groups)
    for i, (bits, n) in enumerate(layout.widths):
        template.base[i] = first[i] - at * layout.groups * tiles.block_bytes(bits)
        at += tiles.tiles(n)
        template.end[i] = at
    template.tiles = at
    count = torch.cuda.get_device_properties(device).multi_processor_count
    return _Linear(layout, dtype, device, target, count, template)


@functools.lru_cache(maxsize=4096)
def _kernel(spec: LinearSpec, target: Target, device: torch.device, shared: int) -> driver.Kernel:
    capability = target.capability
    assert capability is not None
    if spec.variant.reads_tiles and capability != (9, 0):
        raise LoweringError(f"{spec.variant} needs sm_90, this is {target.architecture}")
    kernel = load_kernel(generate(spec), "linear", architecture(capability))
    kernel.allow_shared(_index(device), shared)
    return kernel


def architecture(capability: tuple[int, int]) -> str:
    """What a device's kernels are compiled for: sm_90 has instructions that only sm_90a names."""
    number = f"sm_{capability[0]}{capability[1]}"
    return f"{number}a" if capability == (9, 0) else number


@functools.cache
def load_kernel(source: str, name: str, architecture: str) -> driver.Kernel:
    """The function `name` of a source, compiled once and kept loaded."""
    return driver.load(_compiled(source, name, architecture), name)


def _compiled(source: str, name: str, architecture: str) -> Path:
    return compiling.cubin(source, f"cuda-{name}", architecture)


def compile_ahead(specs: Iterable[LinearSpec], target: Target | None = None) -> None:
    """Compile kernels for a GPU (the current one by default) side by side, into the build cache.

    What the compiler refuses is refused again, with its message, where it is used.
    """
    capability = (target or Target.of("cuda")).capability
    assert capability is not None

    def build(spec: LinearSpec) -> None:
        with suppress(LoweringError):
            _compiled(generate(spec), "linear", architecture(capability))

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the compilers do not hold Python's lock
        list(pool.map(build, dict.fromkeys(specs)))


def start(kernel: driver.Kernel, launch: Launch, device: torch.device, *arguments: Any) -> None:
    """Launch on torch's current stream of a device."""
    with _on(device):
        kernel.launch(
            launch.grid,
            launch.block,
            launch.shared,
            torch.cuda.current_stream(device).cuda_stream,
            arguments,
            launch.cluster,
            _programmatic and _overlaps(device),
        )


@functools.cache
def _overlaps(device: torch.device) -> bool:
    return Target.of(device).at_least(9)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """The driver launches in the current device's context."""
    if device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


@contextmanager
def trying(variant: Variant | None = None, programmatic: bool = True) -> Iterator[None]:
    """Inside, linears run as this variant, with or without overlap: to measure or to test."""
    global _forced, _programmatic
    before = _forced, _programmatic
    _forced, _programmatic = variant, programmatic
    try:
        yield
    finally:
        _forced, _programmatic = before
