"""What does a unit of each term of the CUDA kernels' cost model take? Needs no GPU.

    python bench/fit_cost.py

Fits `mixllm_compiler/lowering/cuda/cost.py` to the times of `tune_gemm.py` (least squares of
relative errors, nothing negative), and says how good the choices are that follow from it: the time
of the chosen variant over that of the fastest, also for shapes that were left out of the fit.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from mixllm_compiler.formats.layout import Layout
from mixllm_compiler.lowering.cuda.cost import MICROSECONDS, Problem, terms
from mixllm_compiler.lowering.cuda.tuning import row_counts
from mixllm_compiler.lowering.cuda.variants import Variant
from results_io import RESULTS, Bar, write_results

MULTIPROCESSORS = 132
STEPS = 20_000
DEVICE = "fitted to H200"


def problem_of(row: dict[str, Any]) -> Problem:
    """The matrix that `tune_gemm.py` timed."""
    widths = tuple((bits, 64 * n) for bits, n in row_counts(row["tiles"]).items())
    return Problem.of(Layout(128 * row["groups"], widths, 128, "two-level", "cuda64.v1"))


def times(row: dict[str, Any]) -> dict[Variant, float]:
    """µs by variant."""
    return {Variant.parse(name): us for name, us in row.items() if ":" in name}


def fit(rows: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """µs a unit of every term, by regime."""
    found = {}
    for regime in MICROSECONDS:
        parts = [
            np.array(terms(variant, row["tokens"], problem_of(row), MULTIPROCESSORS)) / us
            for row in rows
            for variant, us in times(row).items()
            if variant.regime == regime
        ]
        matrix = np.array(parts)
        square, ones = matrix.T @ matrix, matrix.sum(0)
        costs = np.full(len(ones), 1e-3)
        for _ in range(STEPS):  # multiplicative updates keep everything positive
            costs *= ones / (square @ costs + 1e-12)
        found[regime] = costs
    return found


def regrets(rows: list[dict[str, Any]], costs: dict[str, Any]) -> list[float]:
    """Time of the variant that the model chooses over that of the fastest, per problem."""
    out = []
    for row in rows:
        measured, problem = times(row), problem_of(row)
        predicted = {
            v: float(np.dot(terms(v, row["tokens"], problem, MULTIPROCESSORS), costs[v.regime]))
            for v in measured
        }
        chosen = min(predicted, key=predicted.__getitem__)
        out.append(measured[chosen] / min(measured.values()))
    return out


def main() -> None:
    """Fit, leave shapes out, write."""
    rows = json.loads((RESULTS / "tune_gemm-h200.json").read_text(encoding="utf-8"))["rows"]
    costs = fit(rows)
    for regime, values in costs.items():
        print(regime, ", ".join(f"{value:.3g}" for value in values))
    left_out: list[float] = []
    for shape in sorted({(row["tiles"], row["groups"]) for row in rows}):
        rest = [row for row in rows if (row["tiles"], row["groups"]) != shape]
        mine = [row for row in rows if (row["tiles"], row["groups"]) == shape]
        left_out += regrets(mine, fit(rest))
    shipped = regrets(rows, MICROSECONDS)
    bars = [
        Bar.at_most("chosen by cost / fastest: mean", float(np.mean(shipped)), 1.1),
        Bar.at_most("the same, shapes left out of the fit", float(np.mean(left_out)), 1.1),
        Bar.at_most("the same, 90 % of problems", float(np.quantile(left_out, 0.9)), 1.25),
    ]
    for bar in bars:
        print(bar.name, bar.measured)
    table = [{"regime": regime, "µs": list(values)} for regime, values in costs.items()]
    write_results(__file__, table, bars, device=DEVICE)


if __name__ == "__main__":
    main()
