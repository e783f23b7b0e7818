"""What each part of the recipe is worth: one thing changed at a time, at equal true bits.

    python bench/ablations.py --model DIR --texts DIR --calibration FILE --device cuda --workers 4

Every line is compared with ours at the same bits: rotation 256, int8 per token, two-level rows of
2 to 8 bits in groups of 128 or 256, 64-row tiles in windows of 1,024 across siblings, kfac scores,
GPTQ with refit and descent. Sections: granularity, activations, formats, score, quantizer,
transform, text.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from lab import FOLDED, ONE_SHOT, OWN_TEXT, TEXTS, Case, Line, arguments, parse, run_cases
from mixllm_compiler.evaluation.measure import Estimate, kl_ratio
from mixllm_compiler.passes.quantize_model import Recipe
from mixllm_compiler.passes.scaling_methods import METHODS
from results_io import Bar, write_results

BASE = {bits: Case(f"ours at {bits}", bits) for bits in (3.6, 4.4, 4.75)}
_PLAIN = Recipe(sweeps=0)
_UNROTATED: dict[str, Any] = {"scores": {"rotate": 0}, "plan": {"activation_mode": "token"}}
_NARROW = {"rotate": 128}
_ASYM = {"family": "asym", "clip": True}


def _case(section: str, what: str, bits: float, **changes: Any) -> Case:
    return Case(f"{section}: {what} at {bits}", bits, section, **changes)


# The bars come first: a run that ends early has them.
CASES = (
    *(_case("granularity", "rows", b, plan={"granularity": "rows"}) for b in (4.4, 3.6)),
    *(_case("granularity", "tiles in whole N", b, plan={"window": 0}) for b in (4.4, 3.6)),
    *(_case("activations", "per group", b, plan={"activation_mode": "group"}) for b in (4.4, 4.75)),
    *(_case("formats", "two-level without descent", b, recipe=_PLAIN) for b in (4.4, 3.6)),
    *(_case("formats", "asym", b, scores=_ASYM, recipe=_PLAIN) for b in (4.4, 3.6)),
    _case("quantizer", "one shot, no descent", 3.6, recipe=ONE_SHOT),
    _case("quantizer", "one shot", 3.6, recipe=Recipe(propagate=False, refit=False)),
    _case("quantizer", "no refit", 3.6, recipe=Recipe(refit=False)),
    _case("quantizer", "two sweeps", 3.6, recipe=Recipe(sweeps=2)),
    _case("quantizer", "round to nearest", 3.6, recipe=Recipe(method="rtn", refit=False)),
    *(
        _case("score", kind, 3.6, scores={"kind": kind})
        for kind in ("fisher-token", "fisher-sequence", "paper", "hessian", "weight-error")
    ),
    _case("score", "64 sequences", 3.6, scores={"sequences": 64}),
    _case("score", "8 sequences", 3.6, scores={"sequences": 8}),
    _case("transform", "none", 4.4, **_UNROTATED),
    _case("transform", "none, per group", 4.4, scores={"rotate": 0}),
    _case("transform", "rotation folded into v and o", 4.4, rewrite=FOLDED),
    *(_case("transform", "rotation in blocks of 128", b, scores=_NARROW) for b in (4.4, 4.75)),
    _case(
        "activations",
        "per group, rotation in blocks of 128",
        4.75,
        scores=_NARROW,
        plan={"activation_mode": "group"},
    ),
    *(
        _case("transform", f"{method}{what}", 4.4, rewrite=method, **changes)
        for method in METHODS
        for what, changes in ((" alone", _UNROTATED), (" and rotation", {}))
    ),
    *(_case("text", f"{n} sequences", 3.6, sequences=n) for n in (64, 32, 16, 8)),
    _case("text", "64 sequences of its own", 3.6, rewrite=OWN_TEXT),
    _case("granularity", "linears", 4.4, plan={"granularity": "linears"}),
    _case("granularity", "fused linears", 4.4, plan={"granularity": "siblings"}),
    _case("granularity", "tiles within matrices", 4.4, plan={"siblings": False}),
    *(
        _case("formats", f"groups of {sizes}", b, scores={"spans": spans})
        for sizes, spans in (("128", (1,)), ("128, 256 and 512", (1, 2, 4)))
        for b in (4.4, 3.6)
    ),
    *(
        _case("formats", f"widths {widths}", 4.4, plan={"widths": widths})
        for widths in ((3, 4, 5, 6), (3, 4, 5), (4, 8))
    ),
)


def main(argv: list[str] | None = None) -> int:
    """Quantize, measure, print; write the results unless `--quick`."""
    args, started = _arguments(argv), time.perf_counter()
    lines = run_cases(args, [*BASE.values(), *CASES])
    rows, ratios = [], {}
    for case in CASES:
        base = lines.get(BASE[float(case.bits or 0)].label)
        if case.label in lines and base is not None:
            rows.append({"section": case.section, **lines[case.label].row(base)})
            ratios[case.label] = _ratio(lines[case.label], base)
    bars = bars_of(args.name, lines)
    show(rows, bars)
    if not args.quick:
        extra = {
            "model": args.name,
            "calibration tokens": args.sequences * args.length,
            "seconds": round(time.perf_counter() - started, 1),
        }
        rows = [line.row() for label, line in lines.items() if label.startswith("ours")] + rows
        write_results(f"ablations-{args.name}", rows, bars, device=args.device, extra=extra)
    return 0


def _ratio(line: Line, base: Line) -> Estimate:
    return kl_ratio(line.quality[TEXTS[0]], base.quality[TEXTS[0]])


def bars_of(name: str, lines: Mapping[str, Line]) -> list[Bar]:
    """What tiles, windows, one scale per token and two-level rows may cost."""
    bars = []

    def bar(what: str, above: str, below: str, limit: float) -> None:
        found = None
        if above in lines and below in lines:
            found = _ratio(lines[above], lines[below])
        value, se = (None, None) if found is None else found
        bars.append(Bar.at_most(f"{name}: {what}", value, limit, se))

    for bits in (4.4, 3.6):
        ours = BASE[bits].label
        whole, rows = f"granularity: tiles in whole N at {bits}", f"granularity: rows at {bits}"
        bar(f"tiles / rows at {bits}", whole, rows, 1.015)
        bar(f"windows / whole N at {bits}", ours, whole, 1.02)
        plain = f"formats: two-level without descent at {bits}"
        bar(f"two-level / asym at {bits}", plain, f"formats: asym at {bits}", 1.0)
    for bits in (4.4, 4.75):
        ours = BASE[bits].label
        bar(f"per token / per group at {bits}", ours, f"activations: per group at {bits}", 1.03)
    return bars


def show(rows: list[dict[str, Any]], bars: list[Bar]) -> None:
    """The table, for people."""
    console = Console(width=None if Console().is_terminal else 150)
    table = Table("case", "true bits", "KL", "of ours")
    for row in rows:
        ratio, se = row[f"ratio {TEXTS[0]}"], row[f"ratio se {TEXTS[0]}"]
        kl = f"{row[f'KL {TEXTS[0]}']:.5f}"
        table.add_row(row["plan"], f"{row['true bits']:.3f}", kl, f"{ratio:.3f} ± {se:.3f}")
    console.print(table)
    for bar in bars:
        found = "not measured" if bar.measured is None else f"{bar.measured:.4f} ± {bar.se:.4f}"
        met = "met   " if bar.met else "MISSED"
        console.print(f"{met} {bar.name}: {found} (target {bar.target})")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments(parser)
    return parse(parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
