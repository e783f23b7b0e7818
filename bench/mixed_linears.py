"""Mixed linears for kernel benches: the committed row mix, random legal two-level rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gpu_timing import copies
from mixllm_compiler.formats.layout import Layout, pack
from mixllm_compiler.formats.neutral import QuantizedWeight
from mixllm_compiler.lowering.cuda.timing import random_weight
from mixllm_compiler.lowering.cuda.tuning import scattered
from mixllm_compiler.lowering.lowered import LOWERED_LINEAR, LOWERED_QUANTIZE

GROUP = 128
KERNEL = "cuda.v1"
MIX = json.loads((Path(__file__).parent / "row_mix.json").read_text(encoding="utf-8"))
LLAMA_8B = ("qkv", "o", "gate_up", "down")


def row_widths(name: str, in_order: bool = False) -> Tensor:
    """uint8 [N]: bits of every row of a matrix of the mix.

    The tiles are dealt to windows at random, and so are the rows of a window to its tiles.
    `in_order`: rows of one width follow each other, so packed order is the model's.
    """
    entry = MIX["matrices"][name]
    tile, window = MIX["tile"], MIX["window"]
    tiles = torch.tensor([int(b) for b, n in entry["tiles"].items() for _ in range(n)])
    generator = torch.Generator().manual_seed(MIX["seed"])
    if in_order:
        return tiles.repeat_interleave(tile).to(torch.uint8)
    return scattered(tiles, window, generator)


@dataclass
class MixedLinear:
    """One matrix: more packed copies of it than the cache holds."""

    weight: QuantizedWeight
    layout: Layout
    blobs: list[Tensor]

    @classmethod
    def of(cls, widths: Tensor, k: int) -> MixedLinear:
        weight = random_weight(widths, k, "cuda")
        packed = pack(weight, "cuda64.v1")
        return cls(weight, packed.layout, copies(packed.blob))

    @property
    def bytes(self) -> int:
        return self.blobs[0].numel()

    def quantize(self, x: Tensor, hadamard: int = 128) -> tuple[Tensor, Tensor, Tensor]:
        return LOWERED_QUANTIZE(x, "token", GROUP, hadamard, KERNEL)

    def gemm(self, activation: tuple[Tensor, Tensor, Tensor], blob: Tensor) -> Tensor:
        return LOWERED_LINEAR(*activation, blob, None, str(self.layout), torch.bfloat16, KERNEL)

    def wrong(self, m: int) -> int:
        """Outputs of M random tokens that differ from the definition's in any bit."""
        x = torch.randn(m, self.layout.k, device="cuda").bfloat16()
        codes, scales, sums = self.quantize(x)
        y = self.gemm((codes, scales, sums), self.blobs[0])
        wrong = 0
        for bits in self.weight.rows:
            rows, at = self.weight.row_codes(bits), self.weight.model_rows(bits)
            acc = codes[:, : self.layout.k].double() @ rows.integers().double().T
            exact = (acc.float() * (rows.scales * scales)).to(y.dtype)
            wrong += int((y[:, at] != exact).sum())
        return wrong
