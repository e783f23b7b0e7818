"""What the C++ kernels can do."""

from __future__ import annotations

import torch

from ...errors import MixLLMError
from ...formats.layout import Layout
from ...ir.reference import MAX_INTEGER_K
from ..target import Target
from .kernels import Scheme
from .lanes import LANES, LONGEST_UNIT

OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)
MAX_GROUP = 256  # sums of a group's activations fit 16 bits


def reason(layout: Layout, mode: str, dtype: torch.dtype, target: Target) -> str | None:
    """Why a linear cannot run on these kernels; None if it can. Builds what it needs.

    Args:
        layout: of the weight in any packing.
        mode: of the activations, `"token"` or `"group"`; both are supported.
        dtype: of the output.
        target: the device.
    """
    if target.type != "cpu":
        return f"it needs a CPU, this is {target.type}"
    if layout.group % LONGEST_UNIT or not 0 < layout.group <= MAX_GROUP:
        return f"its groups are multiples of {LONGEST_UNIT} up to {MAX_GROUP}, not {layout.group}"
    unknown = [b for b, _ in layout.widths if b not in LANES]
    if unknown:
        return f"it has no code for rows of {unknown[0]} bits"
    if layout.family == "two-level" and mode == "token" and layout.k > MAX_INTEGER_K:
        return f"sums of K = {layout.k} may not fit 32 bits"
    if dtype not in OUTPUTS:
        return f"it writes bf16, fp16 and fp32, not {dtype}"
    return _build_problem(Scheme(layout.family, "token" if layout.groups == 1 else mode))


def _build_problem(scheme: Scheme) -> str | None:
    """Why the libraries of a scheme are not there; None if they are, maybe since this call."""
    from . import isa, launch

    try:
        chosen = isa.current()
        launch.linear_library(scheme, chosen)
        launch.quantizer_library(chosen)
    except MixLLMError as error:
        return str(error)
    return None
