"""Cases computed by the CUDA kernels, for machines without a GPU to compare with.

    python -m tests.gpu.make_cases tests/lowering/gpu_cases.safetensors

Weights are made again from their seed; their digest says whether they are the same ones.
"""

from __future__ import annotations

import argparse
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixllm_compiler.formats.files import save_tensors
from mixllm_compiler.formats.layout import pack
from mixllm_compiler.formats.neutral import QuantizedWeight
from mixllm_compiler.formats.row_format import WIDTHS
from mixllm_compiler.lowering.lowered import LOWERED_LINEAR, LOWERED_QUANTIZE
from tests.lowering.two_level import extreme_weight, random_weight

KIND, VERSION = "gpu-cases", 1
KERNEL = "cuda.v1"


@dataclass(frozen=True)
class Case:
    """One linear: its weight by name, tokens, type, and whether inputs are rotated."""

    weight: str
    m: int
    dtype: torch.dtype = torch.bfloat16
    rotate: int = 0
    bias: bool = False

    @property
    def name(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.weight} m{self.m} {kind} h{self.rotate} {'bias' if self.bias else 'plain'}"


CASES = (
    Case("all widths", 1),
    Case("rotated", 9, torch.float16, 128, bias=True),
    Case("rotated", 33, torch.float32, 256),
    Case("all 4", 7, bias=True),
    Case("extreme", 17, torch.float32),
)


def weight(name: str) -> QuantizedWeight:
    """The weight of a case: rows, columns and groups have tails, unless inputs are rotated."""
    n, k = 130, 768 if name == "rotated" else 600
    widths = torch.tensor((4,) if name == "all 4" else WIDTHS, dtype=torch.uint8)
    widths = widths[torch.arange(n) * 7 % 13 % len(widths)]
    if name == "extreme":
        return extreme_weight(n, k, widths)
    return random_weight(n, k, widths, seed=7)


def digest(weight: QuantizedWeight) -> str:
    """Of all that is stored of a weight."""
    found = hashlib.sha256(weight.widths.numpy().tobytes())
    for bits in sorted(weight.rows):
        for tensor in weight.rows[bits].tensors():
            found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def compute(case: Case) -> dict[str, Tensor]:
    """Inputs and outputs of a case, on the GPU."""
    made = weight(case.weight)
    generator = torch.Generator().manual_seed(len(case.name))
    x = torch.randn(case.m, made.k, generator=generator).to(case.dtype)
    bias = torch.randn(made.n, generator=generator).to(case.dtype) if case.bias else None
    packed = pack(made, "cuda64.v1")
    codes, scales, sums = LOWERED_QUANTIZE(x.cuda(), "token", 128, case.rotate, KERNEL)
    there = None if bias is None else bias.cuda()
    y = LOWERED_LINEAR(
        codes, scales, sums, packed.blob.cuda(), there, str(packed.layout), case.dtype, KERNEL
    )
    found = {"x": x, "codes": codes, "scales": scales, "sums": sums, "y": y}
    return found if bias is None else {**found, "bias": bias}


def main(argv: list[str] | None = None) -> int:
    """Compute all cases, write the file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    args = parser.parse_args(argv)
    tensors = {f"{c.name}/{k}": v for c in CASES for k, v in compute(c).items()}
    digests = {c.weight: digest(weight(c.weight)) for c in CASES}
    about = {"digests": digests, "device": torch.cuda.get_device_name()}
    save_tensors(args.out, KIND, VERSION, tensors, about)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
