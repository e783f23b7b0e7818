"""Random quantized weights, and the float64 oracle that kernels are held against."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from mixllm_compiler.formats.neutral import QuantizedWeight, RowCodes
from mixllm_compiler.formats.row_format import RowFormat, groups_of
from mixllm_compiler.quantizers.rtn import quantize_rtn

ALL_WIDTHS = (2, 3, 4, 5, 6, 8)


def mix(n: int, widths: Sequence[int], share: float | None = None) -> Tensor:
    """uint8 [n]: `share` of the rows, at least one, have the last width, spread over the matrix."""
    if share is None:
        return torch.tensor(list(widths), dtype=torch.uint8)[torch.randint(len(widths), (n,))]
    out = torch.full((n,), widths[0], dtype=torch.uint8)
    out[torch.randperm(n)[: max(1, round(share * n))]] = widths[-1]
    return out


def random_weight(
    n: int, k: int, widths: Tensor, group: int, family: str = "asym"
) -> QuantizedWeight:
    """Quantized Gaussian rows, with one group of zeros and one that is constant."""
    w = torch.randn(n, k)
    w[0, :group] = 0
    w[-1, -group:] = 0.25
    return quantize_rtn(w, widths, group, family=family)


def unit_weight(
    n: int, k: int, widths: Tensor, group: int, extreme: bool = False
) -> QuantizedWeight:
    """Random integers, all scales 1; `extreme`: the largest magnitudes only."""
    rows, groups = [], groups_of(k, group)
    for bits in sorted(set(widths.tolist())):
        fmt = RowFormat(bits, group)
        count = int((widths == bits).sum())
        codes = torch.randint(fmt.qmin, fmt.qmax + 1, (count, k))
        zeros = torch.randint(0, fmt.qmax + 1, (count, groups))
        if extreme:
            codes = torch.where(codes > 0, fmt.qmax, fmt.qmin)
            zeros = torch.where(zeros > fmt.qmax // 2, fmt.qmax, 0)
        codes = codes.to(torch.int8 if fmt.symmetric else torch.uint8)
        scales = torch.ones(count, groups, dtype=torch.float16)
        rows.append(RowCodes(fmt, codes, scales, None if fmt.symmetric else zeros.to(torch.uint8)))
    return QuantizedWeight.assemble(n, k, widths, rows)


def oracle(
    codes: Tensor, scales: Tensor, weight: QuantizedWeight, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(y, magnitude) float64 [M, N]: x̂ Ŵᵀ + bias from the quantizers' results; Σ |x̂| |ŵ| + |bias|.

    The blob is not looked at: Ŵ is the neutral form's, x̂ is codes times scales.
    """
    group = weight.group
    wide = scales.double()
    if wide.shape[-1] == 1:
        wide = wide.expand(-1, groups_of(weight.k, group))
    x = (codes.double() * wide.repeat_interleave(group, -1))[:, : weight.k]
    w = weight.dequantize().to(x.device)
    y, magnitude = x @ w.T, x.abs() @ w.abs().T
    if bias is not None:
        y, magnitude = y + bias.double(), magnitude + bias.double().abs()
    return y, magnitude


def assert_close(y: Tensor, expected: Tensor, magnitude: Tensor, ulps: float = 0.5) -> None:
    """1e-6 of the sum of magnitudes, and a rounding of so many ulps to the output's type."""
    assert not y.isnan().any(), "a part of the output was not written"
    room = 1e-6 * magnitude + ulps * torch.finfo(y.dtype).eps * expected.abs()
    if y.dtype == torch.float16:
        room += 2.0**-25  # spacing of its subnormal numbers
    excess = ((y.double() - expected).abs() - room).max().item()
    assert excess <= 0, f"off by {excess:.3g} more than allowed"


class Guarded:
    """Stands in for the launcher's `allocate`: poisons outputs, watches the bytes around them."""

    GUARD = 512  # bytes; keeps the alignment of torch's allocations

    def __init__(self) -> None:
        self._buffers: list[tuple[Tensor, int, int]] = []

    def __call__(self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = math.prod(shape) * dtype.itemsize
        poison = 0xFF if dtype.is_floating_point else 0x7F  # floats of ones are NaN
        buffer = torch.full((size + 2 * self.GUARD,), poison, dtype=torch.uint8, device=device)
        self._buffers.append((buffer, size, poison))
        return buffer[self.GUARD : self.GUARD + size].view(dtype).view(shape)

    def check(self) -> None:
        """Nothing was written outside of any output."""
        assert self._buffers, "no output was allocated here"
        for buffer, size, poison in self._buffers:
            assert (buffer[: self.GUARD] == poison).all(), "written in front of an output"
            assert (buffer[self.GUARD + size :] == poison).all(), "written behind an output"


def watched_outputs(
    lowering: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """The body of a fixture: a test's outputs are `Guarded`, unless it asks for `unguarded`."""
    if "unguarded" in request.fixturenames:
        yield
        return
    launch = importlib.import_module(f"mixllm_compiler.lowering.{lowering}.launch")
    allocate = Guarded()
    monkeypatch.setattr(launch, "allocate", allocate)
    yield
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    allocate.check()
