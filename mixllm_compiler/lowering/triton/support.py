"""What the Triton kernels can do, without importing Triton."""

from __future__ import annotations

import importlib.util
import os

import torch

from ...errors import LoweringError
from ...formats.layout import Layout
from ..target import Target
from . import layout as tiles
from .generate import chunk_of

OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)


def interpreted() -> bool:
    """Whether Triton interprets its kernels instead of compiling them (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def device_reason(target: Target) -> str | None:
    """Why there are no Triton kernels for a device; None if there are."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if interpreted() or target.at_least(8):
        return None
    if target.type == "cuda":
        return f"int8 matrix instructions need sm_80 or newer, this is {target.architecture}"
    return f"it needs a CUDA device, this is {target.type} (TRITON_INTERPRET=1 interprets kernels)"


def reason(layout: Layout, mode: str, dtype: torch.dtype, target: Target) -> str | None:
    """Why a linear cannot run on these kernels; None if it can.

    Args:
        layout: of the weight in any packing.
        mode: of the activations, `"token"` or `"group"`; both are supported.
        dtype: of the output.
        target: the device.
    """
    if layout.family != "asym":
        return f"it knows the family 'asym', not {layout.family!r}"
    unknown = [b for b, _ in layout.widths if b not in tiles.PLANES]
    if unknown:
        return f"it has no code for rows of {unknown[0]} bits"
    if dtype not in OUTPUTS:
        return f"it writes bf16, fp16 and fp32, not {dtype}"
    try:
        chunk_of(layout.group)
    except LoweringError as error:
        return str(error)
    return device_reason(target)
