"""What EXL3 would make of a model: a simulation, since exllamav3 needs a CUDA extension.

EXL3 is QTIP (arXiv 2406.11235) in whole bits per matrix. Signs and block Hadamard transforms on
both sides of a matrix make its entries Gaussian; a trellis with a state of 16 bits, of which every
weight shifts in its own b, gives each weight one of 65,536 values; tiles of 16 × 16 weights are
coded by Viterbi's algorithm, and the error of 16 columns is fed to the columns behind them (block
LDLQ). Decided in its favour: the values are exact Gaussian quantiles, and the first state of a tile
is free, where EXL3 computes rougher values and makes the tail meet the head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mixllm_compiler.quantizers.hessian import damp
from mixllm_compiler.transforms.hadamard import block_for, block_hadamard

TILE = 16
BLOCK = 128  # of the Hadamard transforms
DAMPING = 0.025
_STATE_BITS = 16
_SCALES = (0.92, 0.96, 1.0, 1.04)
_SAMPLE = 64  # tiles on which the codebook's scale is chosen


def stored_bits(n: int, k: int, bits: int) -> float:
    """Codes, and an fp16 per row and per column."""
    return n * k * bits + 16 * (n + k)


def codebook(device: torch.device, state_bits: int = _STATE_BITS) -> Tensor:
    """fp32 [states]: the normal distribution's quantiles, shuffled."""
    count = 2**state_bits
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    values = torch.special.ndtri(places).float()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return values[order].to(device)


def viterbi(x: Tensor, bits: int, values: Tensor) -> Tensor:
    """The nearest sequences of a trellis to x [T, length]: fp32 of the same shape.

    A state's values follow from its predecessor's by shifting in `bits` bits at the lower end.
    """
    states, new = len(values), 2**bits
    squares, doubled = values.square(), -2 * values
    # What |x − v|² adds beyond x², which is the same for all.
    cost = squares + x[:, :1] * doubled
    back = torch.empty(x.shape[1], len(x), states // new, dtype=torch.uint8, device=x.device)
    for t in range(1, x.shape[1]):
        least, came = cost.view(-1, new, states // new).min(1)
        back[t] = came
        cost = torch.addcmul(squares, x[:, t : t + 1], doubled).view(-1, states // new, new)
        cost = cost.add_(least[..., None]).view(-1, states)
    state = cost.argmin(1, keepdim=True)
    out = torch.empty_like(x)
    for t in reversed(range(x.shape[1])):
        out[:, t] = values[state[:, 0]]
        if t:
            high = state // new
            state = back[t].gather(1, high).long() * (states // new) + high
    return out


def quantize(w: Tensor, h: Tensor, bits: int, values: Tensor) -> Tensor:
    """W [N, K] → what stands for it, for inputs of second moment H [K, K]."""
    n, k = w.shape
    generator = torch.Generator().manual_seed(1)
    signs = [torch.randint(2, (s,), generator=generator).to(w) * 2 - 1 for s in (k, n)]
    columns = signs[0] * w.square().mean(0).sqrt().clamp(min=1e-12)
    x = w / columns
    rows = signs[1] * x.square().mean(1).sqrt().clamp(min=1e-12)
    x = _both(x / rows[:, None])
    scaled = columns[:, None] * h * columns
    turned = _both(scaled.double())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damp(turned, DAMPING)))
    upper = torch.linalg.cholesky(inverse, upper=True).float()
    values = values * _scale_for(x, bits, values)
    out, x = torch.empty_like(x), x.clone()
    for at in range(0, k, TILE):
        here = slice(at, at + TILE)
        tiles = x[:, here].reshape(n // TILE, TILE * TILE)
        out[:, here] = viterbi(tiles, bits, values).view(n, TILE)
        left = (x[:, here] - out[:, here]) @ torch.linalg.inv(upper[here, here])
        x[:, here.stop :] -= left @ upper[here, here.stop :]
    return _both(out) * rows[:, None] * columns


def _both(x: Tensor) -> Tensor:
    """The Hadamard transforms of rows and of columns; its own inverse."""
    for _ in range(2):
        x = block_hadamard(x, block_for(x.shape[-1], BLOCK)).t().contiguous()
    return x


def _scale_for(x: Tensor, bits: int, values: Tensor) -> float:
    """The codebook's scale that errs least on some tiles."""
    tiles = x[:TILE].reshape(TILE, -1, TILE).transpose(0, 1).reshape(-1, TILE * TILE)[:_SAMPLE]
    errors = {s: float((tiles - viterbi(tiles, bits, values * s)).square().sum()) for s in _SCALES}
    return min(errors, key=lambda scale: errors[scale])
