"""What this CPU can do at best, measured beside what is to be judged by it.

    peaks = Peaks(threads=2)
    windows = peaks.measure({"ours": call, "theirs": other})

A *window* is some milliseconds of one call between two runs of a loop of dot products that touches
no memory. It counts only if both ran within 3 % of the best that this loop reached in the whole
process, and if nobody took a core from us in the meantime, which the system counts: then the cores
were ours. One thread alone is timed by its own clock instead, which stands still meanwhile. Calls
take turns, so that slow minutes meet all of them.
"""

from __future__ import annotations

import itertools
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

import mixllm_compiler.runtime  # noqa: F401  installs the build cache
from mixllm_compiler.lowering.cpp import compiler, isa
from mixllm_compiler.lowering.cpp.layout import on_huge_pages

QUIET = 0.97
WINDOWS = 5
WINDOW_SECONDS = 1e-3
_LOOP = 20_000

_SOURCE = r"""
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <time.h>
#define A(i) DOT(i)
#define ALL A(0) A(1) A(2) A(3) A(4) A(5) A(6) A(7) A(8) A(9) A(10) A(11)
#define LOW(x) x "0", x "1", x "2", x "3", x "4", x "5", x "6", x "7"
#define USED(x) LOW(x), x "8", x "9", x "10", x "11", x "13", x "14", x "15"
#if defined(__AVX512VNNI__)
#define DOT(i) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #i "\n"
constexpr double EACH = 12 * 128;
#define REGISTERS USED("zmm")
#elif defined(__AVXVNNI__)
#define DOT(i) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #i "\n"
constexpr double EACH = 12 * 64;
#define REGISTERS USED("ymm")
#else
#define DOT(i) "vpmaddubsw %%ymm14, %%ymm15, %%ymm13\n vpaddw %%ymm13, %%ymm" #i ", %%ymm" #i "\n"
constexpr double EACH = 12 * 64;
#define REGISTERS USED("ymm")
#endif
#define EXPORT extern "C" __attribute__((visibility("default")))
// Seconds: of a lone thread its own, which nobody takes away.
static double now(int threads) {
  timespec t;
  clock_gettime(threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}
// Operations a second: the slowest thread's, times all.
EXPORT double peak(int threads, long turns) {
  double worst = 0;
#pragma omp parallel num_threads(threads)
  {
    const double begin = now(threads);
    for (long i = 0; i < turns; i++) asm volatile(ALL ::: REGISTERS);
    const double took = now(threads) - begin;
#pragma omp critical
    if (took > worst) worst = took;
  }
  return threads * turns * EACH / worst;
}
EXPORT void read_once(const char* data, long bytes, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const long each = bytes / threads;
    const char* p = data + each * omp_get_thread_num();
    __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a;
    for (long i = 0; i + 128 <= each; i += 128) {
      a = _mm256_or_si256(a, _mm256_loadu_si256((const __m256i*)(p + i)));
      b = _mm256_or_si256(b, _mm256_loadu_si256((const __m256i*)(p + i + 32)));
      c = _mm256_or_si256(c, _mm256_loadu_si256((const __m256i*)(p + i + 64)));
      d = _mm256_or_si256(d, _mm256_loadu_si256((const __m256i*)(p + i + 96)));
    }
    a = _mm256_or_si256(_mm256_or_si256(a, b), _mm256_or_si256(c, d));
    asm volatile("" ::"x"(a));
  }
}
"""


def _times_taken_away() -> int:
    """How often a thread of this process lost its core to another process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median of the quiet windows, and how many there were.

    With fewer than three quiet windows it is the fastest third of all, and `quiet` tells.
    """

    seconds: float
    quiet: int


class Peaks:
    """The calibration loops of one number of threads."""

    def __init__(self, threads: int) -> None:
        import ctypes

        self.threads = threads
        self._clock = time.thread_time if threads == 1 else time.perf_counter
        self._lib = compiler.library(_SOURCE, "bench-peaks", isa.current())
        self._lib.peak.restype = ctypes.c_double
        self._lib.peak.argtypes = [ctypes.c_int, ctypes.c_long]
        self._lib.read_once.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
        self.best = max(self._peak() for _ in range(100))
        self._memory = torch.empty(256 << 20, dtype=torch.uint8)
        on_huge_pages(self._memory)  # as packed weights are
        self._memory.fill_(1)

    def _peak(self) -> float:
        return self._lib.peak(self.threads, _LOOP)

    def reading(self, size: int) -> Callable[[], object]:
        """A call in which all threads together read so many bytes from memory, others each time."""
        places = itertools.cycle(range(0, self._memory.numel() - size + 1, size))
        start = self._memory.data_ptr()
        return lambda: self._lib.read_once(start + next(places), size, self.threads)

    def measure(
        self, calls: Mapping[str, Callable[[], object]], limit: float = 20.0
    ) -> dict[str, Timing]:
        """Time the calls in turns until each has its quiet windows or `limit` seconds are over."""
        turns = {}
        for name, call in calls.items():
            call()
            begin = self._clock()
            call()
            took = self._clock() - begin
            turns[name] = max(1, min(200, round(WINDOW_SECONDS / max(took, 1e-6))))
        quiet: dict[str, list[float]] = {name: [] for name in calls}
        loud: dict[str, list[float]] = {name: [] for name in calls}
        until = time.perf_counter() + limit
        while min(map(len, quiet.values())) < WINDOWS and time.perf_counter() < until:
            for name, call in calls.items():
                for _ in range(turns[name]):
                    call()  # what the others left in the caches is not this one's
                taken = _times_taken_away()
                before = self._peak()
                begin = self._clock()
                for _ in range(turns[name]):
                    call()
                took = (self._clock() - begin) / turns[name]
                after = self._peak()
                self.best = max(self.best, before, after)
                ours = self.threads == 1 or taken == _times_taken_away()
                counts = ours and min(before, after) >= QUIET * self.best
                (quiet if counts else loud)[name].append(took)
        found = {}
        for name in calls:
            if len(quiet[name]) >= 3:
                seconds = statistics.median(quiet[name])
            else:
                every = sorted(quiet[name] + loud[name])
                seconds = statistics.median(every[: max(1, len(every) // 3)])
            found[name] = Timing(seconds, len(quiet[name]))
        return found
