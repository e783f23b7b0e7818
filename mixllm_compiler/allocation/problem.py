"""The rows of all matrices of a model as one list of choices with their true bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from ..formats.row_format import RowFormat, width_bytes
from ..salience.scores import Scores

RowTime = Callable[[str, RowFormat], float]
"""(matrix name, format) → seconds that one row of it takes."""


@dataclass(frozen=True)
class Problem:
    """T tensors of R rows in all, F formats.

    Attributes:
        formats: F candidate formats.
        tensors: names of every distinct tensor (tied ones share theirs), in row order.
        shapes: (N, K) of every tensor; the N add up to R.
        siblings: for every tensor the number of the first one that reads the same activation.
        loss: float64 [R, F] nats per token with the price of a row's time, infinite where a format
            is not allowed.
        time: float64 [T, F] that price.
        cost: int64 [T, F] bytes of a stored row.
        allowed: bool [T, F], formats that rows of a tensor may have (if their loss is finite).
        pinned: bool [T], tensors whose width the user set.
        row_cost: int32 [R, F] bytes of every row, where they differ within a tensor: rows of one
            width have groups of their own sizes then (`group_sizes.fold`).
        price: nats per token of a byte that they were chosen for.
    """

    formats: tuple[RowFormat, ...]
    tensors: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[int, int], ...]
    siblings: tuple[int, ...]
    loss: Tensor
    time: Tensor
    cost: Tensor
    allowed: Tensor
    pinned: Tensor
    row_cost: Tensor | None = None
    price: float = 0.0

    @classmethod
    def build(
        cls,
        scores: Scores,
        names: Sequence[str],
        widths: Collection[int],
        pins: Mapping[str, int],
        time: RowTime | None = None,
        price: float = 0.0,
    ) -> Problem:
        """Lay out the matrices `names`.

        Names of one tied tensor become one: its losses add up, its bytes count once.

        Args:
            scores: of at least these matrices.
            names: matrices to quantize.
            widths: bits that rows may have.
            pins: matrix name → bits that all its rows have, in `widths` or not.
            time: seconds of a row by matrix name and format; those of tied names add up.
            price: nats per token that a second is worth.

        Raises:
            OptionError: a row may have none of the formats it is left with, or names of one tensor
                are pinned to different widths.
        """
        tensors: dict[tuple[str, ...], None] = {}
        for name in names:
            tensors[tuple(t for t in scores.fingerprint.twins(name) if t in names)] = None
        formats = scores.formats
        shapes = tuple(scores.shapes[twins[0]] for twins in tensors)
        loss = torch.empty(sum(n for n, _ in shapes), len(formats), dtype=torch.float64)
        priced = torch.zeros(len(tensors), len(formats), dtype=torch.float64)
        may, pinned = [], []
        parts = loss.split([n for n, _ in shapes])
        for twins, rows, extra in zip(tensors, parts, priced, strict=True):
            asked = {pins[name] for name in twins if name in pins}
            if len(asked) > 1:
                raise OptionError(f"{' and '.join(twins)} are one tensor, pinned to two widths")
            allowed = asked or set(widths)
            rows.zero_()
            for name in twins:
                rows += scores.loss[name].cpu()
            if time is not None:
                seconds = [sum(time(name, f) for name in twins) for f in formats]
                extra += price * torch.tensor(seconds, dtype=torch.float64)
                rows += extra
            may.append([f.bits in allowed for f in formats])
            rows[:, ~torch.tensor(may[-1])] = math.inf
            stuck = rows.isinf().all(1)
            if bool(stuck.any()):
                raise OptionError(
                    f"row {int(stuck.nonzero()[0])} of {twins[0]} has an infinite score in every "
                    f"width it may have ({', '.join(map(str, sorted(allowed)))}); allow more "
                    "widths or exclude the matrix"
                )
            pinned.append(bool(asked))
        return cls(
            formats,
            tuple(tensors),
            shapes,
            _siblings(tensors, scores.siblings),
            loss,
            priced,
            torch.tensor([[f.row_bytes(k) for f in formats] for _, k in shapes]),
            torch.tensor(may),
            torch.tensor(pinned),
        )

    @property
    def weights(self) -> int:
        """Number of weights, N·K over all tensors."""
        return sum(n * k for n, k in self.shapes)

    @property
    def fixed_bytes(self) -> int:
        """Bytes that are there whatever is chosen: the tables of row widths."""
        return sum(width_bytes(n) for n, _ in self.shapes)

    @property
    def tensor_of_row(self) -> Tensor:
        """int64 [R], number of the tensor of every row."""
        return torch.arange(len(self.shapes)).repeat_interleave(
            torch.tensor([n for n, _ in self.shapes])
        )

    def column(self, bits: int) -> int:
        """Index of the format of that width, with the smallest groups if there are several."""
        return [f.bits for f in self.formats].index(bits)

    def predicted_loss(self, choice: Tensor) -> float:
        """Nats per token that rows lose in the formats `choice`, int64 [R]; time costs nothing."""
        total = float(self.loss.gather(1, choice.unsqueeze(1)).sum())
        if bool(self.time.any()):
            total -= float(self.time[self.tensor_of_row, choice].sum())
        return total

    def rows_of(self, choice: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Matrix name → uint8 [N] bits and group sizes of its rows, from int64 [R] formats.

        Group sizes are in units of the smallest one.
        """
        least = min(f.group for f in self.formats)
        values = ([f.bits, f.group // least if least else 1] for f in self.formats)
        rows = torch.tensor(list(values), dtype=torch.uint8)[choice]
        parts = rows.split([n for n, _ in self.shapes])
        return {
            name: (part[:, 0].clone(), part[:, 1].clone())
            for twins, part in zip(self.tensors, parts, strict=True)
            for name in twins
        }


def _siblings(tensors: Collection[tuple[str, ...]], siblings: Mapping[str, str]) -> tuple[int, ...]:
    """For every tensor the number of the first one in its group; its own if it is alone."""
    first: dict[str, int] = {}
    numbers = []
    for number, twins in enumerate(tensors):
        group = next((siblings[name] for name in twins if name in siblings), None)
        numbers.append(number if group is None else first.setdefault(group, number))
    return tuple(numbers)
