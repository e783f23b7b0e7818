"""The bits of a plan as an SVG: per layer and kind of matrix, and rows per width.

Lines and letters are a middle grey on a transparent ground: readable on white and on black.
"""

from __future__ import annotations

import math
import os
from typing import Any

from ..errors import MixLLMError
from .bits_map import BitsMap, layer_name

INK = "#7d7d7d"
CELL = 0.46  # inches
FROM, TO = 2.0, 8.0  # bits at the ends of the scale of colours
MANY_LAYERS = 16  # more than that, and numbers no longer fit their cells


class PlotError(MixLLMError):
    """matplotlib is missing."""


def save_bits_plot(bits: BitsMap, path: str | os.PathLike[str], title: str = "") -> None:
    """Write the plot as SVG.

    Raises:
        PlotError: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PlotError(
            "the plot needs matplotlib: pip install 'mixllm-compiler[report]'"
        ) from error
    rows = len(bits.places)
    wide = max(2.4, CELL * min(len(bits.layers), 2 * MANY_LAYERS))
    style: Any = {
        "svg.fonttype": "none",  # letters stay letters: searchable, and a tenth of the size
        "svg.hashsalt": "mixllm",  # the same plan gives the same bytes
        "font.family": "sans-serif",
        "font.size": 9.0,
        **dict.fromkeys(
            ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
        ),
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(wide + 5.2, CELL * rows + 1.5), layout="constrained")
        heat, shares = figure.subplots(1, 2, width_ratios=[wide, 2.4])
        _heat_map(figure, heat, bits)
        _row_shares(shares, bits)
        if title:
            figure.suptitle(title, fontsize=10)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def colour_of(bits: float) -> str:
    """A colour between blue (few bits) and orange (many), as `#rrggbb`; both suit any ground."""
    share = min(max((bits - FROM) / (TO - FROM), 0.0), 1.0)
    few, some, many = (0x4C, 0x78, 0xA8), (0x72, 0xB7, 0xB2), (0xF5, 0x85, 0x18)
    low, high, part = (few, some, 2 * share) if share < 0.5 else (some, many, 2 * share - 1)
    mixed = (round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def _heat_map(figure: Any, axes: Any, bits: BitsMap) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    steps = [colour_of(FROM + (TO - FROM) * i / 32) for i in range(33)]
    colours = LinearSegmentedColormap.from_list("bits", steps)
    table = [[math.nan if b is None else b for b in bits.row(place)] for place in bits.places]
    image = axes.imshow(table, cmap=colours, vmin=FROM, vmax=TO, aspect="auto")
    if len(bits.layers) <= MANY_LAYERS:
        for y, row in enumerate(table):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    axes.text(
                        x, y, f"{value:.1f}", ha="center", va="center", color="#101010", size=8
                    )
    every = math.ceil(len(bits.layers) / (2 * MANY_LAYERS))
    places = range(0, len(bits.layers), every)
    axes.set_xticks(list(places), [layer_name(bits.layers[i]) for i in places])
    axes.set_yticks(range(len(bits.places)), bits.places)
    axes.set_xlabel("layer")
    axes.set_title("true bits per weight", fontsize=9)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    scale = figure.colorbar(image, ax=axes, shrink=0.9, aspect=30, pad=0.02)
    scale.outline.set_visible(False)
    scale.ax.tick_params(length=0)


def _row_shares(axes: Any, bits: BitsMap) -> None:
    """Of the rows of each kind of matrix, how many have which width."""
    totals = [sum(bits.rows[place].values()) for place in bits.places]
    before = [0.0] * len(totals)
    for width in bits.widths:
        part = [
            100 * bits.rows[place][width] / total
            for place, total in zip(bits.places, totals, strict=True)
        ]
        axes.barh(
            range(len(part)), part, left=before, height=0.72, color=colour_of(width),
            label=f"{width} bits",
        )  # fmt: skip
        before = [a + b for a, b in zip(before, part, strict=True)]
    axes.set_ylim(len(totals) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_yticks([])
    axes.set_xlabel("% of rows")
    axes.set_title("rows per width", fontsize=9)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=8, handlelength=1.0
    )
