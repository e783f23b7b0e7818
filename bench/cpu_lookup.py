"""Do lookup tables beat dot products for rows of 2 bits and one token?

    python bench/cpu_lookup.py

T-MAC (Wei et al., EuroSys 2025) multiplies by looking up: four weights' bits of one plane index a
table of 16 sums of four activations; a code of 2 bits is two planes. Here is that loop for AVX-512
with tables of 8 bits, its results checked, beside our kernel for rows of 2 bits, quantizer and
output included. The lookup's tables are built before the clock starts, its sums get no scale, and
8 bits hold sums of real activations only roughly: all in its favour. One thread, its CPU time, in
turns; matrices in the second cache, the third and memory.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console

from cpu_gemm import FAMILY, GROUP, MODE, copies, ours, over, packed
from mixllm_compiler.lowering.cpp import compiler, isa
from results_io import Bar, write_results

SIZES = {"second cache": (512, 4096), "third cache": (8192, 4096), "memory": (16384, 8192)}
ROUNDS = 15
WINDOW = 5e-3
WORTH = 1.15  # times as fast from memory, where a model's weights lie: then it would be a kernel

_SOURCE = r"""
#include <immintrin.h>
#include <stdint.h>
#define EXPORT extern "C" __attribute__((visibility("default")))
#define INDEX(v) _mm512_and_si512(v, low)
#define SUMS(table, v) _mm512_maddubs_epi16(_mm512_shuffle_epi8(table, INDEX(v)), planes)
#define TABLE(p) _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)(p)))
#define HALF(v, i) (i ? _mm512_extracti64x4_epi64(v, 1) : _mm512_castsi512_si256(v))
// Panels of 64 rows. Per 8 k: two vectors of 32 rows, in bytes (plane 0, plane 1) of a row; low
// halves are the bits of the first 4 k, high ones of the next. A group is 128 k: `t` of 64 rows,
// then its codes. tables: 16 sums of 4 activations, shifted to unsigned, per 4 k.
// out [rows] = sum of t * (plane 0 + 2 plane 1)
EXPORT void lookup(const uint8_t* w, const uint8_t* tables, long panels, long groups, int* out) {
  const __m512i low = _mm512_set1_epi8(15), planes = _mm512_set1_epi16(0x0201);
  for (long p = 0; p < panels; p++) {
    __m512i f[4] = {};
    const uint8_t* table = tables;
    for (long g = 0; g < groups; g++, w += 64 + 2048) {
      __m512i a0 = _mm512_setzero_si512(), a1 = a0, b0 = a0, b1 = a0;
      const uint8_t* codes = w + 64;
      for (int i = 0; i < 16; i++, codes += 128, table += 32) {
        _mm_prefetch((const char*)codes + 8192, _MM_HINT_T0);
        _mm_prefetch((const char*)codes + 8256, _MM_HINT_T0);
        const __m512i first = TABLE(table), next = TABLE(table + 16);
        const __m512i u = _mm512_loadu_si512(codes), v = _mm512_loadu_si512(codes + 64);
        a0 = _mm512_add_epi16(a0, SUMS(first, u));
        a1 = _mm512_add_epi16(a1, SUMS(first, v));
        b0 = _mm512_add_epi16(b0, SUMS(next, _mm512_srli_epi16(u, 4)));
        b1 = _mm512_add_epi16(b1, SUMS(next, _mm512_srli_epi16(v, 4)));
      }
      // 16 steps of at most 2 * 255 + 255 stay below 32768 in each of both.
      a0 = _mm512_add_epi16(a0, b0), a1 = _mm512_add_epi16(a1, b1);
      for (int r = 0; r < 4; r++) {
        const __m512i sums = r < 2 ? a0 : a1;
        const __m512i wide = _mm512_cvtepu16_epi32(HALF(sums, r % 2));
        const __m512i t = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(w + 16 * r)));
        f[r] = _mm512_add_epi32(f[r], _mm512_mullo_epi32(wide, t));
      }
    }
    for (int r = 0; r < 4; r++) _mm512_storeu_si512(out + 64 * p + 16 * r, f[r]);
  }
}
"""


def library() -> ctypes.CDLL:
    """The lookup loop; needs AVX-512."""
    flags = isa.ISAS["avx512-vnni"]
    if flags not in isa.available():
        raise SystemExit("this experiment needs AVX-512")
    found = compiler.library(_SOURCE, "bench-lookup", flags)
    pointer, size = ctypes.c_void_p, ctypes.c_long
    found.lookup.argtypes = [pointer, pointer, size, size, pointer]
    return found


def lookup(n: int, k: int, lib: ctypes.CDLL) -> tuple[torch.Tensor, Callable[[torch.Tensor], None]]:
    """(weights, a call on them); wrong sums end the bench.

    Activations are small enough for tables of 8 bits to be exact, so that the loop can be checked.
    """
    codes = torch.randint(0, 4, (n, k), dtype=torch.uint8)
    t = torch.randint(1, 64, (n, k // GROUP), dtype=torch.uint8)
    x = torch.randint(-31, 32, (k,))
    # [panels, groups, 16, 2 halves of k, 4 k, 2 vectors, 32 rows]
    parts = codes.view(n // 64, 2, 32, k // GROUP, 16, 2, 4).permute(0, 3, 4, 5, 6, 1, 2)
    place = (1 << torch.arange(4)).view(4, 1, 1)
    halves = [((parts >> plane & 1) * place).sum(4) for plane in (0, 1)]
    both = torch.stack([h[:, :, :, 0] | h[:, :, :, 1] << 4 for h in halves], -1).flatten(2)
    steps = t.view(n // 64, 64, -1).transpose(1, 2)
    blob = torch.cat([steps, both.to(torch.uint8)], 2).contiguous()
    chosen = (torch.arange(16).view(16, 1) >> torch.arange(4)) & 1
    shift = 124  # makes sums unsigned
    tables = (x.view(-1, 1, 4) * chosen).sum(-1).add(shift).to(torch.uint8).contiguous()
    out = torch.zeros(n, dtype=torch.int32)

    def call(weights: torch.Tensor) -> None:
        lib.lookup(weights.data_ptr(), tables.data_ptr(), n // 64, k // GROUP, out.data_ptr())

    call(blob)
    exact = (codes.view(n, -1, GROUP).long() * x.view(-1, GROUP)).sum(-1) + 3 * shift * GROUP // 4
    if not torch.equal(out.long(), (exact * t).sum(-1)):
        raise SystemExit("the lookup's sums are wrong: nothing was measured")
    return blob, call


def seconds(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """CPU seconds of one call each: medians of windows in turns."""
    turns, found = {}, {name: [] for name in calls}
    for name, call in calls.items():
        call()
        begin = time.thread_time()
        call()
        turns[name] = max(1, round(WINDOW / max(time.thread_time() - begin, 1e-6)))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            call()
            begin = time.thread_time()
            for _ in range(turns[name]):
                call()
            found[name].append((time.thread_time() - begin) / turns[name])
    return {name: statistics.median(times) for name, times in found.items()}


def main() -> None:
    """Check, measure, write."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    lib, rows = library(), []
    for place, (n, k) in SIZES.items():
        weight = packed(n, k, torch.full((n,), 2, dtype=torch.uint8))
        blob, call = lookup(n, k, lib)
        some = copies if place == "memory" else lambda t: [t]
        times = seconds(
            {
                "dot": over(some(weight.blob), ours(torch.randn(1, k), weight, None)),
                "lookup": over(some(blob), call),
            }
        )
        rows.append(
            {
                "weights in": place,
                "N": n,
                "K": k,
                "us, dot products": round(times["dot"] * 1e6, 1),
                "us, lookup": round(times["lookup"] * 1e6, 1),
                "GB/s, dot products": round(weight.blob.numel() / times["dot"] / 1e9, 1),
                "GB/s, lookup": round(blob.numel() / times["lookup"] / 1e9, 1),
                "lookup x": round(times["dot"] / times["lookup"], 2),
            }
        )
        Console().print(rows[-1])
    name = "rows of 2 bits from memory: lookup, x dot products (more: worth a kernel)"
    bar = Bar.at_most(name, rows[-1]["lookup x"], WORTH)
    extra = {"family": FAMILY, "mode": MODE, "threads": 1, "clock": "CPU time of the thread"}
    Console().print(write_results(__file__, rows, [bar], device="cpu", extra=extra).name)


if __name__ == "__main__":
    main()
