"""`PackedLinear`: a linear that is already quantized.

It runs eagerly, on the kernels that a compiled graph would run, and is captured into the same ops
as a linear that the backend quantized.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn

from .errors import OptionError
from .formats.layout import Layout, PackedWeight, pack, unpack
from .formats.neutral import QuantizedWeight
from .formats.plain import spans_of, with_spans
from .ir import ops
from .lowering import lowered
from .lowering.select import KernelChoice, select
from .lowering.target import Target
from .runtime.weights import repacked


class PackedLinear(nn.Module):
    """y = dequantize(mixed_gemm(quantize_activation(x))) with one packed blob.

    The first call on a device chooses kernels and lays the blob out for them, beside the portable
    one that is saved; nothing of that is part of the module's state.

    Args:
        weight: the quantized matrix [N, K].
        bias: [N] or None.
        mode: "group" or "token", the granularity of activation scales.

    Shapes: x [..., K] floating point → y [..., N] in x's dtype (autocast's, if enabled).
    """

    packed: Tensor

    def __init__(
        self, weight: QuantizedWeight, bias: Tensor | None = None, mode: str = "group"
    ) -> None:
        super().__init__()
        if mode not in ops.MODES:
            raise OptionError(f"unknown activation mode {mode!r}; modes are {ops.MODES}")
        packed = pack(weight, "plain.v1")
        self.register_buffer("packed", with_spans(packed.blob, weight.spans))
        self.layout = str(packed.layout)
        self.mode = mode
        self.group = weight.group
        self.rotation = int(weight.transform.removeprefix("hadamard:") or 0)
        self.in_features, self.out_features = weight.k, weight.n
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        if not torch.compiler.is_compiling() and _has_values(x, self.packed):
            choice = self._choice(x.device, dtype)
            if choice.kernel:
                return self._run(x, dtype, choice)
        if self.rotation:
            x = ops.HADAMARD(x, self.rotation)
        codes, scales, sums = ops.QUANTIZE_ACTIVATION(x, self.mode, self.group)
        acc = ops.MIXED_GEMM(codes, scales, sums, self.packed, self.layout)
        y: Tensor = ops.DEQUANTIZE(acc, scales, sums, self.packed, self.layout, self.bias, dtype)
        return y

    def _choice(self, device: torch.device, dtype: torch.dtype) -> KernelChoice:
        known = _CHOICES.setdefault(self, {})
        found = known.get((device, dtype))
        if found is None:
            layout = Layout.parse(self.layout)
            found = known[device, dtype] = select(layout, self.mode, dtype, Target.of(device))
        return found

    def _run(self, x: Tensor, dtype: torch.dtype, choice: KernelChoice) -> Tensor:
        packed = repacked(PackedWeight(self.packed, Layout.parse(self.layout)), choice.packing)
        codes, scales, sums = lowered.LOWERED_QUANTIZE(
            x, self.mode, self.group, self.rotation, choice.kernel
        )
        blob, layout = packed.blob, str(packed.layout)
        args = (codes, scales, sums, blob, self.bias, layout, dtype, choice.kernel)
        y: Tensor = lowered.LOWERED_LINEAR(*args)
        return y

    def quantized_weight(self) -> QuantizedWeight:
        """The matrix in its neutral form."""
        layout = Layout.parse(self.layout)
        spans = spans_of(self.packed, layout)
        return unpack(PackedWeight(self.packed, layout)).sharing(spans)

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.layout}, {self.mode}"


_CHOICES: weakref.WeakKeyDictionary[
    PackedLinear, dict[tuple[torch.device, torch.dtype], KernelChoice]
] = weakref.WeakKeyDictionary()


def _has_values(*tensors: Tensor) -> bool:
    """Whether these are plain tensors on one device, not the stand-ins of a tracer."""
    plain = all(type(t) is Tensor and not t.is_meta for t in tensors)
    return plain and len({t.device for t in tensors}) == 1
