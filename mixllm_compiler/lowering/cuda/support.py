"""What the CUDA kernels can do, without loading CUDA."""

from __future__ import annotations

import torch

from ...formats.layout import Layout
from ..target import Target
from . import compiling
from .generate import TYPES
from .lanes import LANES
from .layout import GROUP

MAX_K = 65_536
"""Σ code · byte over so many k fits int32, and a row of activations fits a CTA's registers."""

SLOW_INT8 = ((10, 3),)
"""Compute capabilities whose int8 matrix instructions are slower than their bf16 ones."""


def device_reason(target: Target) -> str | None:
    """Why there are no CUDA kernels for a device; None if there are."""
    if target.type != "cuda":
        return f"it needs a CUDA device, this is {target.type}"
    if not target.at_least(8):
        return f"int8 matrix instructions need sm_80 or newer, this is {target.architecture}"
    if target.capability in SLOW_INT8:
        return f"{target.architecture} multiplies int8 more slowly than bf16"
    if compiling.available() is None:
        return compiling.missing()
    return None


def layout_reason(layout: Layout) -> str | None:
    """Why no device can run a layout on these kernels; None if some can."""
    if layout.family != "two-level":
        return f"it knows the family 'two-level', not {layout.family!r}"
    if layout.group != GROUP:
        return f"it knows groups of {GROUP}, not {layout.group}"
    if layout.k > MAX_K:
        return f"it knows K up to {MAX_K}, not {layout.k}"
    unknown = [b for b, _ in layout.widths if b not in LANES]
    return f"it has no code for rows of {unknown[0]} bits" if unknown else None


def reason(layout: Layout, mode: str, dtype: torch.dtype, target: Target) -> str | None:
    """Why a linear cannot run on these kernels; None if it can.

    Args:
        layout: of the weight in any packing.
        mode: of the activations; `"token"` is supported.
        dtype: of the output.
        target: the device.
    """
    problem = layout_reason(layout)
    if problem is not None:
        return problem
    if mode != "token":
        return f"it needs one activation scale a token, not mode {mode!r}"
    if dtype not in TYPES:
        return f"it writes bf16, fp16 and fp32, not {dtype}"
    return device_reason(target)
