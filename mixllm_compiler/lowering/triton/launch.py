"""Runs the generated kernels on tensors: spec, source, module, grid, launch.

The arguments of a lowered op are all that is needed. What they lead to (spec, module, sizes) is
kept, so that a call costs a dictionary look-up and a launch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...errors import LoweringError
from ...formats.layout import Layout
from ...formats.row_format import groups_of, padded
from ...ir.ops import HADAMARD
from .. import sources
from ..spec import BlobLayout, Bucket, KernelSpec, Numerics, QuantizerSpec
from ..target import Target
from ..tensors import allocate, rows_of
from . import layout as tiles
from .generate import VERSION, generate
from .schedule import BAND, schedule
from .support import OUTPUTS, device_reason

_MAX_WARPS = 16
_buckets: Callable[[Target], tuple[Bucket, ...]] = schedule


class TritonKernels:
    """The implementation behind kernel name `triton.v1`."""

    def quantize_activation(
        self, x: Tensor, mode: str, group: int, hadamard: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ir.reference.quantize_activation`: the same codes, scales and sums.

        The transform is an op of its own in front of the kernel.

        Raises:
            LoweringError: no kernel for this device or group.
        """
        if hadamard:
            x = HADAMARD(x, hadamard)
        k, lead = x.shape[-1], x.shape[:-1]
        groups = groups_of(k, group)
        spec, kernel = _quantizer_kernel(group, mode, x.dtype, x.device)
        codes = allocate((*lead, padded(k, group)), torch.int8, x.device)
        scales = allocate((*lead, 1 if mode == "token" else groups), torch.float32, x.device)
        sums = allocate((*lead, groups), torch.int32, x.device)
        rows = rows_of(x)
        if codes.numel():
            programs, options = quantizer_launch(spec, groups)
            with _on(x.device):
                kernel.quantize[(rows.shape[0], programs)](
                    rows, codes, scales, sums, k, groups, rows.stride(0), **options
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
            LoweringError: no kernel for this device or dtype, or arguments that do not fit the
                layout.
        """
        lead, groups = codes.shape[:-1], layout.groups
        tiles.check_blob(packed, layout)
        if codes.shape[-1] != layout.padded_k or sums.shape[-1] != groups:
            raise LoweringError(
                f"activation codes [..., {codes.shape[-1]}] with {sums.shape[-1]} groups do not "
                f"fit layout '{layout}', which needs [..., {layout.padded_k}] with {groups} groups"
            )
        # A K of one group makes the modes the same; then, as in the reference, it is "token".
        mode = "token" if scales.shape[-1] == 1 else "group"
        linear = _linear(layout, mode, dtype, bias is not None, codes.device)
        out = allocate((*lead, layout.n), dtype, codes.device)
        m = codes.numel() // layout.padded_k
        if m:
            programs, options = linear.launch(m)
            inputs = (codes.contiguous(), scales.contiguous(), sums.contiguous(), packed)
            extra = () if bias is None else (bias.contiguous(),)
            with _on(codes.device):
                linear.kernel[(programs,)](
                    *inputs, *extra, out, m, layout.n, groups, *linear.tiles, **options
                )
        return out

    def sources(
        self, layout: Layout, mode: str, dtype: torch.dtype, bias: bool, target: Target
    ) -> dict[str, str]:
        """File name → source of the kernel that runs a linear."""
        spec = linear_spec(layout, mode, dtype, bias, target)
        widths = "".join(f"w{b}" for b in spec.layout.widths)
        return {f"{VERSION}-linear-{widths}-{spec.numerics.mode}.py": generate(spec)}


@functools.lru_cache(maxsize=1024)
def quantizer_launch(spec: QuantizerSpec, groups: int) -> tuple[int, dict[str, Any]]:
    """(programs along K, compile-time options) of the quantizer."""
    if spec.mode == "token":
        block, programs = 1 << (groups - 1).bit_length(), 1
    else:
        block = max(1, spec.block // spec.group)
        programs = -(-groups // block)
    warps = max(1, min(_MAX_WARPS, block * spec.group // spec.per_warp))
    return programs, {"BLOCK_G": block, "num_warps": warps, "enable_fp_fusion": True}


@functools.lru_cache(maxsize=256)
def linear_options(bucket: Bucket) -> dict[str, Any]:
    """Compile-time options of one bucket of a linear."""
    return {
        "BLOCK_M": bucket.block_m,
        "ROWS": bucket.rows,
        "SPLIT": bucket.split,
        "STAGES": bucket.stages,
        "BAND": BAND,
        "num_warps": bucket.warps,
        # part · scale + acc in one instruction; said here because Triton's default is changing.
        "enable_fp_fusion": True,
    }


@functools.lru_cache(maxsize=1024)
def linear_spec(
    layout: Layout, mode: str, dtype: torch.dtype, bias: bool, target: Target
) -> KernelSpec:
    """The spec that serves a layout on a target."""
    return KernelSpec(BlobLayout.of(layout), Numerics(mode, dtype, bias), _buckets(target))


@functools.lru_cache(maxsize=256)
def _quantizer_kernel(
    group: int, mode: str, dtype: torch.dtype, device: torch.device
) -> tuple[QuantizerSpec, Any]:
    spec = QuantizerSpec(group, mode, dtype)
    return spec, _kernel(spec, Target.of(device))


@dataclass(frozen=True)
class _Linear:
    """What all calls of one linear have in common.

    Attributes:
        spec: of its kernel.
        kernel: Triton's function.
        tiles: tiles of each width.
    """

    spec: KernelSpec
    kernel: Any
    tiles: tuple[int, ...]

    def launch(self, m: int) -> tuple[int, dict[str, Any]]:
        """(programs, compile-time options) of a call with M tokens."""
        bucket = self.spec.bucket(m)
        programs = sum(self.tiles) * (tiles.TILE // bucket.rows) * -(-m // bucket.block_m)
        return programs, linear_options(bucket)


@functools.lru_cache(maxsize=1024)
def _linear(
    layout: Layout, mode: str, dtype: torch.dtype, bias: bool, device: torch.device
) -> _Linear:
    if dtype not in OUTPUTS:
        raise LoweringError(f"the Triton kernels write bf16, fp16 and fp32, not {dtype}")
    target = Target.of(device)
    spec = linear_spec(layout, mode, dtype, bias, target)
    return _Linear(
        spec, _kernel(spec, target).linear, tuple(tiles.tiles(n) for _, n in layout.widths)
    )


def _kernel(spec: KernelSpec | QuantizerSpec, target: Target) -> Any:
    problem = device_reason(target)
    if problem is not None:
        raise LoweringError(f"the Triton kernels cannot run here: {problem}")
    return module(spec)


@functools.lru_cache(maxsize=256)
def module(spec: KernelSpec | QuantizerSpec) -> ModuleType:
    """The generated module of a spec, imported. Triton is imported here, for the first time."""
    kind = "quantize" if isinstance(spec, QuantizerSpec) else "linear"
    return sources.load(sources.store(generate(spec), ".py", f"triton-{kind}"))


@contextmanager
def trying(buckets: tuple[Bucket, ...]) -> Iterator[None]:
    """Inside, linears run with this schedule: to measure or to test one."""
    global _buckets
    before, _buckets = _buckets, lambda target: buckets
    caches = (linear_spec, _linear)
    try:
        for cache in caches:
            cache.cache_clear()
        yield
    finally:
        _buckets = before
        for cache in caches:
            cache.cache_clear()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)
