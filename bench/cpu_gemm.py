"""How fast are the C++ kernels, against this CPU's own limits and torch's int8 and int4 linears?

    python bench/cpu_gemm.py            the table
    python bench/cpu_gemm.py --quick    a corner of it; writes no results

Times are of float input to float output: quantizer, product, output order and bias. "cold" has the
weights in memory: so many copies in turn that no cache holds them. Limits are measured in the same
process, see `cpu_peaks`. Rows: nine tenths of 4 bits and one of 8, in tiles of 64 spread at random
over windows of 1,024; two-level, one scale a token.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from cpu_peaks import Peaks, Timing
from mixllm_compiler.formats.layout import PackedWeight, pack
from mixllm_compiler.ir import reference
from mixllm_compiler.lowering.cpp import isa, launch, native
from mixllm_compiler.lowering.cpp import layout as panels
from mixllm_compiler.lowering.cpp.kernels import Scheme
from mixllm_compiler.lowering.lowered import LOWERED_LINEAR, expand_linear
from mixllm_compiler.quantizers.rtn import quantize_rtn
from results_io import Bar, write_results

SHAPES = [(8192, 2048), (4096, 4096)]
TOKENS = [1, 8, 16, 32, 64, 128, 512]
GROUP = 128
KERNEL = "cpp.v1"
COLD_BYTES = 150e6
MODE, FAMILY = "token", "two-level"


def tiles(n: int, share: float = 0.1, window: int = 1024, tile: int = 64) -> Tensor:
    """uint8 [n]: widths 4 and 8, whole tiles of 8 bits, their rows anywhere in their window."""
    widths = torch.full((n,), 4, dtype=torch.uint8)
    wide = torch.randperm(n // tile)[: round(share * n / tile)]
    for t in wide.tolist():
        start = t * tile // window * window
        free = (widths[start : start + window] == 4).nonzero().flatten()
        widths[start + free[torch.randperm(free.numel())[:tile]]] = 8
    return widths


def packed(n: int, k: int, widths: Tensor, family: str = FAMILY) -> PackedWeight:
    """Gaussian rows."""
    return pack(quantize_rtn(torch.randn(n, k) * 0.02, widths, GROUP, family=family), "panels64.v1")


def copies(tensor: Tensor) -> list[Tensor]:
    """So many that they do not fit any cache, on large pages, whoever's weights they are."""
    made = []
    for _ in range(1 + int(COLD_BYTES // (tensor.numel() * tensor.element_size()))):
        raw = torch.empty(tensor.numel() * tensor.element_size(), dtype=torch.uint8)
        panels.on_huge_pages(raw)
        made.append(raw.view(tensor.dtype).view(tensor.shape).copy_(tensor))
    return made


def over(items: list[Any], call: Callable[[Any], object]) -> Callable[[], object]:
    """A call that takes the next item each time."""
    turn = itertools.cycle(items)
    return lambda: call(next(turn))


def ours(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, mode: str = MODE
) -> Callable[[Tensor], Tensor]:
    """Float in, float out, for a blob."""
    layout = weight.layout
    native.load(Scheme(layout.family, mode))
    widths = sum(1 << bits for bits, _ in layout.widths)
    sizes = (layout.n, layout.groups, layout.group, panels.panel_count(layout), widths)
    rest = (*sizes, int(layout.family == "two-level"), native.OUTPUTS.index(x.dtype))

    def call(blob: Tensor) -> Tensor:  # as compiled graphs do
        codes = native.NATIVE_QUANTIZE(x, GROUP, int(mode == "group"), 0)
        return native.NATIVE_LINEAR(*codes, blob, bias, *rest)

    return call


def peers(x: Tensor, n: int, k: int, cold: bool) -> dict[str, Callable[[], object]]:
    """torch's own: float, int4 with bf16 input, int8 by oneDNN with quantization."""
    w, bias = torch.randn(n, k) * 0.02, torch.randn(n)
    some = copies if cold else lambda t: [t]
    half = x.bfloat16()
    found = {
        "fp32": over(some(w), lambda w: F.linear(x, w, bias)),
        "bf16": over(some(w.bfloat16()), lambda w: F.linear(half, w, bias.bfloat16())),
    }
    four = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        torch.randint(0, 16, (n, k), dtype=torch.int32), 1
    )
    scales = (torch.randn(k // GROUP, n, 2) * 0.01).bfloat16()
    found["int4pack"] = over(
        some(four), lambda w: torch.ops.aten._weight_int4pack_mm_for_cpu(half, w, GROUP, scales)
    )
    if x.shape[0] >= 32:
        importlib.import_module("torch.ao.quantization.fx._decomposed")  # defines the quantizer
        eight = torch.randint(-127, 127, (n, k), dtype=torch.int8)
        prepacked = torch.ops.onednn.qlinear_prepack(eight, list(x.shape))
        w_scales, zeros = torch.full((n,), 0.01), torch.zeros(n, dtype=torch.int32)

        def onednn() -> Tensor:
            q = torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.02, 3, 0, 255, torch.uint8)
            return torch.ops.onednn.qlinear_pointwise(
                *(q, 0.02, 3, prepacked, w_scales, zeros, bias, 1.0, 0, torch.float32),
                *("none", [], ""),
            )

        found["onednn u8s8"] = onednn
    return found


def check(weight: PackedWeight) -> None:
    """Two-level rows have one result, to the last bit."""
    x, bias = torch.randn(13, weight.layout.k), torch.randn(weight.layout.n)
    codes = reference.quantize_activation(x, MODE, GROUP)
    rest = (weight.blob, bias, str(weight.layout), torch.float32, KERNEL)
    if not torch.equal(LOWERED_LINEAR(*codes, *rest), expand_linear(*codes, *rest)):
        raise SystemExit("the kernels disagree with the reference: nothing was measured")


def main_table(
    peaks: Peaks, shapes: list[tuple[int, int]], tokens: list[int], limit: float
) -> list[dict[str, Any]]:
    """One row a shape and number of tokens."""
    rows = []
    for n, k in shapes:
        weight = packed(n, k, tiles(n))
        check(weight)
        bias = torch.randn(n)
        for m, cold in [(1, True), *((m, False) for m in tokens)]:
            x = torch.randn(m, k)
            blobs = copies(weight.blob) if cold else [weight.blob]
            calls = {"ours": over(blobs, ours(x, weight, bias)), **peers(x, n, k, cold)}
            if cold:
                calls["read"] = peaks.reading(weight.blob.numel())
            rows.append(row(peaks, n, k, m, cold, peaks.measure(calls, limit), weight))
            print(rows[-1], flush=True)
    return rows


def row(
    peaks: Peaks,
    n: int,
    k: int,
    m: int,
    cold: bool,
    found: dict[str, Timing],
    weight: PackedWeight,
) -> dict[str, Any]:
    """What one line of the table says."""
    mine, size = found["ours"].seconds, weight.blob.numel()
    theirs = {name: timing for name, timing in found.items() if name not in ("ours", "read")}
    read = {"read GB/s": round(size / found["read"].seconds / 1e9, 1)} if cold else {}
    return {
        "N": n,
        "K": k,
        "M": m,
        "weights in": "memory" if cold else "cache",
        "us": round(mine * 1e6, 1),
        "quiet windows": found["ours"].quiet,
        "of VNNI peak": round(2 * m * n * k / mine / peaks.best, 3),
        "GB/s": round(size / mine / 1e9, 1),
        **read,
        **{f"x {name}": round(timing.seconds / mine, 2) for name, timing in theirs.items()},
        **{f"quiet {name}": timing.quiet for name, timing in theirs.items()},
    }


def width_table(peaks: Peaks, limit: float) -> list[dict[str, Any]]:
    """Rows of one width: time for bytes at one token, and for arithmetic at 16 and 64."""
    n, k = SHAPES[0]
    weights = {b: packed(n, k, torch.full((n,), b, dtype=torch.uint8)) for b in (2, 3, 4, 5, 6, 8)}
    rows: list[dict[str, Any]] = [{"bits": b} for b in weights]
    for m in (1, 16, 64):
        x = torch.randn(m, k)
        calls = {
            str(b): over(copies(w.blob) if m == 1 else [w.blob], ours(x, w, None))
            for b, w in weights.items()
        }
        found = peaks.measure(calls, 3 * limit)
        for entry in rows:
            took = found[str(entry["bits"])]
            entry[f"us M={m}"] = round(took.seconds * 1e6, 1)
            entry[f"quiet M={m}"] = took.quiet
            if m == 1:
                entry["GB/s M=1"] = round(
                    weights[entry["bits"]].blob.numel() / took.seconds / 1e9, 1
                )
    return rows


def quantizer_table(peaks: Peaks, limit: float) -> list[dict[str, Any]]:
    """The activation quantizer as our kernel and as Inductor compiles its definition."""
    native.load(Scheme(FAMILY, MODE))

    def definition(x: Tensor, block: int) -> tuple[Tensor, Tensor, Tensor]:
        x = reference.hadamard(x, block) if block else x
        return reference.quantize_activation(x, MODE, GROUP)

    compiled = torch.compile(definition, dynamic=False)
    rows = []
    for m, block in itertools.product((1, 512), (0, 128)):
        x = torch.randn(m, 2048)
        calls = {
            "kernel": over([x], lambda x, block=block: native.NATIVE_QUANTIZE(x, GROUP, 0, block)),
            "Inductor": over([x], lambda x, block=block: compiled(x, block)),
        }
        found = peaks.measure(calls, limit)
        times = {f"us, {name}": round(t.seconds * 1e6, 1) for name, t in found.items()}
        rows.append({"M": m, "K": 2048, "Hadamard block": block, **times})
    return rows


def isa_table(limit: float) -> list[dict[str, Any]]:
    """Every instruction set of this machine, one thread: weights in memory, and in the cache."""
    n, k = SHAPES[0]
    weight = packed(n, k, tiles(n))
    torch.set_num_threads(1)
    peaks = Peaks(1)
    rows = []
    for one in isa.available():
        entry: dict[str, Any] = {"instructions": one.name}
        with launch.using(one.name):
            places = (("memory", copies(weight.blob)), ("cache", [weight.blob]))
            for m, (place, blobs) in itertools.product((1, 64), places):
                if m > 1 and (one.name == "plain" or place == "memory"):
                    continue
                call = ours(torch.randn(m, k), weight, None)
                took = peaks.measure({"ours": over(blobs, call)}, limit)["ours"]
                label = f"M={m} {place}"
                entry |= {f"us {label}": round(took.seconds * 1e6, 1), f"quiet {label}": took.quiet}
        rows.append(entry)
    return rows


def bars(
    table: list[dict[str, Any]], widths: list[dict[str, Any]], isas: list[dict[str, Any]]
) -> list[Bar]:
    """What has to be reached."""
    found = []
    for n, k in sorted({(r["N"], r["K"]) for r in table}):
        lines = [r for r in table if (r["N"], r["K"]) == (n, k)]
        where = f"N={n} K={k}"
        (cold,) = (r for r in lines if r["weights in"] == "memory")
        warm = {r["M"]: r for r in lines if r["weights in"] == "cache"}
        found += [
            Bar.at_least(
                f"{where} M=1 from memory, of read bandwidth", cold["GB/s"] / cold["read GB/s"], 0.9
            ),
            Bar.at_least(f"{where} M=1 from memory, x torch's int4 pack", cold["x int4pack"], 1.6),
            Bar.at_least(f"{where} M=8, of VNNI peak", warm[8]["of VNNI peak"], 0.72),
            Bar.at_least(
                f"{where} M=16…512, least of VNNI peak",
                min(r["of VNNI peak"] for m, r in warm.items() if m >= 16),
                0.78,
            ),
            Bar.at_least(
                f"{where} M≥32, least x oneDNN u8s8",
                min(r["x onednn u8s8"] for m, r in warm.items() if m >= 32),
                0.95,
            ),
        ]
    four = next(r for r in widths if r["bits"] == 4)
    others = [r for r in widths if r["bits"] in (2, 3, 5, 6)]
    speed = [r["GB/s M=1"] / four["GB/s M=1"] for r in others]
    found += [
        Bar.at_least(
            "rows of 2, 3, 5, 6 bits, M=1: least bytes a second, of 4-bit rows'", min(speed), 0.9
        ),
        Bar.at_most(
            "rows of 2, 3, 5, 6 bits, M=16 and 64: most time, of 4-bit rows'",
            max(r[f"us M={m}"] / four[f"us M={m}"] for r in others for m in (16, 64)),
            1.15,
        ),
    ]
    by_isa = {r["instructions"]: r for r in isas}
    best = by_isa.get("avx512-vnni")
    for name, least in (("avx2", 0.5), ("avx-vnni", 0.75)):
        other = by_isa.get(name)
        both = best is not None and other is not None
        found += [
            Bar.at_most(
                f"{name}, M=1 from memory: time, of AVX-512's",
                other["us M=1 memory"] / best["us M=1 memory"] if both else None,
                1.3,
            ),
            Bar.at_least(
                f"{name}, M=64: speed, of AVX-512's",
                best["us M=64 cache"] / other["us M=64 cache"] if both else None,
                least,
            ),
        ]
    return found


def main() -> None:
    """Check, measure, write, show."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="one shape, few tokens, no results")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--limit", type=float, default=20.0, help="seconds to wait for quiet windows"
    )
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    peaks = Peaks(options.threads)
    if options.quick:
        main_table(peaks, SHAPES[:1], [1, 8, 64], options.limit)
        return
    with torch.no_grad():
        table = main_table(peaks, SHAPES, TOKENS, options.limit)
        widths = width_table(peaks, options.limit)
        quantizers = quantizer_table(peaks, options.limit)
        isas = isa_table(options.limit)
    found = bars(table, widths, isas)
    extra = {
        "instructions": isa.current().name,
        "threads": options.threads,
        "VNNI peak, Gop/s": round(peaks.best / 1e9),
        "read, GB/s": round(max(r["read GB/s"] for r in table if "read GB/s" in r), 1),
        "widths": widths,
        "quantizer": quantizers,
        "instruction sets, one thread": isas,
    }
    path = write_results(__file__, table, found, device="cpu", extra=extra)
    shown = Table("bar", "target", "measured", "met")
    for bar in found:
        shown.add_row(
            bar.name,
            bar.target,
            "–" if bar.measured is None else f"{bar.measured:.3f}",
            "yes" if bar.met else "no",
        )
    Console().print(shown, path.name)


if __name__ == "__main__":
    main()
