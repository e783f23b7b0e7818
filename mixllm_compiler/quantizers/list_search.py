"""A search over all codes of a group at once, in place of GPTQ's one code at a time.

The errors of a group's codes depend on each other through the Hessian; GPTQ commits to the nearest
value column by column. Here several partial sequences survive every column, each with its own fed
back residuals (the M-algorithm; Anderson and Mohan, IEEE Trans. Commun. 32(2), 1984), and the best
one wins.

The same search encodes **trellis rows**: twice the levels for the same bits, by a rule between
neighbours. Trellis-coded quantization (Marcellin and Fischer, IEEE Trans. Commun. 38(1), 1990) with
Ungerboeck's one-dimensional codes in feed-forward form, so that all weights of a word decode at
once. A weight of b bits stores m (b − 1 bits) and u (1 bit); its level is

    4 m + 2 (u_k ⊕ u_{k−2}) + u_{k−1}           (4 states; more states: other taps)

out of 2^(b+1), where u before a group's first weight is 0; survivors are then those of each state
(list Viterbi). Steps, offsets and the scale of a row are those of two-level rows of b + 1 bits. No
stored format has trellis rows: measured on whole models they gain too little above 4 bits
(`bench/trellis.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..formats.row_format import groups_of
from .descent import descend, refine_integers, rescale
from .encode import Encoded, in_groups
from .gptq import SWEEPS, quantize_gptq
from .grid import RATIOS, Grid
from .hessian import Factor, damp

SURVIVORS = 16
_DAMPING = 0.01
_SWEEPS = 2
_BLOCK = 16  # columns between two copies of all residuals that are still to come
# states → delays whose bits make coset bit 1 (⊕) and the delay of coset bit 0
_TAPS = {4: ((0, 2), 1), 8: ((0, 1, 3), 2), 16: ((0, 1, 4), 2)}
_SCALE_FACTORS = (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64)
_TINY = 1e-30
_GRANULAR = 2.2 / 12  # a trellis of step t has 3.2 t²/12 of noise; rounding to all levels 1/12


@dataclass(frozen=True)
class Code:
    """Which codes may follow each other, and how many sequences survive.

    Attributes:
        states: 4, 8 or 16; a state holds the last bits u, the latest one highest.
        survivors: of each state that the encoder keeps; one is Viterbi's algorithm, which is
            exact only without feedback.
        modulus: of levels in cosets, 4; 2 without a code.
        cosets: fp32 [2, states/2, 2]: level mod `modulus` on the way from state 2h + p with bit u
            to state u · states/2 + h, at [u, h, p].
    """

    states: int
    survivors: int
    cosets: Tensor
    modulus: int = 4

    @classmethod
    def plain(cls, survivors: int, device: torch.device) -> Code:
        """No code: any level follows any other. A search for plain rows, survivors by parity."""
        table = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 2, 2).to(device)
        return cls(4, survivors, table, 2)

    @property
    def extra(self) -> int:
        """Bits that levels have more than a row stores."""
        return self.modulus // 4

    @classmethod
    def trellis(cls, states: int, survivors: int, device: torch.device) -> Code:
        """The code with so many states."""
        taps, low = _TAPS[states]
        memory = states.bit_length() - 1
        table = torch.empty(2, states // 2, 2)
        for u in range(2):
            for state in range(states):
                # bits[d] is u of d weights ago
                bits = [u, *(state >> (memory - 1 - d) & 1 for d in range(memory))]
                high = sum(bits[d] for d in taps) % 2
                table[u, state // 2, state % 2] = 2 * high + bits[low]
        return cls(states, survivors, table.to(device))


def levels_of(m: Tensor, u: Tensor, states: int = 4) -> Tensor:
    """Decode one group: m, u integers [R, g] → levels [R, g]."""
    taps, low = _TAPS[states]

    def ago(d: int) -> Tensor:
        return torch.nn.functional.pad(u, (d, 0))[:, : u.shape[1]]

    high = torch.zeros_like(u)
    for d in taps:
        high = high ^ ago(d)
    return 4 * m + 2 * high + ago(low)


def search(y: Tensor, grid: Grid, upper: Tensor, code: Code) -> tuple[Tensor, Tensor]:
    """Levels of a group with little fed-back error: list Viterbi.

    Args:
        y: [R, g] wanted values; the error is Σ_j (residual_j / U_jj)², and residuals of later
            columns take over earlier ones as in GPTQ.
        grid: levels 0 … top, top ≥ 3.
        upper: fp32 [g, g] upper Cholesky factor of the inverse Hessian.

    Returns:
        levels fp32 [R, g] and residuals / U_jj [R, g].
    """
    rows, size = y.shape
    half, kept = code.states // 2, code.survivors
    lanes = code.states * kept  # survivors of state s are lanes s·kept …
    diagonal = upper.diagonal()
    share = upper / diagonal[:, None]
    # In units of the step: residuals are levels; a row's step changes no comparison.
    work = ((y - grid.offset[:, None]) / grid.step[:, None]).t()[:, None]
    work = work.expand(size, lanes, rows).contiguous()
    cosets = code.cosets[..., None, None]
    modulus = code.modulus
    most = ((grid.top - cosets) / modulus).floor_()
    metric = work.new_full((lanes, rows), torch.inf)
    metric[0] = 0
    prices = (1 / diagonal.square()).tolist()
    blocks: list[tuple[Tensor, Tensor, Tensor]] = []
    for start in range(0, size, _BLOCK):
        stop = min(start + _BLOCK, size)
        here = work[: stop - start]
        trail = []
        for j in range(stop - start):
            x = here[j].view(1, half, 2, kept, rows)
            level = torch.sub(x, cosets).div_(modulus).round_().clamp_(min=0)
            level = torch.minimum(level, most).mul_(modulus).add_(cosets)
            left = x - level
            cost = metric.view(1, half, 2, kept, rows)
            cost = torch.addcmul(cost, left, left, value=prices[start + j]).flatten(2, 3)
            if kept == 1:
                least, came = cost.min(2, keepdim=True)
            else:
                least, came = cost.topk(kept, 2, largest=False, sorted=False)
            metric = least.view(lanes, rows)
            left = left.flatten(2, 3).gather(2, came).view(lanes, rows)
            level = level.flatten(2, 3).gather(2, came).view(lanes, rows)
            trail.append((left, level, came.view(lanes, rows)))
            if j + 1 < len(here):
                past = here[j + 1 :].view(-1, 1, half, 2 * kept, rows)
                index = came.expand(len(past), -1, -1, -1, -1)
                ahead = past.expand(-1, 2, -1, -1, -1).gather(3, index).view(-1, lanes, rows)
                factors = share[start + j, start + j + 1 : stop, None, None]
                here[j + 1 :] = ahead.addcmul_(factors, left, value=-1)
        lefts, levels, origin = _trace(trail, half, kept)
        blocks.append((lefts, levels, origin))
        if stop < size:
            work = work[stop - start :].gather(1, origin.expand(size - stop, lanes, rows))
            fed = share[start:stop, stop:].t()
            work.view(size - stop, -1).addmm_(fed, lefts.view(stop - start, -1), alpha=-1)
    lane = metric.argmin(0, keepdim=True)
    found = []
    for lefts, levels, origin in reversed(blocks):
        index = lane.expand(len(lefts), 1, rows)
        found.append((levels.gather(1, index)[:, 0], lefts.gather(1, index)[:, 0]))
        lane = origin.gather(0, lane)
    level, left = (torch.cat(parts[::-1]).t() for parts in zip(*found, strict=True))
    return level, left * grid.step[:, None] / diagonal


def _trace(
    trail: list[tuple[Tensor, Tensor, Tensor]], half: int, kept: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A block's residuals and levels [w, lanes, R] of each last lane, and its first lane."""
    lanes, rows = trail[0][0].shape
    lane = torch.arange(lanes, device=trail[0][0].device)[:, None].expand(lanes, rows)
    lefts, levels = [], []
    for left, level, came in reversed(trail):
        lefts.append(left.gather(0, lane))
        levels.append(level.gather(0, lane))
        lane = (lane // kept % half) * (2 * kept) + came.gather(0, lane)
    return torch.stack(lefts[::-1]), torch.stack(levels[::-1]), lane


def quantize_by_search(
    w: Tensor,
    widths: Tensor,
    h: Tensor,
    factor: Factor,
    group: int,
    *,
    survivors: int = SURVIVORS,
) -> Encoded:
    """Two-level rows for W [N, K]: searched codes, then the descent of GPTQ's.

    Rows of 8 bits, where rounding is fine enough, are GPTQ's own. Two to three times GPTQ's time.

    Args:
        widths: uint8 [N] bits of every row.
        h: fp32 [K, K] E[x xᵀ].
        factor: of the same H.
        survivors: partial sequences that are kept at every column, for each parity of its code.
    """
    with torch.no_grad():
        widths = widths.to(w.device)
        low, high = (widths < 8).nonzero().flatten(), (widths == 8).nonzero().flatten()
        parts = []
        if len(low):
            rows = w[low].float()
            coded = _searched(rows, widths[low], h, factor, group, Code.plain(survivors, w.device))
            descend(rows, coded, h, SWEEPS)
            parts.append(coded)
        if len(high):
            parts.append(quantize_gptq(w[high], widths[high], h, factor, group, "two-level"))
        return Encoded.joined(parts).take(torch.cat([low, high]).argsort())


def quantize_trellis(
    w: Tensor,
    widths: Tensor,
    h: Tensor,
    factor: Factor,
    group: int,
    *,
    states: int = 4,
    survivors: int = 8,
) -> Encoded:
    """Trellis rows for W [N, K] of 2 to 6 bits, see above.

    Args:
        states, survivors: see `Code`.

    Returns:
        In the form of two-level rows of one bit more, whose codes are the levels.
    """
    with torch.no_grad():
        code = Code.trellis(states, survivors, w.device)
        return _searched(w.float(), widths.to(w.device) + code.extra, h, factor, group, code)


def _searched(
    w: Tensor, widths: Tensor, h: Tensor, factor: Factor, group: int, code: Code
) -> Encoded:
    coded = _encode(w, widths, group, factor, code)
    _descend(w, coded, h, code)
    return coded


def _encode(w: Tensor, widths: Tensor, group: int, factor: Factor, code: Code) -> Encoded:
    n, k = w.shape
    importance = factor.diagonal / factor.diagonal.mean()
    noise = code.extra * _GRANULAR
    scale = _row_scales(w, widths, group, importance, noise)
    step, offset, top = torch.ones(3, n, groups_of(k, group), device=w.device)
    codes = torch.empty(n, k, dtype=torch.uint8, device=w.device)
    out = Encoded(widths, group, "two-level", codes, step, offset, top, scale)
    x, at = (w / scale[:, None])[:, factor.columns], 0
    for g in factor.groups:
        columns = out.columns(g)
        here = slice(at, at + columns.stop - columns.start)
        at = here.stop
        grid, _ = _choose(x[:, here].contiguous(), widths, importance[columns], noise)
        level, carried = search(x[:, here], grid, factor.upper[here, here], code)
        out.codes[:, columns] = level.to(torch.uint8)
        out.step[:, g], out.offset[:, g], out.top[:, g] = grid.step, grid.offset, grid.top
        if at < k:
            x[:, at:].addmm_(carried, factor.upper[here, at:], alpha=-1)
    return out


def _row_scales(w: Tensor, widths: Tensor, group: int, importance: Tensor, noise: float) -> Tensor:
    """fp32 [N]: the best of some scales from max|w| / 127 down, by what `_choose` expects."""
    largest = w.abs().amax(1).clamp(min=_TINY) / 127
    weights = in_groups(importance, group)
    best, chosen = torch.full_like(largest, torch.inf), largest
    for factor in _SCALE_FACTORS:
        scale = largest * factor
        x = in_groups(w / scale[:, None], group)
        error = _choose(x, widths, weights, noise)[1].sum(1) * scale.square()
        chosen = torch.where(error < best, scale, chosen)
        best = torch.minimum(error, best)
    return chosen


def _choose(x: Tensor, widths: Tensor, importance: Tensor, noise: float) -> tuple[Grid, Tensor]:
    """Grids of groups x [R, g] or [R, G, g], and their errors.

    Errors are the noise inside the range and what lies beyond it.
    """
    top = (torch.exp2(widths.float()) - 1).view(-1, *[1] * (x.dim() - 2)).expand(x.shape[:-1])
    lo, hi = x.amin(-1).clamp(-127, 0), x.amax(-1).clamp(0, 127)
    best: Grid | None = None
    least = x.new_full(x.shape[:-1], torch.inf)
    for ratio in (1.06, *RATIOS):
        for rounded in (torch.floor, torch.ceil):
            offset = (lo * ratio).round_().clamp_(-127, 0)
            step = rounded((hi - lo) * (ratio / top)).clamp_(min=1)
            step = torch.minimum(step, ((127 - offset) / 3).floor_())
            grid = Grid(step, offset, torch.minimum(top, ((127 - offset) / step).floor_()))
            error = grid.errors(x, importance)
            error += noise * importance.sum(-1) * step.square()
            best = grid if best is None else grid.where(error < least, best)
            least = torch.minimum(error, least)
    assert best is not None
    return best, least


def _descend(w: Tensor, coded: Encoded, h: Tensor, code: Code) -> None:
    """`descent.descend`, with a search over all codes of a group in place of one at a time."""
    h = damp(h, _DAMPING)
    inner = []
    for g in range(coded.step.shape[1]):
        own = h[coded.columns(g), coded.columns(g)]
        lower = torch.linalg.cholesky(own)
        inverse = torch.cholesky_inverse(lower)
        inner.append((lower.float(), torch.linalg.cholesky(inverse, upper=True).float()))
    h = h.float()
    for _ in range(_SWEEPS):
        rescale(w, coded, h)
        target = w / coded.scale[:, None]
        moved = (target - coded.dequantize() / coded.scale[:, None]) @ h
        for g, (lower, upper) in enumerate(inner):
            columns = coded.columns(g)
            before = coded.values(g)
            _codes(coded, g, moved[:, columns], lower, upper, code)
            refine_integers(coded, g, moved, h, before)
            change = coded.values(g) - before
            moved.addmm_(change, h[columns], alpha=-1)
    rescale(w, coded, h)


def _codes(coded: Encoded, g: int, moved: Tensor, lower: Tensor, upper: Tensor, code: Code) -> None:
    """Better levels of a group given all others, where the search finds some."""
    grid, columns = coded.grid(g), coded.columns(g)
    before = grid.values(coded.codes[:, columns].float())
    change = torch.cholesky_solve(moved.t(), lower).t()  # what would be best without a grid
    level, _ = search(before + change, grid, upper, code)
    was = (change @ lower).square().sum(1)
    now = ((before + change - grid.values(level)) @ lower).square().sum(1)
    better = (now < was) & (grid.top >= 3)
    old = coded.codes[:, columns]
    coded.codes[:, columns] = torch.where(better[:, None], level.to(torch.uint8), old)
