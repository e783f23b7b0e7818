"""Curvature without a backward: how far noise on an output moves the model's own distribution.

Noise ε on the rows of a group, with random signs for every token and row, changes the next-token
distribution by KL = ½ Σ_t Σ_n ε² δ²_{t,n} on average: the trace of the group's Fisher information
(Hutchinson's estimate; forward-only two-point estimates of 2503.14868). Rows of one linear are put
into groups of like output energy, and all rows of a group get the mean of their group. The rest of
the score is that of `kfac`. Costs one run of the rest of the model for each linear, group and
repetition; needs logits, and no gradient of anything.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from .probes import Probe, Use
from .replay import Replay, Values
from .supervision import Supervision, chunks, generator_of, probabilities, supervise

GROUPS = 8  # of rows of one linear
REPEATS = 2  # batches that each group is measured on
NOISE = 0.1  # in units of the root mean square of the group's output


class ForwardOnly(Replay):
    """A scoring run that takes Σ_t δ² from changes of the output."""

    noise: tuple[Probe, Tensor, torch.Generator] | None = None
    energy: dict[Use, Tensor] | None = None
    recording = False

    def run_forward(self) -> None:
        self.known: list[Supervision] = []
        with torch.no_grad():
            self._measure()
            super().run_forward()

    def result(self, probe: Probe, y: Tensor) -> Tensor:
        if self.recording and self.energy is not None:
            self.energy[probe.use] = y.flatten(0, -2).float().square().mean(0)
        if self.noise is not None and self.noise[0].use == probe.use:
            _, scale, generator = self.noise
            signs = torch.rand(y.shape, generator=generator, device=y.device) < 0.5
            return y + torch.where(signs, scale, -scale).to(y.dtype)
        return y

    def _measure(self) -> None:
        """Every group of rows on `REPEATS` of the batches, as many groups on each batch."""
        groups: list[tuple[int, Probe, Tensor, float]] = []
        sums: dict[int, float] = {}
        turns: list[list[int]] = []
        for b in range(len(self.batches)):
            self.at = b
            starts, logits = self._plain(b)
            weights = self.token_weights
            first, size = self.firsts[b], self.sizes[b]
            own = None if weights is None else weights[first : first + size]
            found = supervise(logits, self.batches[b], self.where, self.spec, own)
            self.known.append(found)
            if not groups:
                groups = list(self._groups())
                turns = _turns(len(groups), len(self.batches))
                self.total += sum(map(len, turns))
            for index in turns[b]:
                i, probe, rows, scale = groups[index]
                noise = torch.zeros(probe.matrix.n, device=rows.device)
                noise[rows] = scale
                draw = generator_of(logits.device, self.spec.seed, index)
                self.noise = (probe, noise, draw)
                moved = self._rest(b, i, starts[i])
                self.noise = None
                per_token = divergence(logits, moved, found) / float(found.tokens.sum())
                sums[index] = sums.get(index, 0.0) + 2 * per_token / (scale**2 * len(rows))
                self.step()
        self.curvature = self._per_row(groups, sums, turns)

    def _plain(self, b: int) -> tuple[list[Values], Tensor]:
        """What every segment of one batch reads, and the logits."""
        self.recording, self.energy = True, self.energy or {}
        starts: list[Values] = [{}]
        for segment in self.segments:
            given = {**self.batches[b], **starts[-1]}
            starts.append(self.run_graph.run_segment(segment, given))
        self.recording = False
        return starts, self._logits(starts[-1])

    def _rest(self, b: int, i: int, live: Values) -> Tensor:
        for segment in self.segments[i:]:
            live = self.run_graph.run_segment(segment, {**self.batches[b], **live})
        return self._logits(live)

    def _logits(self, live: Values) -> Tensor:
        logits = live.get(self.where.logits) if self.where.logits is not None else None
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            raise UnsupportedModel(
                "kind='zeroth-order' compares next-token distributions, and this model returns no "
                "logits; use kind='hessian'"
            )
        return logits

    def _groups(self) -> Iterator[tuple[int, Probe, Tensor, float]]:
        """(segment, linear, rows of like energy, amplitude of their noise)."""
        assert self.energy is not None
        for i, segment in enumerate(self.segments):
            for probe in self.inside(segment):
                energy = self.energy[probe.use]
                for rows in energy.argsort().tensor_split(min(GROUPS, len(energy))):
                    amplitude = NOISE * float(energy[rows].mean().sqrt())
                    if amplitude > 0:  # rows that are always zero stay without curvature
                        yield i, probe, rows, amplitude

    def _per_row(
        self,
        groups: list[tuple[int, Probe, Tensor, float]],
        sums: dict[int, float],
        turns: list[list[int]],
    ) -> dict[Use, Tensor]:
        """fp32 [N] E[δ²] per linear."""
        counts = [sum(index in turn for turn in turns) for index in range(len(groups))]
        found: dict[Use, Tensor] = {}
        for index, (_, probe, rows, _) in enumerate(groups):
            rest = torch.zeros(probe.matrix.n, device=rows.device)
            found.setdefault(probe.use, rest)[rows] = sums[index] / counts[index]
        return found

    def supervised(self, values: Values, b: int) -> Supervision:
        return self.known[b]

    def finish(self, i: int) -> None:
        tokens = float(self.weights.sum())
        for probe in self.inside(self.segments[i]):
            if probe.use in self.curvature:
                self.statistics.add_squares(probe, self.curvature[probe.use] * tokens)
        super().finish(i)


def _turns(groups: int, batches: int) -> list[list[int]]:
    """Which groups are measured on which batch."""
    repeats = min(REPEATS, batches)
    return [
        [g for g in range(groups) if any((g + r) % batches == b for r in range(repeats))]
        for b in range(batches)
    ]


def divergence(logits: Tensor, moved: Tensor, found: Supervision) -> float:
    """Σ_t w_t KL(softmax(logits) ‖ softmax(moved)) of logits [B, T, V], in nats."""
    total = 0.0
    for b in range(len(logits)):
        for part in chunks(*logits.shape[1:]):
            weights = found.weights[b, part]
            if not bool((weights > 0).any()):
                continue
            p = probabilities(logits[b, part])
            q = moved[b, part].float().log_softmax(-1)
            # xlogy: a token of probability 0 adds nothing, whatever log q is.
            each = torch.special.xlogy(p, p) - torch.where(p > 0, p * q, torch.zeros_like(p))
            total += float((each.sum(-1, dtype=torch.float64) * weights).sum())
    return max(total, 0.0)
