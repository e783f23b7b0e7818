"""KL against true bits of everything that a quality bench measured, as an SVG.

    python bench/plot_quality.py bench/results/quality-wiki-88m-h200.json docs/quality.svg \\
        --peers bench/results/peers-wiki-88m-h200.json

Other libraries have a mark each.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from mixllm_compiler.formats.files import write_whole
from plots import INK, OURS, STYLE

OTHERS, PEERS = "#d1672f", "#8a5fbf"
MARKS = "xv^D8*1P<"


def main(argv: list[str] | None = None) -> int:
    """Read the results, write the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON of bench/quality.py")
    parser.add_argument("out", type=Path, help="SVG to write")
    parser.add_argument("--peers", type=Path, help="JSON of other libraries, from the same bench")
    parser.add_argument("--text", default="wikitext2_test")
    args = parser.parse_args(argv)
    files = [args.results, *([args.peers] if args.peers else [])]
    rows = [row for file in files for row in json.loads(file.read_text(encoding="utf-8"))["rows"]]
    write_whole(args.out, plot(rows, args.text))
    return 0


def plot(found: list[dict[str, Any]], text: str) -> bytes:
    """The SVG; the same results give the same bytes."""
    kl, spread = f"KL {text}", f"se {text}"
    plans = [row for row in found if "plan" in row and kl in row]
    ours = sorted(
        (row for row in plans if row["plan"].startswith("ours at")),
        key=lambda row: row["true bits"],
    )
    peers: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        if "peer" in row:
            peers.setdefault(method(row["peer"]), []).append(row)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.5, 4.6), layout="constrained")
        axes = figure.add_subplot()
        bits = [row["true bits"] for row in ours]
        axes.errorbar(
            bits, [r[kl] for r in ours], [r[spread] for r in ours],
            color=OURS, marker="o", markersize=4, label="mixllm",
        )  # fmt: skip
        searched = [row for row in plans if row["plan"].startswith("ours, searched")]
        axes.plot(
            [row["true bits"] for row in searched], [row[kl] for row in searched],
            color=OURS, marker="o", markersize=7, fillstyle="none", linestyle="",
            label="mixllm, searched",
        )  # fmt: skip
        for row in (r for r in plans if r not in ours and r not in searched):
            _point(axes, row["true bits"], row[kl], row["plan"], OTHERS, "s")
        for mark, (name, rows) in zip(itertools.cycle(MARKS), sorted(peers.items()), strict=False):
            axes.plot(
                [row["true bits"] for row in rows], [row[kl] for row in rows],
                color=PEERS, marker=mark, markersize=5, linestyle="", label=name,
            )  # fmt: skip
        axes.set_yscale("log")
        axes.margins(x=0.12)
        axes.set_xlabel("true bits per weight: codes, scales, integers, row widths")
        axes.set_ylabel(f"KL to float, nats per token, {text}")
        axes.grid(visible=True, which="both", color=INK, alpha=0.2)
        axes.legend(frameon=False)
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def method(peer: str) -> str:
    """The method of `auto-round-w4-g128-asym-200-iters` is `auto-round, tuned`."""
    name, settings = peer.split("-w", 1)
    if "-iters" not in settings:
        return name
    return f"{name}, {'untuned' if settings.endswith('-0-iters') else 'tuned'}"


def _point(axes: Any, x: float, y: float, name: str, color: str, marker: str) -> None:
    axes.plot([x], [y], color=color, marker=marker, markersize=5, linestyle="")
    axes.annotate(name, (x, y), textcoords="offset points", xytext=(6, 3), color=color, fontsize=8)


if __name__ == "__main__":
    raise SystemExit(main())
