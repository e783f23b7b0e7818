"""What trellis rows would be worth: KL of the whole model with them, over KL without.

    python bench/trellis.py --model DIR --texts DIR --calibration FILE --device cuda --workers 4

Both sides have the same recipe and the same true bits; rows of 2 to 5 bits are trellis rows
(`quantizers/list_search.py`), others stay as they are. A code is STATESxSURVIVORS: the format knows
the states, the encoder alone the survivors; 0 states are plain rows from the same encoder, `mixed`
has 4x8 up to 4 bits and 0x16 for 5 and 6. The allocation scales the losses of a width by what
such rows lose of the weight error on real layers.
Trellis rows become a format if they keep at most 0.88 of the KL at 3.6 and at 4.4 bits.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from ablations import show
from lab import TEXTS, Case, arguments, parse, run_cases
from mixllm_compiler.allocation.plan import SitePlan
from mixllm_compiler.passes.quantize_model import QuantizingRun
from mixllm_compiler.quantizers.encode import Encoded
from mixllm_compiler.quantizers.hessian import factorize
from mixllm_compiler.quantizers.list_search import quantize_by_search, quantize_trellis
from results_io import Bar, write_results

BUDGETS = (3.6, 4.4)
LIMIT = 0.88
_RATIO, _SE = f"ratio {TEXTS[0]}", f"ratio se {TEXTS[0]}"


class TrellisRun(QuantizingRun):
    """Other rows in place of those of some widths; simulated, since nothing stores them yet."""

    codes: ClassVar[dict[int, tuple[int, int]]]  # width → states, survivors
    gains: ClassVar[dict[int, float]]  # width → weight error of such rows over that of ours

    def encode(self, w: Tensor, wanted: SitePlan, widths: Tensor, h: Tensor, name: str) -> Encoded:
        """As the base class, but trellis rows carry levels: codes of one bit more."""
        factor = factorize(h, wanted.group, name, self.recipe.damping)
        left = torch.ones_like(widths, dtype=torch.bool)
        parts, order = [], []
        for states, survivors in sorted(set(self.codes.values())):
            mine = [bits for bits, code in self.codes.items() if code == (states, survivors)]
            chosen = torch.isin(widths.long(), torch.tensor(mine, device=w.device))
            rows = chosen.nonzero().flatten()
            left &= ~chosen
            if len(rows):
                given = (w[rows], widths[rows], h, factor, wanted.group)
                if states:
                    found = quantize_trellis(*given, states=states, survivors=survivors)
                else:
                    found = quantize_by_search(*given, survivors=survivors)
                parts.append(found)
                order.append(rows)
        rows = left.nonzero().flatten()
        if len(rows):
            parts.append(super().encode(w[rows], wanted, widths[rows], h, name))
            order.append(rows)
        return Encoded.joined(parts).take(torch.cat(order).argsort())


class FourStates(TrellisRun):
    """Viterbi's algorithm; beyond 5 bits the int8 grid is too coarse for twice the levels."""

    codes: ClassVar = dict.fromkeys((2, 3, 4, 5), (4, 1))
    gains: ClassVar = {2: 0.86, 3: 0.88, 4: 0.91, 5: 0.98}


class FourStatesList(TrellisRun):
    """The same format, encoded with more effort."""

    codes: ClassVar = dict.fromkeys((2, 3, 4, 5), (4, 8))
    gains: ClassVar = {2: 0.81, 3: 0.835, 4: 0.865, 5: 0.935}


class SixteenStatesList(TrellisRun):
    """A longer memory."""

    codes: ClassVar = dict.fromkeys((2, 3, 4, 5), (16, 4))
    gains: ClassVar = {2: 0.80, 3: 0.82, 4: 0.85, 5: 0.92}


class PlainList(TrellisRun):
    """No trellis, but plain rows encoded with as much effort: what remains is the code's."""

    codes: ClassVar = dict.fromkeys((2, 3, 4, 5, 6), (0, 16))
    gains: ClassVar = dict.fromkeys((2, 3, 4, 5, 6), 0.95)


class Mixed(TrellisRun):
    """Trellis rows where they gain, plain rows from the same encoder elsewhere."""

    codes: ClassVar = FourStatesList.codes | dict.fromkeys((5, 6), (0, 16))
    gains: ClassVar = FourStatesList.gains | dict.fromkeys((5, 6), 0.95)


RUNNERS: dict[str, type[TrellisRun]] = {
    "4x1": FourStates,
    "4x8": FourStatesList,
    "16x4": SixteenStatesList,
    "0x16": PlainList,
    "mixed": Mixed,
}


def main(argv: list[str] | None = None) -> int:
    """Quantize, measure, print; write the results unless `--quick`."""
    args, started = _arguments(argv), time.perf_counter()
    base = {bits: Case(f"ours at {bits}", bits) for bits in BUDGETS}
    cases = [
        Case(f"trellis {code} at {bits}", bits, runner=RUNNERS[code], gains=RUNNERS[code].gains)
        for code in args.codes.split(",")
        for bits in BUDGETS
    ]
    # What a trellis row stores is not what simulates it: the plan knows its true bits.
    lines = {
        label: replace(line, true_bits=line.plan.true_bits)
        for label, line in run_cases(args, [*cases, *base.values()]).items()
    }
    rows = [lines[c.label].row() for c in base.values() if c.label in lines]
    bars = []
    for case in cases:
        ours = base[float(case.bits or 0)].label
        if case.label not in lines or ours not in lines:
            bars.append(Bar.at_most(f"{args.name}: {case.label}", None, LIMIT))
            continue
        row = lines[case.label].row(lines[ours])
        rows.append(row)
        name, value, se = f"{args.name}: {case.label}", row[_RATIO], row[_SE]
        bars.append(Bar.at_most(name, value, LIMIT, se))
    show([row for row in rows if _RATIO in row], bars)
    if not args.quick:
        extra = {
            "model": args.name,
            "calibration tokens": args.sequences * args.length,
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_results(f"trellis-{args.name}", rows, bars, device=args.device, extra=extra)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments(parser)
    parser.add_argument(
        "--codes", default="4x8,0x16,mixed,4x1", help=f"some of {', '.join(RUNNERS)}"
    )
    return parse(parser, argv)


if __name__ == "__main__":
    raise SystemExit(main())
