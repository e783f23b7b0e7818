"""What gets one width: free rows, tiles of rows, or whole matrices."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import OptionError, nearest

GRANULARITIES = ("rows", "tiles", "linears", "siblings")
TILE, WINDOW = 64, 1024


@dataclass(frozen=True)
class Tiling:
    """What gets one width.

    Attributes:
        tile: rows of a tile; 1 for free rows, 0 for whole regions.
        window: rows among which a tile's rows are found, a multiple of the tile; 0 for all rows
            of a region.
        siblings: whether matrices that read one activation are one region.
        tp: devices that share each matrix; the i-th nth of each sibling belongs to region i.
    """

    tile: int = TILE
    window: int = WINDOW
    siblings: bool = True
    tp: int = 1

    def __post_init__(self) -> None:
        for name, least in (("tile", 0), ("window", 0), ("tp", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise OptionError(f"{name} = {value!r} is no number of rows from {least} on")
        if self.tile > 1 and self.window % self.tile:
            near = max(1, round(self.window / self.tile)) * self.tile
            raise OptionError(
                f"a window of {self.window} rows cannot be cut into tiles of {self.tile}; take "
                f"window={near}, or 0 for whole matrices"
            )

    def at(self, granularity: str) -> Tiling:
        """This tiling, or the coarser or finer one of an ablation."""
        if granularity not in GRANULARITIES:
            raise OptionError(
                f"unknown granularity {granularity!r}.{nearest(granularity, GRANULARITIES)}"
            )
        if granularity == "tiles":
            return self
        if granularity == "rows":
            return replace(self, tile=1)
        return replace(self, tile=0, window=0, siblings=granularity == "siblings")
