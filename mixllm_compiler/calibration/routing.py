"""Which token each row of a product with experts is, seen while the graph runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from ..ir.experts import gathers


@dataclass(frozen=True)
class Rows:
    """The rows of one product in one batch.

    Attributes:
        experts: the rows of each expert, in order; may be empty.
        index: int64 [S], token of every row.
        tokens: how many tokens there are.
    """

    experts: tuple[slice, ...]
    index: Tensor
    tokens: int

    def of_tokens(self, values: Tensor | None) -> Tensor | None:
        """[S] what `values` says of each row's token; None if it is not about these tokens."""
        if values is None or values.numel() != self.tokens:
            return None
        return values.flatten().to(self.index.device)[self.index]

    def sequences(self, count: int) -> Tensor:
        """int64 [S]: the sequence of each row, of `count` equally long ones."""
        return self.index // max(1, self.tokens // count)


class Routing:
    """Watches the gathers of tokens of a graph.

    Attributes:
        override: for a `SegmentInterpreter`: gathers that leave a note.
    """

    def __init__(self, products: Iterable[fx.Node]) -> None:
        """Watch these products; see `ir.experts.gathers`."""
        self._gathers = gathers(products)
        self._noted: dict[fx.Node, tuple[Tensor, int]] = {}
        self.override: dict[fx.Node, Callable[..., Any]] = {
            gather: self._watched(gather) for gather in self._gathers.values()
        }

    def _watched(self, gather: fx.Node) -> Callable[[Tensor, Tensor], Tensor]:
        def run(tokens: Tensor, index: Tensor) -> Tensor:
            self._noted[gather] = index, len(tokens)
            return tokens[index]

        return run

    def rows(self, product: fx.Node, offsets: Tensor) -> Rows:
        """The rows of a product in the batch that ran last."""
        index, tokens = self._noted[self._gathers[product]]
        bounds = itertools.pairwise((0, *offsets.tolist()))
        return Rows(tuple(slice(start, end) for start, end in bounds), index, tokens)
