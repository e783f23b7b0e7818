"""Where a plan spent its bits: one number per layer and kind of matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..formats.tables import same_place

if TYPE_CHECKING:
    from ..allocation.plan import Plan
    from ..runtime.records import GraphRecord


@dataclass(frozen=True)
class MatrixBits:
    """One quantized matrix [N, K]: its true bits per weight, and rows per width."""

    name: str
    n: int
    k: int
    true_bits: float
    rows: dict[int, int]


@dataclass
class Cell:
    """Matrices of one kind in one layer (experts share a cell)."""

    bits: float = 0.0
    weights: int = 0

    @property
    def true_bits(self) -> float:
        return self.bits / self.weights


@dataclass
class BitsMap:
    """True bits by kind of matrix and layer.

    Attributes:
        places: kinds of matrices, in the model's order, `"self_attn.q_proj"`.
        layers: numbers of the layers; −1 stands for matrices outside of any layer.
        cells: (place, layer) → bits, where the layer has such a matrix.
        rows: place → bits of a row → how many rows of all layers have them.
    """

    places: list[str] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    cells: dict[tuple[str, int], Cell] = field(default_factory=dict)
    rows: dict[str, Counter[int]] = field(default_factory=dict)

    @classmethod
    def of(cls, matrices: Iterable[MatrixBits]) -> BitsMap:
        found = cls()
        matrices = list(matrices)
        prefix = common_prefix([m.name for m in matrices])
        for matrix in matrices:
            place = same_place(matrix.name).removeprefix(prefix)
            cell = found.cells.setdefault((place, _layer(matrix.name)), Cell())
            cell.bits += matrix.true_bits * matrix.n * matrix.k
            cell.weights += matrix.n * matrix.k
            found.rows.setdefault(place, Counter()).update(matrix.rows)
        found.places = list(found.rows)
        found.layers = sorted({layer for _, layer in found.cells})
        return found

    @classmethod
    def of_plan(cls, plan: Plan) -> BitsMap:
        """The map of a plan; tied matrices appear once."""
        return cls.of(
            MatrixBits(name, site.n, site.k, site.true_bits, site.rows_per_width())
            for name, site in plan.distinct().items()
        )

    @classmethod
    def of_graphs(cls, graphs: Iterable[GraphRecord]) -> BitsMap:
        """The map of what was compiled."""
        lines = {line.name: line for graph in graphs for line in graph.quantized}
        return cls.of(
            MatrixBits(line.name, line.n, line.k, line.true_bits, line.rows)
            for line in lines.values()
            if line.true_bits is not None
        )

    def row(self, place: str) -> list[float | None]:
        """True bits of one kind of matrix in every layer, None where a layer has none."""
        cells = (self.cells.get((place, layer)) for layer in self.layers)
        return [None if cell is None else cell.true_bits for cell in cells]

    def average(self, place: str | None = None) -> float:
        """True bits per weight of one kind of matrix, or of all."""
        chosen = [c for (p, _), c in self.cells.items() if place in (None, p)]
        return sum(c.bits for c in chosen) / sum(c.weights for c in chosen)

    @property
    def widths(self) -> list[int]:
        return sorted({bits for rows in self.rows.values() for bits in rows})


def layer_name(layer: int) -> str:
    """A layer's number, or a dash for what is in none."""
    return "–" if layer < 0 else str(layer)


def _layer(name: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else -1


def common_prefix(names: Iterable[str]) -> str:
    """`"model.layers.*."`, if all numbered names begin with one such prefix, else nothing."""
    prefixes = {
        before + "*."
        for before, star, _ in (same_place(name).partition("*.") for name in names)
        if star
    }
    return prefixes.pop() if len(prefixes) == 1 else ""
