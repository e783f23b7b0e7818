"""How fast are the CUDA kernels, against cuBLAS in bf16 and in fp8?

    python bench/gemm.py            the four linears of Llama-3.1-8B, 1 to 8192 tokens
    python bench/gemm.py --quick    a corner of it; writes no results
    python bench/gemm.py --peers    other libraries, too: `gemm_peers.py`

The row mix is `row_mix.json`: 4.4 true bits, six widths. First every linear against exact integers,
bit for bit. Then times: up to 256 tokens replays of CUDA graphs over weights larger than the cache,
above that each kernel for 0.1 s on end. Ratios are to the faster of cuBLAS and cuBLASLt, taken in
turn; the median of several samples. Variants come from the dispatcher.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from ctypes import c_longlong, c_void_p
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import gemm_peers
from gpu_timing import capture, copies, cublas, medians, without_overlap
from mixed_linears import LLAMA_8B, MIX, MixedLinear, row_widths
from mixllm_compiler.lowering import sources
from mixllm_compiler.lowering.cuda import compiling, dispatch, driver
from mixllm_compiler.lowering.target import Target
from mixllm_compiler.runtime import build
from results_io import Bar, write_results

TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
SUSTAINED = 512  # tokens from which a kernel is timed for long
SECONDS = 0.1
HADAMARD = 128

SUM_BARS = {1: 3.4, 8: 3.2, 16: 3.0, 32: 2.6, 64: 2.5, 128: 2.0, 256: 1.8}
EACH_BAR = 1.5  # of 128 and 256 tokens
READ_BAR, READ_BYTES = 0.93, 32e6

READ_SOURCE = r"""
extern "C" __global__ void __launch_bounds__(256) read(const uint4* p, long long n, int* sink) {
    unsigned s = 0;
    const long long stride = gridDim.x * 256ll;
    long long i = blockIdx.x * 256ll + threadIdx.x;
    for (; i + 7 * stride < n; i += 8 * stride) {
        uint4 v[8];
#pragma unroll
        for (int k = 0; k < 8; k++)
            asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(v[k].x), "=r"(v[k].y), "=r"(v[k].z), "=r"(v[k].w)
                         : "l"(p + i + k * stride));
#pragma unroll
        for (int k = 0; k < 8; k++) s ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
    }
    for (; i < n; i += stride) s ^= p[i].x ^ p[i].y ^ p[i].z ^ p[i].w;
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    if (s == 0x12345678u) *sink = 1;
}
"""


def reader() -> Callable[[Tensor], None]:
    """Reads a blob and does nothing else: the limit of a decode kernel, with the same overlap."""
    kernel = driver.load(compiling.cubin(READ_SOURCE, "read", "sm_90a"), "read")
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")

    def read(blob: Tensor) -> None:
        arguments = [c_void_p(blob.data_ptr()), c_longlong(blob.numel() // 16)]
        stream = torch.cuda.current_stream().cuda_stream
        kernel.launch(132 * 8, 256, 0, stream, [*arguments, c_void_p(sink.data_ptr())], 1, True)

    return read


def in_fp8(x: Tensor, floats: list[Tensor], seconds: float) -> Callable[[], float]:
    """cuBLAS in fp8, one scale a tensor, fast accumulation; quantizing is not in it."""
    one = torch.ones((), device="cuda")
    x8 = x.to(torch.float8_e4m3fn)
    weights = [w.to(torch.float8_e4m3fn) for w in floats[:2]]

    def call(w: Tensor) -> Tensor:
        return torch._scaled_mm(x8, w.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return capture(call, weights * 4, seconds)


def measure(
    name: str, linear: MixedLinear, ordered: MixedLinear, floats: list[Tensor], m: int, read: Any
) -> dict[str, Any]:
    """One row of the table: µs, ratios to bf16."""
    n, k = linear.layout.n, linear.layout.k
    long = m >= SUSTAINED
    seconds, samples = (SECONDS, 3) if long else (2e-3, 5)
    x = torch.randn(m, k, device="cuda").bfloat16()
    activation = linear.quantize(x)
    blobs, weights = (linear.blobs[:8], floats[:8]) if long else (linear.blobs, floats)

    def gemm(blob: Tensor) -> Tensor:
        return linear.gemm(activation, blob)

    measures = {
        "bf16": cublas(x, weights, seconds),
        "gemm": capture(gemm, blobs, seconds),
        "both": capture(lambda blob: linear.gemm(linear.quantize(x), blob), blobs, seconds),
    }
    if long:
        measures["packed order"] = capture(
            lambda blob: ordered.gemm(activation, blob), ordered.blobs[:8], seconds
        )
        measures["fp8"] = in_fp8(x, floats, seconds)
    else:
        measures["no overlap"] = capture(without_overlap(gemm), blobs, seconds)
    if m == 1:
        measures["read"] = capture(read, blobs, seconds)
    times = dict(zip(measures, medians(*measures.values(), samples=samples), strict=True))
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    variant = dispatch.choose(m, linear.layout, Target.of("cuda"), multiprocessors)
    row: dict[str, Any] = {"linear": name, "tokens": m, "variant": str(variant)}
    row |= {f"{key} us": value * 1e6 for key, value in times.items()}
    row |= {f"{key} ratio": times["bf16"] / value for key, value in times.items() if key != "bf16"}
    row["GB/s"] = linear.bytes / times["gemm"] * 1e-9
    row["TOPS"] = 2 * m * n * k / times["gemm"] * 1e-12
    return row


def summed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The four linears together, per number of tokens."""
    out = []
    for m in dict.fromkeys(row["tokens"] for row in rows):
        part = [row for row in rows if row["tokens"] == m and row["linear"] in LLAMA_8B]
        keys = [key for key in part[0] if key.endswith(" us")]
        total = {key: sum(row[key] for row in part) for key in keys}
        ratios = {
            key[:-2] + "ratio": total["bf16 us"] / total[key] for key in keys if key != "bf16 us"
        }
        out.append({"linear": "sum", "tokens": m, **total, **ratios})
    return out


def bars(rows: list[dict[str, Any]], sums: list[dict[str, Any]], wrong: int) -> list[Bar]:
    """What had to be reached."""
    found = [Bar.exactly("outputs that differ from the definition", wrong, 0)]
    total = {row["tokens"]: row for row in sums}
    for m, limit in SUM_BARS.items():
        if m in total:
            name = f"GEMM, M = {m}: sum of four linears, bf16 / ours"
            found.append(Bar.at_least(name, total[m]["gemm ratio"], limit))
    for m in (128, 256):
        worst = [row["gemm ratio"] for row in rows if row["tokens"] == m]
        if worst:
            found.append(Bar.at_least(f"GEMM, M = {m}: the worst linear", min(worst), EACH_BAR))
    for m in (1024, 2048, 4096, 8192):
        if m not in total:
            continue
        of = f"M = {m}: sum of four linears, bf16 / ours"
        found.append(Bar.at_least(f"GEMM, packed order, {of}", total[m]["packed order ratio"], 2.0))
        found.append(Bar.at_least(f"GEMM, model order, {of}", total[m]["gemm ratio"], 1.85))
        fp8 = total[m]["fp8 us"] / total[m]["packed order us"]
        found.append(Bar.at_least(f"GEMM, M = {m}: sum, fp8 / ours in packed order", fp8, 1.05))
        each = [row["fp8 us"] / row["packed order us"] for row in rows if row["tokens"] == m]
        least = 0.95 if m == 1024 else 1.0
        found.append(Bar.at_least(f"GEMM, M = {m}: the worst, fp8 / ours", min(each), least))
    for m, limit in ((1, 2.85), (4096, 1.75)):
        if m in total:
            name = f"quantizer with Hadamard + GEMM, M = {m}: bf16 / ours"
            found.append(Bar.at_least(name, total[m]["both ratio"], limit))
    for row in rows:
        if row["linear"] == "70b_down" and row["tokens"] in (1, 8):
            name = f"GEMM, M = {row['tokens']}: 70B down_proj, bf16 / ours"
            found.append(Bar.at_least(name, row["gemm ratio"], 3.2))
        if row["tokens"] == 1 and row["GB/s"] * row["gemm us"] * 1e3 >= READ_BYTES:
            name = f"GEMM, M = 1: {row['linear']}, plain read of the same bytes / ours"
            found.append(Bar.at_least(name, row["read us"] / row["gemm us"], READ_BAR))
    return found


def peer_bars(peers: list[dict[str, Any]], sums: list[dict[str, Any]]) -> list[Bar]:
    """Ahead of the best peer at every number of tokens."""
    ours = {row["tokens"]: row for row in sums}
    best: dict[int, tuple[float, str]] = {}
    for row in peers:
        m = row.get("tokens")
        if row.get("linear") == "sum" and m in ours:
            ratio = row["us"] / ours[m][gemm_peers.comparable(row["quantizer"])]
            name = f"{row['peer']}, quantizer {row['quantizer']}"
            best[m] = min(best.get(m, (math.inf, "")), (ratio, name))
    return [
        Bar.at_least(f"M = {m}: sum of four linears, best peer ({name}) / ours", ratio, 1.0)
        for m, (ratio, name) in sorted(best.items())
    ]


def table(rows: list[dict[str, Any]]) -> Table:
    """What a person reads."""
    columns = ["linear", "tokens", "bf16 us", "gemm us", "gemm ratio", "no overlap ratio"]
    columns += ["packed order ratio", "both ratio", "fp8 ratio", "read us", "GB/s", "TOPS"]
    shown = Table(*columns, "variant", title=torch.cuda.get_device_name())
    for row in rows:
        cells = [row.get(column) for column in [*columns, "variant"]]
        text = [f"{c:.4g}" if isinstance(c, float) else str(c or "") for c in cells]
        shown.add_row(*text, end_section=row["linear"] == "sum")
    return shown


def main() -> None:
    """Check, measure, write, show."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="four numbers of tokens, not written")
    parser.add_argument("--peers", action="store_true", help="measure other libraries, too")
    parser.add_argument("--peer-limit", type=float, default=gemm_peers.LIMIT, help="seconds each")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("this bench measures GPU kernels; there is no CUDA device here")
    torch.manual_seed(0)
    sources.use_store(build.materialize, build.build)
    console = Console(width=max(170, Console().width))
    tokens = (1, 16, 128, 4096) if options.quick else TOKENS
    read = reader()
    rows, wrong = [], 0
    for name, entry in MIX["matrices"].items():
        small = name not in LLAMA_8B  # a bar of decode only
        linear = MixedLinear.of(row_widths(name), entry["k"])
        ordered = linear if small else MixedLinear.of(row_widths(name, True), entry["k"])
        floats = copies(torch.randn(entry["n"], entry["k"], device="cuda").bfloat16())
        wrong += sum(linear.wrong(m) for m in (1, 16, 50, 200, 600))
        wrong += sum(ordered.wrong(m) for m in (50, 600))
        for m in (1, 8) if small else tokens:
            rows.append(measure(name, linear, ordered, floats, m, read))
        del linear, ordered, floats
    sums = summed(rows)
    console.print(table(sorted(rows + sums, key=lambda row: row["tokens"])))
    found = bars(rows, sums, wrong)
    peers: list[dict[str, Any]] = []
    if options.peers:
        asked = [m for m in gemm_peers.TOKENS if m in tokens]
        peers = gemm_peers.run_all(asked, options.peer_limit)
        console.print(gemm_peers.table(peers))
        found += peer_bars(peers, sums)
    for bar in found:
        console.print(
            f"{'met   ' if bar.met else 'MISSED'} {bar.name}: {bar.measured} {bar.target}"
        )
    if not options.quick:
        path = write_results(__file__, rows + sums + peers, found, device="cuda", extra=MIX)
        console.print(f"written: {path.name}")


if __name__ == "__main__":
    main()
