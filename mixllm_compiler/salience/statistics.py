"""What is summed up at the linears of a segment, and the scores that are made of it.

Sums are fp32 matrices beside the activations and fp64 vectors on the CPU, whatever dtype the model
has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ..calibration.moments import add_gram, whole
from ..errors import UnsupportedModel
from ..formats.row_format import RowFormat
from ..quantizers.rtn import rounding_error
from ..transforms.hadamard import block_hadamard
from .kinds import FACTORED_KINDS, ScoreSpec
from .probes import Probe, Use

_ROWS = 1 << 24  # weights that are rounded and multiplied with H at a time


class Statistics:
    """Running sums of one scoring run; segments come and go.

    Attributes:
        losses: matrix → fp64 [N, F], sums that `tokens` (or sequences) divide in the end.
        squares: matrix → fp64 [N], Σ_t δ_t² over all uses.
        tokens: summed weights of all supervised tokens.
        sequences: so far.
    """

    def __init__(self, spec: ScoreSpec, probes: Iterable[Probe]) -> None:
        self.spec = spec
        self.losses: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self.factored = spec.kind in FACTORED_KINDS
        self._uses = Counter(p.matrix.name for p in probes)
        self._moments: dict[Use, Tensor] = {}
        self._rows: Counter[Use] = Counter()
        self._of_use: dict[Use, Tensor] = {}
        self._changes: dict[str, dict[int, Tensor]] = {}
        self._deltas: dict[str, list[Tensor]] = {}
        self._seen: set[Use] = set()

    def start_batch(self) -> None:
        """A value read by several linears counts once in a batch."""
        self._seen.clear()

    def add_input(self, probe: Probe, x: Tensor, reach: Tensor | None) -> None:
        """H += xᵀx over the rows of x [..., K] that the loss depends on, `reach` of each."""
        if probe.input in self._seen or not self.factored:
            return
        self._seen.add(probe.input)
        x = x.flatten(0, -2)
        if reach is not None and reach.numel() == len(x) and not bool(reach.all()):
            x = x[reach.flatten().to(x.device)]
        if probe.input not in self._moments:
            k = x.shape[-1]
            self._moments[probe.input] = torch.zeros(k, k, device=x.device)
        add_gram(self._moments[probe.input], x.float())
        self._rows[probe.input] += len(x)

    def add_gradient(
        self,
        probe: Probe,
        x: Tensor,
        dy: Tensor,
        first: int,
        batch: int,
        squares: Tensor | None = None,
        sequence: Tensor | None = None,
    ) -> None:
        """Take δ = dy [..., N] of `batch` sequences from `first` on, x [..., K].

        Args:
            squares: fp32 [N] Σ_t δ_t², where it is known better than from this one draw.
            sequence: int64 [rows], the sequence of each row, from 0 on; by default the rows are
                equally many of every sequence, one after the other.

        Raises:
            UnsupportedModel: the gradient is not finite.
        """
        dy, name = dy.flatten(0, -2).float(), probe.matrix.name
        squares = dy.square().sum(0) if squares is None else squares
        if not bool(squares.isfinite().all()):
            raise UnsupportedModel(
                f"the gradient at {name} holds NaN or infinite values in sequence {first} or the "
                f"{batch - 1} after it; check the float model's loss on this text, and score in "
                "bfloat16 or float32"
            )
        self.add_squares(probe, squares)
        if self.factored:
            return
        x = x.flatten(0, -2).float()
        parts = []
        for delta in self._delta(probe):
            z = F.linear(x, delta) * dy
            if self.spec.kind == "fisher-token":
                parts.append(z.square().sum(0))
            elif sequence is None:
                parts.append(z.reshape(batch, -1, z.shape[-1]).sum(1))
            else:
                parts.append(z.new_zeros(batch, z.shape[-1]).index_add_(0, sequence, z))
        found = torch.stack(parts, -1).double().cpu()
        if self.spec.kind == "fisher-token":
            self._add_loss(name, 0.5 * found)
        else:  # a weight used twice changes in both places at once: the square comes last
            changes = self._changes.setdefault(name, {})
            for d, change in enumerate(found, first):
                changes[d] = changes[d] + change if d in changes else change

    def add_squares(self, probe: Probe, squares: Tensor) -> None:
        """Σ_t δ_t² [N] of one use of a matrix."""
        name, squares = probe.matrix.name, squares.double().cpu()
        self.squares[name] = self.squares.get(name, 0) + squares
        self._of_use[probe.use] = self._of_use.get(probe.use, 0) + squares

    def _delta(self, probe: Probe) -> list[Tensor]:
        """fp32 [N, K] per format, as the unrotated input sees it."""
        if probe.matrix.name not in self._deltas:
            w = probe.matrix.value().float()
            errors = (rounding_error(w, f, None, self.spec.clip) for f in self.spec.formats)
            self._deltas[probe.matrix.name] = [_unturned(probe, e) for e in errors]
        return self._deltas[probe.matrix.name]

    def finish(self, probes: Iterable[Probe], per_sequence: Tensor) -> None:
        """All gradients of these linears are in: make scores of them and free the rest.

        Args:
            per_sequence: fp64 [S] summed token weights of every sequence.
        """
        probes = list(probes)
        if self.factored:
            for value, group in _by_input(probes):
                moment = self._moments.pop(value, None)
                if moment is not None:
                    self._factored_losses(group, moment, self._rows.pop(value))
        for probe in probes:
            name = probe.matrix.name
            self._uses[name] -= 1
            if not self._uses[name] and name in self._changes:
                changes = self._changes.pop(name)
                a = torch.stack([changes[d] for d in sorted(changes)])
                per_sequence = per_sequence[sorted(changes)]
                self._add_loss(name, _of_changes(a, self.spec.kind, per_sequence))
            if not self._uses[name]:
                self._deltas.pop(name, None)

    def open_changes(self) -> dict[str, dict[int, Tensor]]:
        """Matrix → sequence → fp64 [N, F] A_d, of matrices with uses that are still to come."""
        return self._changes

    def forget(self, probes: Iterable[Probe]) -> None:
        """These linears were finished by an earlier run."""
        self._uses.subtract(p.matrix.name for p in probes)

    def _factored_losses(self, group: list[Probe], moment: Tensor, rows: int) -> None:
        h = whole(moment).div_(max(rows, 1))
        turn = group[0].matrix.transform
        if turn:
            block = int(turn.removeprefix("hadamard:"))
            h = block_hadamard(block_hadamard(h, block).t(), block)
        importance = h.diagonal().clone()
        for probe in group:
            squares = self._of_use.pop(probe.use, None)
            if squares is None and self.spec.kind != "hessian":
                continue
            w = probe.matrix.value().float()
            parts = [
                torch.stack([self._error(rows, f, importance, h) for f in self.spec.formats], -1)
                for rows in w.split(max(1, _ROWS // w.shape[1]))
            ]
            error = torch.cat(parts).double().cpu()
            if squares is not None:
                error *= 0.5 * squares[:, None]
            self._add_loss(probe.matrix.name, error)

    def _error(self, w: Tensor, fmt: RowFormat, importance: Tensor, h: Tensor) -> Tensor:
        """fp32 [n]: Δ H Δᵀ of every row of w [n, K]."""
        delta = rounding_error(w, fmt, importance, self.spec.clip)
        return (delta @ h).mul_(delta).sum(1)

    def _add_loss(self, name: str, loss: Tensor) -> None:
        self.losses[name] = self.losses.get(name, 0) + loss

    def result(self, per_sequence: Tensor) -> dict[str, Tensor]:
        """fp32 [N, F] per matrix."""
        tokens = float(per_sequence.sum())
        by = {"paper": max(len(per_sequence), 1), "hessian": 1}.get(self.spec.kind, tokens)
        return {name: (loss / by).clamp_min_(0).float() for name, loss in self.losses.items()}


def _of_changes(a: Tensor, kind: str, per_sequence: Tensor) -> Tensor:
    """Sums over sequences of A [S, N, F]."""
    if kind != "paper":
        return 0.5 * a.square().sum(0)
    u = a / per_sequence.clamp_min(1e-30)[:, None, None]
    return (u + 0.5 * u * u).abs().sum(0)


def _unturned(probe: Probe, delta: Tensor) -> Tensor:
    turn = probe.matrix.transform
    return block_hadamard(delta, int(turn.removeprefix("hadamard:"))) if turn else delta


def _by_input(probes: list[Probe]) -> Iterator[tuple[Use, list[Probe]]]:
    groups: dict[Use, list[Probe]] = {}
    for probe in probes:
        groups.setdefault(probe.input, []).append(probe)
    yield from groups.items()
