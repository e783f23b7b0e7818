"""Operations a second against operations per byte of weights, under a CPU's roofs, as an SVG.

    python bench/plot_roofline.py bench/results/cpu_gemm-….json docs/roofline.svg

The roofs are those that `cpu_gemm.py` measured beside its points. Only weights count as bytes.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from mixllm_compiler.formats.files import write_whole
from plots import INK, OURS, STYLE

# Bytes of a weight as each keeps it; int4 pack: a scale and a zero point of 16 bits per 128 codes.
PEERS = {
    "fp32": (4.0, "#b9b9b9", "x"),
    "bf16": (2.0, "#8a5fbf", "v"),
    "onednn u8s8": (1.0, "#3f9b6d", "^"),
    "int4pack": (0.5 + 4 / 128, "#d1672f", "s"),
}


def main(argv: list[str] | None = None) -> int:
    """Read the results, write the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON of bench/cpu_gemm.py")
    parser.add_argument("out", type=Path, help="SVG to write")
    args = parser.parse_args(argv)
    write_whole(args.out, plot(json.loads(args.results.read_text(encoding="utf-8"))))
    return 0


def plot(content: dict[str, Any]) -> bytes:
    """The SVG; the same results give the same bytes. One shape: the first of the results."""
    shape = {key: content["rows"][0][key] for key in ("N", "K")}
    # One token with weights in memory, more with weights wherever they stay.
    rows = [
        row
        for row in content["rows"]
        if {key: row[key] for key in shape} == shape
        and (row["M"] > 1) == (row["weights in"] == "cache")
    ]
    peak, read = content["extra"]["VNNI peak, Gop/s"], content["extra"]["read, GB/s"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        axes = figure.add_subplot()
        axes.plot([0.3, peak / read, 3e3], [0.3 * read, peak, peak], color=INK, linewidth=1)
        axes.annotate(f"int8 dot products, {peak} Gop/s", (300, peak), xytext=(0, 4),
                      textcoords="offset points", fontsize=8)  # fmt: skip
        axes.annotate(f"memory, {read:.0f} GB/s", (0.5, 0.5 * read), xytext=(-4, 10),
                      textcoords="offset points", fontsize=8)  # fmt: skip
        ours = [(_operations(row), _seconds(row), row["GB/s"] * _seconds(row)) for row in rows]
        axes.plot(
            [work / size for work, _, size in ours], [work / took for work, took, _ in ours],
            color=OURS, marker="o", markersize=4, label="mixllm",
        )  # fmt: skip
        for row, (work, took, size) in zip(rows, ours, strict=True):
            axes.annotate(f"M={row['M']}", (work / size, work / took), xytext=(4, -10),
                          textcoords="offset points", color=OURS, fontsize=7)  # fmt: skip
        weights = shape["N"] * shape["K"] / 1e9
        for name, (each, color, mark) in PEERS.items():
            found = [row for row in rows if f"x {name}" in row]
            axes.plot(
                [_operations(row) / (each * weights) for row in found],
                [_operations(row) / (_seconds(row) * row[f"x {name}"]) for row in found],
                color=color, marker=mark, markersize=4, linewidth=0.8, label=name,
            )  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel(
            f"operations per byte of weights, N = {shape['N']}, K = {shape['K']}; "
            f"{content['device']}"
        )
        axes.set_ylabel("10⁹ operations a second")
        axes.grid(visible=True, which="major", color=INK, alpha=0.2)
        axes.legend(frameon=False, loc="lower right")
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def _operations(row: dict[str, Any]) -> float:
    """Multiplications and additions of a row, in 10⁹."""
    return 2e-9 * row["M"] * row["N"] * row["K"]


def _seconds(row: dict[str, Any]) -> float:
    return row["us"] * 1e-6


if __name__ == "__main__":
    raise SystemExit(main())
