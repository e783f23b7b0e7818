"""What do quantizers cost, fused with a norm or an activation, with and without the transform?

    python bench/quantizers.py            the shapes of Llama-3.1-8B and 70B, 1 to 8192 tokens
    python bench/quantizers.py --quick    a corner of it; writes no results

Each fused quantizer with Hadamard blocks of 128 and without, against what it replaces: the same ops
of torch one by one and the plain quantizer with the transform, and the ops compiled by
`torch.compile` and that quantizer. Replays of CUDA graphs, in turn, the median of several samples.
From 1,024 tokens on the inputs are more than the cache holds; fewer tokens find their input in the
cache, as behind the kernel that wrote it. GB/s are of the bytes that have to be read and written.
First every fused quantizer against its definition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from gpu_timing import ROTATED_BYTES, capture, medians, quick_or_whole
from mixllm_compiler.lowering import fused, lowered, sources
from mixllm_compiler.lowering.agreement import disagreement
from mixllm_compiler.runtime import build
from results_io import Bar, write_results

TOKENS = (1, 16, 64, 256, 1024, 4096, 8192)
BLOCK, GROUP, KERNEL = 128, 128, "cuda.v1"
CALLS = 32  # of a graph, at least
RATIO_BAR = 1.4  # with the transform to without, from 1,024 tokens on
EXTRA_BARS = {4096: 0.4, 14336: 1.0}  # µs more for one token


@dataclass(frozen=True)
class Case:
    """One quantizer: its source, a name of `lowering.fused` or "plain", and K.

    `reads` counts the tensors of one row each that must be read or written in bf16.
    """

    source: str
    k: int
    other: bool = False

    @property
    def reads(self) -> int:
        if self.source in fused.NORMS:
            return 3 if self.other else 1
        return 2 if self.other else 1

    def name(self) -> str:
        with_other = " + residual" if self.source in fused.NORMS else " · factor"
        return self.source + (with_other if self.other else "")

    def bytes(self, m: int) -> int:
        """Of activations in, sums out, codes, scale and sum."""
        return m * self.k * (2 * self.reads + 1) + 8 * m


CASES = (
    Case("plain", 4096),
    Case("plain", 14336),
    Case("plain", 28672),
    Case("rms", 4096),
    Case("rms", 4096, True),
    Case("layer_norm", 4096, True),
    Case("rms", 8192, True),
    Case("silu", 14336, True),
    Case("silu", 28672, True),
    Case("gelu_tanh", 14336, True),
    Case("gelu", 14336),
    Case("gelu_new", 14336),
)

Pair = tuple[Tensor, Tensor]


class Quantizer:
    """A case with its parameters: ways to run it on (x, other)."""

    def __init__(self, case: Case) -> None:
        self.case = case
        draw = torch.Generator("cuda").manual_seed(0)
        w, b = (torch.randn(case.k, device="cuda", generator=draw).bfloat16() for _ in range(2))
        self.parameters = (w, b if case.source == "layer_norm" else None, 1e-5)
        torch._dynamo.reset()  # cases share their code, and with it the limit of recompiling
        self.compiled = torch.compile(self.floats, fullgraph=True)

    def fused(self, hadamard: int, definition: bool = False) -> Callable[[Pair], Any]:
        """The fused op, or what it means."""
        case, quantizer = self.case, ("token", GROUP, hadamard, KERNEL)
        if case.source == "plain":
            op: Any = lowered.LOWERED_QUANTIZE
        elif case.source in fused.NORMS:
            op = fused.ADD_NORM_QUANTIZE if case.other else fused.NORM_QUANTIZE
            quantizer = (*self.parameters, case.source, *quantizer)  # type: ignore[assignment]
        else:
            op = fused.ACTIVATION_QUANTIZE
            quantizer = (case.source, *quantizer)  # type: ignore[assignment]
        call = lowered.EXPANSIONS[op] if definition else op
        if case.other:
            return lambda pair: call(*pair, *quantizer)
        if op is fused.ACTIVATION_QUANTIZE:
            return lambda pair: call(pair[0], None, *quantizer)
        return lambda pair: call(pair[0], *quantizer)

    def floats(self, x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """The norm or activation in torch's ops, and the sum that others read as well."""
        if self.case.source in fused.NORMS:
            total = x + other if self.case.other else x
            return fused.normalized(total, *self.parameters, self.case.source), total
        factor = other if self.case.other else None
        return fused.activated(x, factor, self.case.source), x

    def apart(self, floats: Callable[..., Any]) -> Callable[[Pair], Any]:
        """Float ops, then the plain quantizer with the transform."""

        def run(pair: Pair) -> Any:
            y, total = floats(*pair)
            return lowered.LOWERED_QUANTIZE(y, "token", GROUP, BLOCK, KERNEL), total

        return run

    def problem(self, m: int, hadamard: int) -> str:
        """What is wrong with the fused op's result, "" if nothing is."""
        pair = (
            torch.randn(m, self.case.k, device="cuda").bfloat16(),
            torch.randn(m, self.case.k, device="cuda").bfloat16(),
        )
        found, expected = self.fused(hadamard)(pair), self.fused(hadamard, True)(pair)
        exact = self.case.source in ("plain", "silu")
        if exact and not all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)):
            return "not exact"
        if not all(torch.equal(a, b) for a, b in zip(found[3:], expected[3:], strict=True)):
            return "the sum with the residual is not exact"
        return disagreement(found[:3], expected[:3])


def inputs(case: Case, m: int) -> list[Pair]:
    """Pairs (x, other) for the calls of one graph."""
    size = 2 * m * case.k * (2 if case.other else 1)
    count = max(2, int(ROTATED_BYTES // size) + 1) if m >= 1024 else 1
    pairs = []
    for _ in range(count):
        x = torch.randn(m, case.k, device="cuda").bfloat16()
        pairs.append((x, torch.randn_like(x) if case.other else x))
    return pairs * max(1, CALLS // count)


def measure(quantizer: Quantizer, m: int) -> dict[str, Any]:
    """One row of the table: µs, ratios, GB/s."""
    case, over = quantizer.case, inputs(quantizer.case, m)
    measures = {
        "fused us": capture(quantizer.fused(BLOCK), over),
        "without transform us": capture(quantizer.fused(0), over),
    }
    if case.source != "plain":
        measures["separate us"] = capture(quantizer.apart(quantizer.floats), over)
        measures["compiled us"] = capture(quantizer.apart(quantizer.compiled), over)
    times = dict(zip(measures, medians(*measures.values()), strict=True))
    row: dict[str, Any] = {"quantizer": case.name(), "k": case.k, "tokens": m}
    row |= {key: value * 1e6 for key, value in times.items()}
    fused_us = row["fused us"]
    row["transform ratio"] = fused_us / row["without transform us"]
    row["transform us"] = fused_us - row["without transform us"]
    for key in ("separate", "compiled"):
        if f"{key} us" in row:
            row[f"{key} / fused"] = row[f"{key} us"] / fused_us
    row["GB/s"] = case.bytes(m) / times["fused us"] * 1e-9
    row["GB/s without"] = case.bytes(m) / times["without transform us"] * 1e-9
    return row


def bars(rows: list[dict[str, Any]], wrong: list[str]) -> list[Bar]:
    """What had to be reached."""
    found = [Bar.exactly("quantizers that differ from their definition", len(wrong), 0)]
    for row in rows:
        name = f"{row['quantizer']}, K = {row['k']}, M = {row['tokens']}"
        if row["tokens"] >= 1024:
            title = f"{name}: with the transform / without"
            found.append(Bar.at_most(title, row["transform ratio"], RATIO_BAR))
        if row["tokens"] == 1 and row["k"] in EXTRA_BARS:
            title = f"{name}: µs that the transform adds"
            found.append(Bar.at_most(title, row["transform us"], EXTRA_BARS[row["k"]]))
        if "compiled / fused" in row:
            title = f"{name}: torch.compile and the plain quantizer / fused"
            found.append(Bar.at_least(title, row["compiled / fused"], 1.0))
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    """What a person reads."""
    columns = ["quantizer", "k", "tokens", "fused us", "without transform us", "transform ratio"]
    columns += ["separate us", "compiled us", "separate / fused", "compiled / fused"]
    columns += ["GB/s", "GB/s without"]
    shown = Table(*columns, title=torch.cuda.get_device_name())
    for row in rows:
        cells = [row.get(column) for column in columns]
        text = [f"{c:.4g}" if isinstance(c, float) else str(c or "") for c in cells]
        shown.add_row(*text, end_section=row["tokens"] == max(r["tokens"] for r in rows))
    return shown


def main() -> None:
    """Check, measure, write, show."""
    options = quick_or_whole(__doc__)
    sources.use_store(build.materialize, build.build)
    console = Console(width=max(170, Console().width))
    rows, wrong = [], []
    for case in CASES:
        quantizer = Quantizer(case)
        for hadamard in (0, BLOCK):
            for m in (1, 100):
                if problem := quantizer.problem(m, hadamard):
                    wrong.append(f"{case.name()}, K = {case.k}, M = {m}, {hadamard}: {problem}")
        for m in (1, 4096) if options.quick else TOKENS:
            rows.append(measure(quantizer, m))
        torch.cuda.empty_cache()
    console.print(table(rows))
    for line in wrong:
        console.print(f"WRONG  {line}")
    found = bars(rows, wrong)
    for bar in found:
        console.print(
            f"{'met   ' if bar.met else 'MISSED'} {bar.name}: {bar.measured} {bar.target}"
        )
    if not options.quick:
        path = write_results(__file__, rows, found, device="cuda", extra={"wrong": wrong})
        console.print(f"written: {path.name}")


if __name__ == "__main__":
    main()
