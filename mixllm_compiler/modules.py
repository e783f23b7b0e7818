"""`PackedLinear`: a linear that is already quantized.

It runs eagerly and is captured into the same ops as a linear that the backend quantized.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import OptionError
from .formats.layout import Layout, PackedWeight, pack, unpack
from .formats.neutral import QuantizedWeight
from .ir import ops


class PackedLinear(nn.Module):
    """y = dequantize(mixed_gemm(quantize_activation(x))) with one packed blob.

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
        self.register_buffer("packed", packed.blob)
        self.layout = str(packed.layout)
        self.mode = mode
        self.group = weight.group
        self.rotation = int(weight.transform.removeprefix("hadamard:") or 0)
        self.in_features, self.out_features = weight.k, weight.n
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        if self.rotation:
            x = ops.HADAMARD(x, self.rotation)
        codes, scales, sums = ops.QUANTIZE_ACTIVATION(x, self.mode, self.group)
        acc = ops.MIXED_GEMM(codes, scales, sums, self.packed, self.layout)
        y: Tensor = ops.DEQUANTIZE(acc, scales, sums, self.packed, self.layout, self.bias, dtype)
        return y

    def quantized_weight(self) -> QuantizedWeight:
        """The matrix in its neutral form."""
        return unpack(PackedWeight(self.packed, Layout.parse(self.layout)))

    def extra_repr(self) -> str:
        return f"{self.in_features} → {self.out_features}, {self.layout}, {self.mode}"
