"""How fast are the generated GPU kernels, against cuBLAS in bf16?

    python bench/gemm.py            the table: four linears of an 8B Llama, 1 to 4096 tokens
    python bench/gemm.py --quick    a corner of it
    python bench/gemm.py --sweep    time candidate schedules; writes no results

Correctness first: every shape against float64. Then times: a CUDA graph of one call for each of so
many copies of the weight that all of them exceed the cache (over 260 MB), replayed; the median of
five, taken in turn with cuBLAS. "us" is quantizer and GEMM, from bf16 to bf16.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mixllm_compiler.formats.layout import Layout, pack
from mixllm_compiler.formats.neutral import QuantizedWeight
from mixllm_compiler.lowering import sources
from mixllm_compiler.lowering.cost import predict_seconds
from mixllm_compiler.lowering.lowered import LOWERED_LINEAR, LOWERED_QUANTIZE
from mixllm_compiler.lowering.spec import Bucket
from mixllm_compiler.lowering.target import Target
from mixllm_compiler.lowering.triton import launch
from mixllm_compiler.lowering.triton.schedule import schedule
from mixllm_compiler.quantizers.rtn import quantize_rtn
from mixllm_compiler.runtime import build
from results_io import Bar, write_results

SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]  # [N, K]
TOKENS = [1, 8, 16, 32, 64, 128, 256, 1024, 4096]
QUICK_SHAPES = [(4096, 4096), (14336, 4096)]
QUICK_TOKENS = [1, 64, 1024]
SHARE_OF_8_BIT = 0.1
GROUP = 128
KERNEL = "triton.v1"
ROTATED_BYTES = 260e6
SAMPLES = 5
SAMPLE_SECONDS = 2e-3

CANDIDATES = {
    1: "m16:16x2,2,5 m16:16x4,4,3 m16:16x4,4,5 m16:16x8,8,2 m16:16x8,8,3 m16:16x8,8,4 "
    "m16:16x16,16,2 m16:32x4,4,3 m16:32x8,8,2 m16:32x8,8,3",
    16: "m16:16x4,4,3 m16:16x4,4,5 m16:16x8,8,3 m16:32x4,4,3 m16:32x8,8,3",
    32: "m32:16x4,4,3 m32:16x8,8,2 m32:32x4,4,3 m32:32x8,8,2 m32:64x1,4,4 m32:64x1,4,6 "
    "m32:64x2,2,3",
    64: "m64:32x4,4,2 m64:32x2,2,3 m64:64x1,4,3 m64:64x1,4,4 m64:64x1,4,6 m32:64x1,4,4 "
    "m32:32x4,4,3",
    128: "m128:64x1,4,3 m128:64x1,4,4 m128:64x1,8,3 m64:64x1,4,3 m64:64x1,4,4 m32:64x1,4,4",
    256: "m128:64x1,4,3 m128:64x1,4,4 m128:64x1,8,3 m64:64x1,4,4 m256:64x1,8,3",
    4096: "m128:64x1,4,2 m128:64x1,4,3 m128:64x1,4,4 m128:64x1,8,3 m64:64x1,4,4 m256:64x1,8,2 "
    "m256:64x1,8,3",
}
"""Schedules that `--sweep` times, by number of tokens; their text is that of `spec.Bucket`."""


@dataclass
class Linear:
    """One matrix: more copies of it, packed and in bf16, than the cache can hold."""

    weight: QuantizedWeight
    layout: Layout
    blobs: list[Tensor]
    floats: list[Tensor]

    @classmethod
    def make(cls, n: int, k: int) -> Linear:
        w = torch.randn(n, k, device="cuda") * 0.02
        widths = torch.full((n,), 4, dtype=torch.uint8)
        widths[torch.randperm(n)[: round(SHARE_OF_8_BIT * n)]] = 8
        weight = quantize_rtn(w, widths, GROUP)
        packed = pack(weight, "tiles64.v1")
        blobs = _copies(packed.blob)
        return cls(weight, packed.layout, blobs, _copies(w.bfloat16()))

    def quantize(self, x: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
        return LOWERED_QUANTIZE(x, mode, GROUP, 0, KERNEL)

    def gemm(self, activation: tuple[Tensor, Tensor, Tensor], blob: Tensor) -> Tensor:
        args = (blob, None, str(self.layout), torch.bfloat16, KERNEL)
        return LOWERED_LINEAR(*activation, *args)

    def error(self, x: Tensor, mode: str) -> float:
        """Largest error over what 1e-6 of the magnitudes and one rounding allow; 1 is the limit."""
        codes, scales, sums = self.quantize(x, mode)
        y = self.gemm((codes, scales, sums), self.blobs[0]).double()
        wide = scales.double().expand(-1, self.layout.groups).repeat_interleave(GROUP, 1)
        exact_x = (codes.double() * wide)[:, : self.layout.k]
        w = self.weight.dequantize()
        exact = exact_x @ w.T
        room = 1e-6 * (exact_x.abs() @ w.abs().T) + 2.0**-8 * exact.abs()
        return ((y - exact).abs() / room).nan_to_num(nan=math.inf).max().item()


def largest_error(linear: Linear, mode: str) -> float:
    """Over one number of tokens from each bucket."""
    tokens = (1, 24, 50, 333)
    xs = [torch.randn(m, linear.layout.k, device="cuda").bfloat16() for m in tokens]
    return max(linear.error(x, mode) for x in xs)


def _copies(tensor: Tensor) -> list[Tensor]:
    size = tensor.numel() * tensor.element_size()
    return [tensor] + [tensor.clone() for _ in range(math.ceil(ROTATED_BYTES / size))]


def capture(call: Callable[[Any], Any], over: Sequence[Any]) -> Callable[[], float]:
    """A function that measures one call in seconds: replay of a graph that calls over all items."""
    call(over[0])  # compiles outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for item in over:
            call(item)

    def replay(times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / times

    replay(2)
    times = max(1, round(SAMPLE_SECONDS / replay(2)))
    return lambda: replay(times) / len(over)


def medians(*measures: Callable[[], float]) -> list[float]:
    """Median of each measure, taken in turn so that all see the same clocks."""
    rounds = [[measure() for measure in measures] for _ in range(SAMPLES)]
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def measure(linear: Linear, m: int, mode: str, target: Target) -> dict[str, Any]:
    """One row of the table."""
    n, k = linear.layout.n, linear.layout.k
    x = torch.randn(m, k, device="cuda").bfloat16()
    activation = linear.quantize(x, mode)
    both, gemm, cublas = medians(
        capture(lambda blob: linear.gemm(linear.quantize(x, mode), blob), linear.blobs),
        capture(lambda blob: linear.gemm(activation, blob), linear.blobs),
        capture(lambda w: torch.nn.functional.linear(x, w), linear.floats),
    )
    predicted = predict_seconds(m, linear.layout, target)
    return {
        "linear": f"{n}x{k}",
        "tokens": m,
        "mode": mode,
        "us": both * 1e6,
        "bf16 us": cublas * 1e6,
        "ratio": cublas / both,
        "gemm us": gemm * 1e6,
        "gemm ratio": cublas / gemm,
        "GB/s": linear.blobs[0].numel() / gemm * 1e-9,
        "TOPS": 2 * m * n * k / gemm * 1e-12,
        "predicted us": None if predicted is None else predicted * 1e6,
    }


def summed(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per mode and number of tokens: all linears together."""
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["mode"], row["tokens"]), []).append(row)
    out = []
    for (mode, m), part in groups.items():
        total = {key: sum(row[key] for row in part) for key in ("us", "bf16 us", "gemm us")}
        ratios = {
            "ratio": total["bf16 us"] / total["us"],
            "gemm ratio": total["bf16 us"] / total["gemm us"],
        }
        out.append({"linear": "all", "tokens": m, "mode": mode, **total, **ratios})
    return out


def table(rows: Iterable[dict[str, Any]]) -> Table:
    """What a person reads."""
    shown = Table(
        title=f"quantize + mixed GEMM against cuBLAS bf16, {torch.cuda.get_device_name()}"
    )
    columns = ["mode", "linear", "tokens", "us", "bf16 us", "ratio", "gemm us", "gemm ratio"]
    columns += ["GB/s", "TOPS", "predicted us"]
    for column in columns:
        shown.add_column(column, justify="left" if column in ("mode", "linear") else "right")
    for row in rows:
        cells = [row.get(column) for column in columns]
        shown.add_row(*(_text(cell) for cell in cells), end_section=row["linear"] == "all")
    return shown


def _text(cell: Any) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:.2f}" if cell < 10 else f"{cell:.1f}" if cell < 1000 else f"{cell:.0f}"
    return str(cell)


def sweep(linears: Sequence[Linear], console: Console) -> None:
    """Times of candidate schedules in µs: GEMM alone, mode token."""
    shown = Table("tokens", "schedule", *(f"{w.layout.n}x{w.layout.k}" for w in linears))
    for m, candidates in CANDIDATES.items():
        for text in candidates.split():
            times = [_time_schedule(linear, m, Bucket.parse(text)) for linear in linears]
            shown.add_row(str(m), text, *times)
        shown.add_section()
    console.print(shown)


def _time_schedule(linear: Linear, m: int, bucket: Bucket) -> str:
    x = torch.randn(m, linear.layout.k, device="cuda").bfloat16()
    activation = linear.quantize(x, "token")
    try:
        with launch.trying((bucket,)):
            run = capture(lambda blob: linear.gemm(activation, blob), linear.blobs)
    except Exception as error:  # noqa: BLE001  a candidate may not compile or not fit
        return type(error).__name__
    return _text(medians(run)[0] * 1e6)


def main() -> None:
    """Check, measure, write, show."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="two linears, three numbers of tokens")
    parser.add_argument("--sweep", action="store_true", help="time candidate schedules instead")
    parser.add_argument("--modes", nargs="+", default=["token", "group"], help="of activations")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this bench measures GPU kernels; there is no CUDA device here")
    torch.manual_seed(0)
    sources.use_store(build.materialize, build.build)
    # Wide enough for the table where the output is no terminal.
    console = Console(width=max(120, Console().width))
    target = Target.of("cuda")
    tokens = QUICK_TOKENS if options.quick else TOKENS
    linears = [Linear.make(n, k) for n, k in (QUICK_SHAPES if options.quick else SHAPES)]
    worst = max(largest_error(linear, mode) for linear in linears for mode in options.modes)
    console.print(f"checked against float64: largest error {worst:.2f} of what rounding allows")
    if worst > 1:
        raise SystemExit("the kernels are wrong; nothing was timed")
    if options.sweep:
        sweep(linears, console)
        return
    rows = []
    for mode in options.modes:
        for m in tokens:
            rows += [measure(linear, m, mode, target) for linear in linears]
    rows += summed(rows)
    rows.sort(key=lambda row: (options.modes.index(row["mode"]), row["tokens"]))
    path = write_results(
        __file__,
        rows,
        [Bar.at_most("Triton GEMM: largest error over what rounding allows", worst, 1.0)],
        device="cuda",
        extra={"schedule": " ".join(map(str, schedule(target))), "rows of 8 bits": SHARE_OF_8_BIT},
    )
    console.print(f"written: {path.name}")
    console.print(table(rows))


if __name__ == "__main__":
    main()
