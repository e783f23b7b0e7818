"""Runs the generated kernels on tensors: spec, source, module, grid, launch.

The arguments of a lowered op are all that is needed. What they lead to (spec, module, sizes) is
kept, so that a call costs a dictionary look-up and a launch.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...errors import LoweringError
from ...formats.layout import Layout
from ...formats.row_format import groups_of, padded
from .. import sources
from ..spec import BlobLayout, Bucket, KernelSpec, Numerics, QuantizerSpec
from ..target import Target
from . import layout as tiles
from .generate import generate
from .schedule import BAND, schedule
from .support import OUTPUTS, device_reason

_MAX_WARPS = 16


class TritonKernels:
    """The implementation behind kernel name `triton.v1`."""

    def quantize_activation(
        self, x: Tensor, mode: str, group: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `ir.reference.quantize_activation`: the same codes, scales and sums.

        Raises:
            LoweringError: no kernel for this device or group.
        """
        k, lead = x.shape[-1], x.shape[:-1]
        groups = groups_of(k, group)
        spec = QuantizerSpec(group, mode, x.dtype)
        kernel = _kernel(spec, _target(x.device))
        codes = allocate((*lead, padded(k, group)), torch.int8, x.device)
        scales = allocate((*lead, 1 if mode == "token" else groups), torch.float32, x.device)
        sums = allocate((*lead, groups), torch.int32, x.device)
        rows = x.reshape(-1, k)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
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
        spec, kernel = _linear_kernel(layout, mode, dtype, bias is not None, codes.device)
        out = allocate((*lead, layout.n), dtype, codes.device)
        m = codes.numel() // layout.padded_k
        if m:
            launch = linear_launch(spec, layout, m)
            extra = () if bias is None else (bias.contiguous(),)
            with _on(codes.device):
                kernel.linear[launch.grid](
                    *(codes.contiguous(), scales.contiguous(), sums.contiguous(), packed),
                    *(*extra, out, m, layout.n, groups, *launch.tiles),
                    **launch.options,
                )
        return out


def allocate(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for an output; its contents are arbitrary."""
    return torch.empty(shape, dtype=dtype, device=device)


def quantizer_launch(spec: QuantizerSpec, groups: int) -> tuple[int, dict[str, Any]]:
    """(programs along K, compile-time options) of the quantizer."""
    if spec.mode == "token":
        block, programs = 1 << (groups - 1).bit_length(), 1
    else:
        block = max(1, spec.block // spec.group)
        programs = -(-groups // block)
    warps = max(1, min(_MAX_WARPS, block * spec.group // spec.per_warp))
    return programs, {"BLOCK_G": block, "num_warps": warps, "enable_fp_fusion": True}


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


@dataclass(frozen=True)
class Launch:
    """Grid, run-time tile counts and compile-time options of one call of a linear."""

    grid: tuple[int]
    tiles: tuple[int, ...]
    options: dict[str, Any]


@functools.lru_cache(maxsize=4096)
def linear_launch(spec: KernelSpec, layout: Layout, m: int) -> Launch:
    """How to launch a linear of M tokens."""
    bucket = spec.bucket(m)
    counts = tuple(tiles.tiles(n) for _, n in layout.widths)
    programs = sum(counts) * (tiles.TILE // bucket.rows) * -(-m // bucket.block_m)
    return Launch((programs,), counts, linear_options(bucket))


@functools.lru_cache(maxsize=1024)
def linear_spec(
    layout: Layout, mode: str, dtype: torch.dtype, bias: bool, target: Target
) -> KernelSpec:
    """The spec that serves a layout on a target."""
    return KernelSpec(BlobLayout.of(layout), Numerics(mode, dtype, bias), schedule(target))


@functools.lru_cache(maxsize=1024)
def _linear_kernel(
    layout: Layout, mode: str, dtype: torch.dtype, bias: bool, device: torch.device
) -> tuple[KernelSpec, Any]:
    if dtype not in OUTPUTS:
        raise LoweringError(f"the Triton kernels write bf16, fp16 and fp32, not {dtype}")
    target = _target(device)
    spec = linear_spec(layout, mode, dtype, bias, target)
    return spec, _kernel(spec, target)


@functools.lru_cache(maxsize=64)
def _target(device: torch.device) -> Target:
    return Target.of(device)


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


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)
