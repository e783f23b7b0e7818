"""Calibrated quantization of experts: what each of them reads, in both streams of activations.

The float model and the quantized one may route a token differently. An expert is calibrated on
the tokens that reach it in the quantized model; where the inputs of the float model count, too, on
those that both route to it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..calibration.moments import Moments
from ..ir.annotations import GroupedSite
from ..ir.experts import GroupedProduct, gathers, grouped_product
from .captured_model import Values


@dataclass(frozen=True)
class ExpertGroup:
    """A product with experts, as a calibrated run meets it.

    Attributes:
        node, site: in the float graph.
        product: its operands.
        index: the value that says which token each row is.
    """

    node: fx.Node
    site: GroupedSite
    product: GroupedProduct
    index: fx.Node

    @classmethod
    def of(cls, node: fx.Node, site: GroupedSite) -> ExpertGroup:
        """From an annotated product."""
        product, index = grouped_product(node), gathers([node, *_twins(node)])[node].args[1]
        assert product is not None and isinstance(index, fx.Node)
        return cls(node, site, product, index)

    def moments(
        self,
        expert: int,
        floats: Sequence[Values],
        ours: Sequence[Values],
        held: int,
        cross: bool,
        rounded: Callable[[Tensor], Tensor],
    ) -> Moments:
        """Moments of what one expert reads in all batches, the last `held` of them held out.

        Args:
            rounded: rows x [S, K] → x̂, what int8 leaves of them.
        """
        found = Moments(self.site.k, ours[0][self.product.x].device, cross)
        for i, (values, mine) in enumerate(zip(floats, ours, strict=True)):
            token, x_hat = self._rows(expert, mine)
            x = None
            if cross:
                theirs, x = self._rows(expert, values)
                kept, at = pairs(token, theirs)
                x_hat, x = x_hat[kept], x[at]
            found.add(rounded(x_hat), x, i >= len(ours) - held)
        return found

    def _rows(self, expert: int, values: Values) -> tuple[Tensor, Tensor]:
        """(token of every row, rows [S_e, K]) that an expert reads in one batch."""
        offsets = values[self.product.offsets].tolist()
        rows = slice(offsets[expert - 1] if expert else 0, offsets[expert])
        return values[self.index][rows], values[self.product.x][rows]


def _twins(node: fx.Node) -> list[fx.Node]:
    """Products over the same rows: the first of them shows which tokens they are."""
    product = grouped_product(node)
    return [] if product is None else list(product.offsets.users)


def pairs(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Where the numbers are that both hold; each holds a number once, from 0 on.

    Returns:
        places in `first` and in `second`, int64 [P] each, of the same numbers.
    """
    size = 1 + int(torch.cat((first, second, first.new_zeros(1))).max())
    place = first.new_full((size,), -1)
    place[second] = torch.arange(len(second), device=second.device)
    at = place[first]
    kept = (at >= 0).nonzero().flatten()
    return kept, at[kept]


def expert_linears(
    rounded: Callable[[Tensor], Tensor],
    w_hats: Sequence[Tensor],
    x: Tensor,
    weight: Tensor,
    offs: Tensor,
    **_: object,
) -> Tensor:
    """The quantized product's float value; see `ir.experts`. Ŵ fp32 [N, K] of every expert."""
    y = x.new_zeros(len(x), len(w_hats[0]))
    bounds = itertools.pairwise((0, *offs.tolist()))
    for (start, end), w_hat in zip(bounds, w_hats, strict=True):
        y[start:end] = (rounded(x[start:end]) @ w_hat.t()).to(x.dtype)
    return y
