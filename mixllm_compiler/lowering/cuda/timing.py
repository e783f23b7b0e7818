"""Times variants on the GPU: replays of CUDA graphs over more packed weights than the cache holds.

Below about 100 µs a launch from Python takes longer than the kernel, so only a graph's replay
measures the kernel.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import LoweringError
from ...formats.layout import pack
from ...formats.neutral import QuantizedWeight, RowCodes
from ...formats.row_format import RowFormat, groups_of
from ..lowered import LOWERED_LINEAR, LOWERED_QUANTIZE
from ..target import Target
from . import launch, support
from .generate import VERSION, LinearSpec
from .layout import GROUP, NAME
from .tuning import Matrix
from .variants import Variant

log = logging.getLogger("mixllm_compiler.lowering")

ROTATED_BYTES = 260e6  # several times the L2 of any GPU
FEW_TOKENS = 256  # above this many, the weights are no longer what takes the time
JUDGE = Variant("mma", (64, 4))  # the portable kernel, whose bits all others must give


def copies(tensor: Tensor, total: float = ROTATED_BYTES) -> list[Tensor]:
    """The tensor and so many clones that together they are larger than `total` bytes."""
    size = tensor.numel() * tensor.element_size()
    return [tensor] + [tensor.clone() for _ in range(math.ceil(total / size))]


def capture(
    call: Callable[[Any], Any], over: Sequence[Any], seconds: float = 2e-3
) -> Callable[[], float]:
    """A function that measures one call in seconds, over a sample of about so many seconds."""
    call(over[0])  # compiles outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for item in over:
            call(item)

    def replay(times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / times

    replay(2)
    times = max(1, round(seconds / replay(2)))
    return lambda: replay(times) / len(over)


def random_weight(widths: Tensor, k: int, device: torch.device | str) -> QuantizedWeight:
    """Two-level rows of these widths, [N]: uniform codes at steps and offsets of the whole byte."""
    widths = widths.to(device)
    rows = []
    for bits in sorted(set(widths.tolist())):
        fmt = RowFormat(bits, GROUP, "two-level")
        n, groups = int((widths == bits).sum()), groups_of(k, GROUP)
        codes = torch.randint(fmt.qmin, fmt.qmax + 1, (n, k), device=device)
        scales = torch.rand(n, device=device) * 1e-3 + 1e-4
        if bits == 8:
            rows.append(RowCodes(fmt, codes.to(torch.int8), scales))
            continue
        steps = (torch.rand(n, groups, device=device) * (254 // fmt.qmax)).long() + 1
        room = (255 - steps * fmt.qmax).clamp(max=128)
        offsets = (torch.rand(n, groups, device=device) * room).long() + 1
        offsets = torch.minimum(offsets, room)
        codes8, steps8, offsets8 = (t.to(torch.uint8) for t in (codes, steps, offsets))
        rows.append(RowCodes(fmt, codes8, scales, steps=steps8, offsets=offsets8))
    return QuantizedWeight.assemble(len(widths), k, widths, rows)


def available() -> Target:
    """The GPU at hand.

    Raises:
        LoweringError: there is none, or the CUDA kernels do not run on it: says why.
    """
    if not torch.cuda.is_available():
        raise LoweringError(
            "tuning times kernels, and there is no CUDA device; see `mixllm doctor`"
        )
    target = Target.of("cuda")
    problem = support.device_reason(target)
    if problem is not None:
        raise LoweringError(f"the CUDA kernels cannot run on {target.name}: {problem}")
    return target


class GpuTimer:
    """Times candidates on the current GPU; a `tuning.Timer`. Keeps the last matrix there."""

    def __init__(self) -> None:
        self._matrix: Matrix | None = None
        self._blobs: list[Tensor] = []

    def __call__(self, matrix: Matrix, m: int, variants: Sequence[Variant]) -> dict[Variant, float]:
        """µs of every candidate that runs and gives the portable kernel's bits.

        Raises:
            LoweringError: not even the portable kernel runs.
        """
        layout = matrix.layout
        widths = tuple(bits for bits, _ in layout.widths)
        launch.compile_ahead(LinearSpec(widths, torch.bfloat16, v) for v in (JUDGE, *variants))
        if self._matrix is not matrix:
            self._blobs = []
            torch.cuda.empty_cache()
            packed = pack(random_weight(matrix.widths, matrix.k, "cuda"), NAME)
            self._matrix, self._blobs = matrix, copies(packed.blob)
        x = torch.randn(m, matrix.k, device="cuda").bfloat16()
        activation = LOWERED_QUANTIZE(x, "token", GROUP, 0, VERSION)
        text = str(layout)

        def call(blob: Tensor) -> Tensor:
            y: Tensor = LOWERED_LINEAR(*activation, blob, None, text, torch.bfloat16, VERSION)
            return y

        blobs = self._blobs if m <= FEW_TOKENS else self._blobs[:4]
        with launch.trying(JUDGE):
            expected = call(blobs[0])
        found = {}
        for variant in variants:
            with launch.trying(variant):
                try:
                    y = call(blobs[0])
                except LoweringError as error:
                    log.info("mixllm: %s is not tried: %s", variant, error)
                    continue
                if not torch.equal(y, expected):
                    log.warning(
                        "mixllm: %s is wrong for M = %d of layout '%s' on this GPU and is left "
                        "out; please report it", variant, m, text,
                    )  # fmt: skip
                    continue
                run = capture(call, blobs, 1e-3)
                found[variant] = min(run() for _ in range(3)) * 1e6
        return found
