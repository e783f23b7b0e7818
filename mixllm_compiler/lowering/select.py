"""Which kernels a linear gets: of the lowerings that support it, the one of highest priority."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch

from ..errors import LoweringError, OptionError, nearest
from ..formats.layout import Layout
from .cpp import generate as cpp_generate
from .cpp import isa
from .cpp import layout as panels
from .cpp import support as cpp_support
from .cuda import generate as cuda_kernels
from .cuda import layout as cuda_tiles
from .cuda import support as cuda
from .target import Target
from .triton import generate, support
from .triton import layout as tiles

log = logging.getLogger("mixllm_compiler")

Supports = Callable[[Layout, str, torch.dtype, Target], "str | None"]
"""(layout, mode, output type, target) → None, or the reason why not."""


@dataclass(frozen=True)
class Lowering:
    """One way to run a quantized linear.

    Attributes:
        name: as users write it.
        priority: the highest that supports a linear wins.
        packing: name of the packing that its kernels read.
        kernel: the lowered ops' `kernel` argument; `""` keeps the semantic ops.
        device: type of the devices that it is for, `""` for all.
        supports: None if it can run a linear, else the reason why not.
        quantizer: `"kernel"` quantizes activations in a kernel of its own, `"decompose"` leaves
            that to plain torch, where Inductor sees it.
        variant: what else to tell people about the kernels, such as an instruction set.
    """

    name: str
    priority: int
    packing: str
    kernel: str
    device: str
    supports: Supports
    quantizer: Literal["kernel", "decompose"]
    variant: Callable[[], str] = str


@dataclass(frozen=True)
class KernelChoice:
    """What `select` decided for one linear.

    Attributes:
        lowering: name of the lowering.
        packing: name of the packing to pack the weight in.
        kernel: the lowered ops' `kernel` argument; `""`: keep the semantic ops.
        quantizer: `"kernel"` or `"decompose"`, see `Lowering`.
        reasons: why each lowering of a higher priority was passed over, `"triton: …"`.
        variant: see `Lowering`.
    """

    lowering: str
    packing: str
    kernel: str
    quantizer: Literal["kernel", "decompose"]
    reasons: tuple[str, ...] = ()
    variant: str = ""

    @property
    def name(self) -> str:
        """For people: `"cpp.v1 avx512-vnni"`."""
        return f"{self.kernel or self.lowering} {self.variant}".rstrip()


def _everything(layout: Layout, mode: str, dtype: torch.dtype, target: Target) -> None:
    """The definition runs everywhere."""
    return None


@functools.cache
def _announce(reasons: str) -> None:
    log.warning("mixllm: linears run in plain torch, slowly: %s", reasons)


REFERENCE = "reference"
"""The definition itself: it runs everything, everywhere."""

LOWERINGS = {
    lowering.name: lowering
    for lowering in (
        Lowering(REFERENCE, 0, "plain.v1", "", "", _everything, "decompose"),
        Lowering(
            "cpp",
            5,
            panels.NAME,
            cpp_generate.VERSION,
            "cpu",
            cpp_support.reason,
            "kernel",
            lambda: isa.current().name,
        ),
        Lowering("cuda", 20, cuda_tiles.NAME, cuda_kernels.VERSION, "cuda", cuda.reason, "kernel"),
        Lowering("triton", 10, tiles.NAME, generate.VERSION, "cuda", support.reason, "kernel"),
    )
}
"""All lowerings by name."""


def select(
    layout: Layout, mode: str, dtype: torch.dtype, target: Target, only: str | None = None
) -> KernelChoice:
    """Choose the kernels of one linear; once for each reason says that there are none.

    Args:
        layout: of the weight; its packing is not looked at.
        mode: of the activations.
        dtype: of the output.
        target: the device.
        only: the name of the one lowering that may be chosen.

    Raises:
        OptionError: there is no lowering `only`.
        LoweringError: the lowering `only` cannot run this linear.
    """
    if only is not None and only not in LOWERINGS:
        raise OptionError(f"unknown lowering {only!r}.{nearest(only, LOWERINGS)}")
    candidates = [LOWERINGS[only]] if only else LOWERINGS.values()
    reasons: list[str] = []
    for lowering in sorted(candidates, key=lambda low: -low.priority):
        # A lowering sees the layout as it would pack it.
        why = lowering.supports(replace(layout, packing=lowering.packing), mode, dtype, target)
        if why is None:
            own = [r for r in reasons if LOWERINGS[r.partition(":")[0]].device == target.type]
            if lowering.name == REFERENCE and only is None and own:
                _announce("; ".join(own))
            return KernelChoice(
                lowering.name,
                lowering.packing,
                lowering.kernel,
                lowering.quantizer,
                tuple(reasons),
                lowering.variant(),
            )
        reasons.append(f"{lowering.name}: {why}")
    raise LoweringError(
        f"no lowering can run a linear with layout '{layout}': {'; '.join(reasons)}"
    )
