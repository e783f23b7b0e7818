"""Speed of the mixed linears against what the GPU allows, as an SVG.

    python bench/plot_gemm.py bench/results/gemm-h200.json docs/gemm.svg

Above: operations a second of the four linears of a layer together, by number of tokens; below the
time over the limit's. The limit is the longer of reading the packed weights as fast as a kernel
that does nothing else read them in the same run, and of the tensor cores' int8 operations by the
data sheet. Libraries that the results name (`bench/gemm.py --peers`) have a line each.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from mixed_linears import LLAMA_8B
from mixllm_compiler.formats.files import write_whole
from mixllm_compiler.lowering.cost import limits
from mixllm_compiler.lowering.target import Target
from plots import INK, OURS, STYLE

CUBLAS, PEERS = "#d1672f", "#8a5fbf"
MARKS = "xv^D8*1P<"

LINES = {
    "gemm us": ("mixllm, model order", OURS, "o-"),
    "packed order us": ("mixllm, packed order", OURS, "o:"),
    "both us": ("mixllm, quantizer + Hadamard inside", OURS, ".--"),
    "fp8 us": ("cuBLAS fp8", CUBLAS, "s:"),
    "bf16 us": ("cuBLAS bf16", CUBLAS, "s-"),
}
"""Column of the results → label, color, style."""


@dataclass(frozen=True)
class Roof:
    """What the GPU allows for one layer's linears.

    Attributes:
        operations: multiplications and additions of one token, each counted as one.
        read: µs that reading the weights takes.
        int8: operations that the tensor cores do in a µs.
    """

    operations: float
    read: float
    int8: float

    @classmethod
    def of(cls, content: dict[str, Any]) -> Roof:
        """From the results of `bench/gemm.py`.

        Raises:
            SystemExit: they lack the read times, or their GPU's limits are not known.
        """
        rows = [r for r in content["rows"] if r.get("linear") == "sum" and "read us" in r]
        known = limits(Target("cuda", name=content["device"]))
        if not rows or known is None:
            raise SystemExit(
                f"these results of {content['device']} do not say how fast the weights can be "
                "read, or lowering/cost.py does not know that GPU"
            )
        shapes = content["extra"]["matrices"]
        operations = sum(2 * shapes[name]["n"] * shapes[name]["k"] for name in LLAMA_8B)
        return cls(operations, rows[0]["read us"], known.int8 * 1e-6)

    def us(self, tokens: float) -> float:
        """µs that no kernel can beat."""
        return max(self.read, tokens * self.operations / self.int8)

    def tops(self, tokens: float, us: float) -> float:
        """10¹² operations a second."""
        return tokens * self.operations / us * 1e-6


def series(content: dict[str, Any]) -> list[tuple[str, str, str, list[int], list[float]]]:
    """(label, color, style, tokens, µs) of every line that the results have."""
    sums = sorted(
        (row for row in content["rows"] if row.get("linear") == "sum"), key=lambda r: r["tokens"]
    )
    found = []
    for key, (label, color, style) in LINES.items():
        points = [(r["tokens"], r[key]) for r in sums if "peer" not in r and r.get(key)]
        if points:
            found.append((label, color, style, *map(list, zip(*points, strict=True))))
    peers: dict[str, list[tuple[int, float]]] = {}
    for row in sums:
        if "peer" in row and row.get("us"):
            inside = ", quantizer inside" if row["quantizer"] == "inside" else ""
            peers.setdefault(row["peer"] + inside, []).append((row["tokens"], row["us"]))
    for mark, (label, points) in zip(itertools.cycle(MARKS), sorted(peers.items()), strict=False):
        found.append((label, PEERS, f"{mark}-", *map(list, zip(*points, strict=True))))
    return found


def plot(content: dict[str, Any]) -> Figure:
    """Both parts of the figure."""
    roof, lines = Roof.of(content), series(content)
    figure = Figure(figsize=(7.5, 7.2), layout="constrained")
    speed, distance = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    tokens = sorted({m for *_, ms, _ in lines for m in ms})
    last = tokens[-1]
    ends = min(last, 1.3 * roof.read * roof.int8 / roof.operations)  # a little above the other one
    for xs, us in (((tokens[0], ends), roof.read), ((tokens[0], last), None)):
        limit = [roof.tops(m, us or m * roof.operations / roof.int8) for m in xs]
        speed.plot(xs, limit, color=INK, linewidth=1)
    told: Any = {"textcoords": "offset points", "fontsize": 8, "color": INK}
    speed.annotate(
        "reads of the weights", (20, roof.tops(20, roof.read)), (-4, 4), ha="right", **told
    )
    speed.annotate("int8 tensor cores", (last, roof.int8 * 1e-6), (0, 4), ha="right", **told)
    for label, color, style, ms, us in lines:
        tops = [roof.tops(m, t) for m, t in zip(ms, us, strict=True)]
        over = [t / roof.us(m) for m, t in zip(ms, us, strict=True)]
        speed.plot(ms, tops, style, color=color, markersize=4, linewidth=1.2, label=label)
        distance.plot(ms, over, style, color=color, markersize=4, linewidth=1.2)
    distance.axhline(1, color=INK, linewidth=1)
    speed.set_yscale("log")
    speed.set_ylabel("10¹² operations a second")
    distance.set_ylabel("time / limit")
    distance.set_ylim(bottom=0.8)
    distance.set_xscale("log", base=2)
    distance.set_xticks(tokens, [str(m) for m in tokens])
    distance.set_xlabel(f"tokens; the four linears of Llama-3.1-8B on one {content['device']}")
    for axes in (speed, distance):
        axes.grid(visible=True, which="major", color=INK, alpha=0.2)
    speed.legend(frameon=False, loc="lower right")
    return figure


def main(argv: list[str] | None = None) -> int:
    """Read the results, write the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON of bench/gemm.py")
    parser.add_argument("out", type=Path, help="file to write, .svg or .png")
    args = parser.parse_args(argv)
    content = json.loads(args.results.read_text(encoding="utf-8"))
    kind = args.out.suffix.removeprefix(".")
    with mpl.rc_context(STYLE):
        out = io.BytesIO()
        dated = {"metadata": {"Date": None}} if kind == "svg" else {}  # the same bytes every time
        plot(content).savefig(out, format=kind, transparent=kind == "svg", **dated)
    write_whole(args.out, out.getvalue())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
