"""Coordinate descent on tr(E H Eᵀ), E = W − Ŵ, from any codes of two-level rows.

A sweep visits every group: first its codes one column at a time (each gets the value that is
best given all others), then its step t and offset c, then the scale S of the whole row gets its
closed-form optimum. Each move can only lower the error of a row; rows are independent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .encode import Encoded
from .hessian import damp

_DAMPING = 0.01


def descend(w: Tensor, coded: Encoded, h: Tensor, sweeps: int) -> None:
    """Lower tr(E H Eᵀ) of W [N, K] by changing `coded` in place.

    Args:
        h: fp32 [K, K] E[x xᵀ]; damped as for GPTQ, so that noise in its small eigenvalues is not
            followed.
    """
    h = damp(h, _DAMPING).float()
    for _ in range(sweeps):
        rescale(w, coded, h)
        # In units of the row's scale: E/S and its product with H, kept up to date.
        target = w / coded.scale[:, None]
        moved = (target - coded.dequantize() / coded.scale[:, None]) @ h
        for g in range(coded.step.shape[1]):
            columns = coded.columns(g)
            before = coded.values(g)
            _codes(coded, g, moved, h)
            refine_integers(coded, g, moved, h, before)
            change = coded.values(g) - before
            moved.addmm_(change, h[columns], alpha=-1)
    rescale(w, coded, h)


def _codes(coded: Encoded, g: int, moved: Tensor, h: Tensor) -> None:
    """Best codes of a group, column by column; `moved` [N, K] = (E/S) H before the group."""
    columns, grid = coded.columns(g), coded.grid(g)
    work = moved[:, columns].t().contiguous()
    own = h[columns, columns]
    codes = coded.codes[:, columns].t().float().contiguous()
    inverse, zero = 1 / grid.step, torch.zeros_like(grid.top)
    old = codes.clone()
    for j, pivot in enumerate(own.diagonal().tolist()):
        # The error falls by moving column j by work[j] / H_jj; codes move in steps of t.
        wanted = torch.addcmul(old[j], work[j], inverse, value=1 / pivot).round_()
        torch.clamp(wanted, zero, grid.top, out=codes[j])
        work.addr_(own[j], (codes[j] - old[j]).mul_(grid.step), alpha=-1)
    coded.codes[:, columns] = codes.t().to(torch.uint8)


def refine_integers(coded: Encoded, g: int, moved: Tensor, h: Tensor, before: Tensor) -> None:
    """Best integer step, then offset of a group for its codes."""
    columns = coded.columns(g)
    own = h[columns, columns]
    q = coded.codes[:, columns].float()
    most = q.amax(1)
    curved = q @ own
    left = moved[:, columns] - (coded.values(g) - before) @ own
    step, offset = coded.step[:, g], coded.offset[:, g]
    bend = (curved * q).sum(1)
    change = torch.where(bend > 0, (left * q).sum(1) / bend, torch.zeros_like(bend))
    limit = torch.where(most > 0, ((127 - offset) / most).floor(), torch.full_like(most, 255))
    new_step = torch.minimum((step + change).round_(), limit).clamp_(1, 255)
    left -= (new_step - step)[:, None] * curved
    ones = own.sum(0)
    new_offset = (offset + (left.sum(1) / ones.sum())).round_().clamp_(-127, 0)
    new_offset = torch.minimum(new_offset, 127 - new_step * most)
    _accept(coded, g, new_step, new_offset, before, moved[:, columns], own)


def _accept(
    coded: Encoded,
    g: int,
    step: Tensor,
    offset: Tensor,
    before: Tensor,
    moved: Tensor,
    own: Tensor,
) -> None:
    """Take the new integers in rows whose error they lower (rounding may raise it)."""
    q = coded.codes[:, coded.columns(g)].float()

    def error(values: Tensor) -> Tensor:
        change = values - before
        return ((change @ own) * change).sum(1) - 2 * (moved * change).sum(1)

    legal = (offset >= -127) & (coded.widths < 8)  # rows of 8 bits have a scale only
    new = torch.addcmul(offset[:, None], q, step[:, None])
    better = legal & (error(new) < error(coded.values(g)))
    coded.step[:, g] = torch.where(better, step, coded.step[:, g])
    coded.offset[:, g] = torch.where(better, offset, coded.offset[:, g])
    bits = torch.exp2(coded.widths.float()) - 1
    top = torch.minimum(bits, ((127 - coded.offset[:, g]) / coded.step[:, g]).floor())
    coded.top[:, g] = torch.where(coded.widths == 8, coded.top[:, g], top)


def rescale(w: Tensor, coded: Encoded, h: Tensor) -> None:
    """S = (w H zᵀ) / (z H zᵀ) for the integers z of every row; kept where that is not positive."""
    z = coded.dequantize() / coded.scale[:, None]
    curved = z @ h
    bend = (curved * z).sum(1)
    best = (curved * w).sum(1) / bend
    good = (bend > 0) & (best > 0) & best.isfinite()
    coded.scale = torch.where(good, best, coded.scale)
