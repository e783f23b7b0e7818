"""Makes a table of the fastest variants: every candidate timed, problem by problem.

This is what `mixllm tune` runs. Runs and captures only read tables. The table is written
whole after every problem, so nothing that was timed is lost, and the next call goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...errors import LoweringError
from ...formats.layout import Layout
from ..target import Target
from . import dispatch, timed
from .cost import Problem
from .layout import GROUP, NAME, TILE
from .timed import Key, Table
from .variants import Variant

SHAPES = ((64, 32), (448, 32), (96, 32), (64, 112), (128, 224), (16, 32), (32, 32), (224, 32))
"""(tiles of 64 rows, groups of 128 along K) of the tables that ship: Llama's."""

TOKENS = (1, 4, 8, 12, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
SHARES = {2: 0.04, 3: 0.21, 4: 0.42, 5: 0.20, 6: 0.08, 8: 0.05}
"""Width → share of the rows of a plan of 4.4 true bits."""

WINDOW = 1024  # rows among which those of a tile lie
BETTER = 0.99  # another variant than the cost model's must be faster by this factor

Progress = Callable[[int, int], None]
"""(problems done, problems in all)"""


@dataclass(frozen=True, eq=False)
class Matrix:
    """What to tune for.

    Attributes:
        widths: uint8 [N] on the CPU, bits of every row in model order.
        k: length of the rows.
    """

    widths: Tensor
    k: int

    @property
    def layout(self) -> Layout:
        bits, counts = self.widths.unique(return_counts=True)
        rows = tuple(zip(bits.tolist(), counts.tolist(), strict=True))
        return Layout(self.k, rows, GROUP, "two-level", NAME)

    @property
    def size(self) -> tuple[int, int]:
        """(tiles, groups): what a table knows it by."""
        problem = Problem.of(self.layout)
        return problem.tiles, problem.groups


Timer = Callable[[Matrix, int, Sequence[Variant]], dict[Variant, float]]
"""(matrix, tokens, candidates) → µs of each that runs here and gives the right bits."""


def row_counts(tiles: int) -> dict[int, int]:
    """Tiles of each width, of about the shares of `SHARES`."""
    widths = [b for b, share in SHARES.items() for _ in range(max(1, round(share * tiles)))]
    widths = sorted((widths + [4] * tiles)[:tiles])
    return {bits: widths.count(bits) for bits in sorted(set(widths))}


def mixed(tiles: int, groups: int) -> Matrix:
    """A matrix of so many tiles and groups with the mix of `SHARES`."""
    bits = torch.tensor([b for b, n in row_counts(tiles).items() for _ in range(n)])
    generator = torch.Generator().manual_seed(0)
    return Matrix(scattered(bits, WINDOW, generator), groups * GROUP)


def scattered(tiles: Tensor, window: int, generator: torch.Generator) -> Tensor:
    """uint8 [64 · T]: widths of rows whose tiles have the widths `tiles` [T], in model order.

    Tiles are dealt to windows at random, and so are the rows of a window to its tiles.
    """
    tiles = tiles[torch.randperm(len(tiles), generator=generator)]
    parts = tiles.repeat_interleave(TILE).split(window)
    rows = [part[torch.randperm(len(part), generator=generator)] for part in parts]
    return torch.cat(rows).to(torch.uint8)


def unlike(matrices: Iterable[Matrix]) -> list[Matrix]:
    """One of all that a table takes for the same, larger ones first."""
    kept: dict[tuple[int, int], Matrix] = {}
    for matrix in matrices:
        entries = [timed.Entry(1, *size, Variant("mma", (32, 4))) for size in kept]
        if timed.nearest(entries, 1, Problem.of(matrix.layout), dispatch.ALIKE) is None:
            kept[matrix.size] = matrix
    return sorted(kept.values(), key=lambda m: -m.size[0] * m.size[1])


def tune(
    matrices: Sequence[Matrix],
    tokens: Sequence[int],
    target: Target,
    multiprocessors: int,
    time: Timer,
    path: Path,
    *,
    made_by: str = "",
    again: bool = False,
    without: Sequence[str] = (),
    progress: Progress | None = None,
) -> Iterator[Key]:
    """Time what the table at `path` does not have yet; yields each problem once it is written.

    Args:
        matrices: what to tune for, see `unlike`.
        tokens: numbers of tokens.
        target: the GPU at hand; the table is of it.
        multiprocessors: how many it has.
        time: measures, `timing.GpuTimer`.
        path: of the table, read before and written after every problem.
        made_by: version of mixllm-compiler, for the table.
        again: time what the table has, too.
        without: regimes that are not tried.
        progress: is told how far it is.

    Raises:
        OptionError: the file at `path` is no table of this GPU (unless `again`).
        LoweringError: no variant of a problem runs, the file cannot be written, or a CUDA graph is
            being captured.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise LoweringError("a CUDA graph is being captured: tune before, with `mixllm tune`")
    table = None if again else timed.read(path, target)
    table = table or Table(target.name)
    table.made_by = made_by
    open_problems = [
        (matrix, (m, *matrix.size))
        for matrix in matrices
        for m in tokens
        if (m, *matrix.size) not in table.best
    ]
    total = len(matrices) * len(tokens)
    done = total - len(open_problems)
    for matrix, key in open_problems:
        if progress is not None:
            progress(done, total)
        problem = Problem.of(matrix.layout)
        variants = [v for v in dispatch.candidates(key[0], target) if v.regime not in without]
        times = time(matrix, key[0], variants)
        if not times:
            raise LoweringError(f"no variant runs {key[0]} tokens of layout '{matrix.layout}'")
        cheap = dispatch.by_cost(key[0], problem, target, multiprocessors)
        table.best[key] = _fastest(times, cheap)
        table.times[key] = {str(variant): us for variant, us in times.items()}
        table.save(path)
        dispatch.forget()
        done += 1
        yield key
    if progress is not None:
        progress(total, total)


def _fastest(times: dict[Variant, float], cheap: Variant) -> Variant:
    """The fastest; the cost model's choice where that is as good, so that neighbours agree."""
    best = min(times, key=times.__getitem__)
    return cheap if cheap in times and times[best] > BETTER * times[cheap] else best
