"""Compile generated kernels to PTX without a GPU: for tests, and to look at what comes out."""

from __future__ import annotations

from typing import Any

import torch

from ...errors import LoweringError
from ..spec import KernelSpec, QuantizerSpec
from .launch import linear_options, module, quantizer_launch
from .support import interpreted

_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
}


def compile_ptx(
    spec: KernelSpec | QuantizerSpec, capability: int, block_m: int | None = None, groups: int = 32
) -> str:
    """PTX of a kernel for a CUDA architecture.

    Args:
        spec: what to compile. A bias is taken to have the type of the output.
        capability: 80 for sm_80, 90 for sm_90.
        block_m: which bucket of a linear's schedule; by default the last.
        groups: along K; only a quantizer's code depends on it.

    Raises:
        LoweringError: Triton interprets its kernels in this process, or there is no such bucket.
    """
    if interpreted():
        raise LoweringError("TRITON_INTERPRET=1 makes Triton interpret kernels, not compile them")
    if isinstance(spec, QuantizerSpec):
        kernel, options = module(spec).quantize, quantizer_launch(spec, groups)[1]
    else:
        found = [b for b in spec.schedule if block_m in (None, b.block_m)]
        if not found:
            raise LoweringError(f"no bucket of {block_m} tokens in '{spec}'")
        kernel, options = module(spec).linear, linear_options(found[-1])
    return _compile(kernel, _signature(kernel, spec), options, capability)


def _signature(kernel: Any, spec: KernelSpec | QuantizerSpec) -> dict[str, str]:
    """Triton's types of the run-time arguments, as `launch` passes them."""
    if isinstance(spec, QuantizerSpec):
        pointers = {"x": _POINTERS[spec.dtype], "codes": "*i8", "scales": "*fp32", "sums": "*i32"}
    else:
        out = _POINTERS[spec.numerics.out]
        pointers = {"x": "*i8", "x_scales": "*fp32", "x_sums": "*i32", "blob": "*u8"}
        pointers |= {"bias": out, "out": out}
    return {name: pointers.get(name, "i32") for name in kernel.arg_names}


def _compile(
    kernel: Any, signature: dict[str, str], options: dict[str, Any], capability: int
) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    constants = {name: value for name, value in options.items() if name in names}
    signature = {name: "constexpr" if name in constants else t for name, t in signature.items()}
    # Allocations of torch are aligned to 16 bytes and more; the launcher finds the same.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if signature[name].startswith("*")
    }
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={name: value for name, value in options.items() if name not in names},
    )
    ptx: str = compiled.asm["ptx"]
    return ptx
