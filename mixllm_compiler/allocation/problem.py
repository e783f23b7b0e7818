"""The rows of all matrices of a model as one list of choices with their true bytes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import OptionError
from ..formats.row_format import RowFormat, width_bytes
from ..salience.scores import Scores


@dataclass(frozen=True)
class Problem:
    """R rows, F formats.

    Attributes:
        formats: F candidate formats.
        tensors: names of every distinct tensor (tied ones share theirs), in row order.
        shapes: (N, K) of every tensor; the N add up to R.
        loss: float64 [R, F] nats per token, infinite where a format is not allowed.
        cost: int64 [R, F] bytes of the stored row.
        pinned: bool [R], rows whose width the user set.
    """

    formats: tuple[RowFormat, ...]
    tensors: tuple[tuple[str, ...], ...]
    shapes: tuple[tuple[int, int], ...]
    loss: Tensor
    cost: Tensor
    pinned: Tensor

    @classmethod
    def build(
        cls,
        scores: Scores,
        names: Sequence[str],
        widths: Collection[int],
        pins: Mapping[str, int],
    ) -> Problem:
        """Lay out the matrices `names`.

        Names of one tied tensor become one: its losses add up, its bytes count once.

        Args:
            scores: of at least these matrices.
            names: matrices to quantize.
            widths: bits that rows may have.
            pins: matrix name → bits that all its rows have, in `widths` or not.

        Raises:
            OptionError: a row may have none of the formats it is left with, or names of one tensor
                are pinned to different widths.
        """
        tensors: dict[tuple[str, ...], None] = {}
        for name in names:
            tensors[tuple(t for t in scores.fingerprint.twins(name) if t in names)] = None
        formats = scores.formats
        losses, costs, shapes, pinned = [], [], [], []
        for twins in tensors:
            n, k = scores.shapes[twins[0]]
            asked = {pins[name] for name in twins if name in pins}
            if len(asked) > 1:
                raise OptionError(f"{' and '.join(twins)} are one tensor, pinned to two widths")
            allowed = asked or set(widths)
            loss = torch.stack([scores.loss[name].cpu().double() for name in twins]).sum(0)
            loss[:, [f.bits not in allowed for f in formats]] = math.inf
            stuck = loss.isinf().all(1)
            if bool(stuck.any()):
                raise OptionError(
                    f"row {int(stuck.nonzero()[0])} of {twins[0]} has an infinite score in every "
                    f"width it may have ({', '.join(map(str, sorted(allowed)))}); allow more "
                    "widths or exclude the matrix"
                )
            losses.append(loss)
            costs.append(torch.tensor([f.row_bytes(k) for f in formats]).expand(n, -1))
            pinned.append(torch.full((n,), bool(asked)))
            shapes.append((n, k))
        return cls(
            formats,
            tuple(tensors),
            tuple(shapes),
            torch.cat(losses),
            torch.cat(costs),
            torch.cat(pinned),
        )

    @property
    def weights(self) -> int:
        """Number of weights, N·K over all tensors."""
        return sum(n * k for n, k in self.shapes)

    @property
    def fixed_bytes(self) -> int:
        """Bytes that are there whatever is chosen: the tables of row widths."""
        return sum(width_bytes(n) for n, _ in self.shapes)

    def column(self, bits: int) -> int:
        """Index of the format of that width."""
        return [f.bits for f in self.formats].index(bits)

    def widths_of(self, choice: Tensor) -> dict[str, Tensor]:
        """Matrix name → uint8 [N] bits of its rows, from int64 [R] indices of formats."""
        bits = torch.tensor([f.bits for f in self.formats], dtype=torch.uint8)[choice]
        parts = bits.split([n for n, _ in self.shapes])
        return {
            name: part.clone()
            for twins, part in zip(self.tensors, parts, strict=True)
            for name in twins
        }
