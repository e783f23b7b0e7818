"""Does any variant of the CUDA kernels hang or slip? A million launches, others between them.

    python bench/stress_gemm.py                       a million launches, shared by all variants
    python bench/stress_gemm.py --launches 20000      fewer
    python bench/stress_gemm.py --variants middle:64,6,2,0,2,1,2 prefill:256,3,4

Each variant that the dispatcher can choose runs on small matrices of six widths at random
numbers of tokens, with overlap, in bursts; between its launches other programs' kernels run at
random: memsets, copies, waits, products, our quantizers. Every so often the outputs of a burst are
compared with the portable kernel's, bit for bit. Another process watches: a burst that does not
end is a hang, and the variant and its last problem are named. Exit code 1 for a hang or a slip.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import random
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mixllm_compiler import runtime  # noqa: F401  kernels go into the build cache
from mixllm_compiler.formats.layout import pack
from mixllm_compiler.formats.row_format import WIDTHS
from mixllm_compiler.lowering.cuda import dispatch, launch, timing
from mixllm_compiler.lowering.cuda.generate import VERSION, LinearSpec
from mixllm_compiler.lowering.cuda.variants import Variant
from mixllm_compiler.lowering.lowered import LOWERED_LINEAR, LOWERED_QUANTIZE
from mixllm_compiler.lowering.target import Target
from results_io import Bar, write_results

LAUNCHES = 1_000_000
BURST = 100  # launches between two looks at the device
COMPARED = 10  # every so many bursts the outputs are compared
PATIENCE = 60.0  # seconds for a burst
SIZES = ((70, 97), (200, 256), (900, 896), (4096, 4096), (1100, 4133), (9600, 384))
"""(N, K): fewer and more groups than the pipelines have stages, tiles than there are CTAs."""


@dataclass
class Matrix:
    """A packed matrix of all six widths, scattered."""

    blob: Tensor
    layout: str
    k: int

    @classmethod
    def of(cls, n: int, k: int) -> Matrix:
        widths = torch.tensor(WIDTHS, dtype=torch.uint8)[torch.randperm(n) % len(WIDTHS)]
        packed = pack(timing.random_weight(widths, k, "cuda"), "cuda64.v1")
        return cls(packed.blob, str(packed.layout), k)

    def run(self, activation: Any) -> Tensor:
        y: Tensor = LOWERED_LINEAR(
            *activation, self.blob, None, self.layout, torch.bfloat16, VERSION
        )
        return y


def most_tokens(variant: Variant) -> int:
    """How many tokens it may get here."""
    if variant.regime in ("decode", "staged"):
        return variant.tokens
    return min(2100, 5 * variant.tokens + 3)


def foreign(draw: random.Random, x: Tensor, square: Tensor) -> None:
    """One thing that other programs do between our kernels."""
    which = draw.randrange(6)
    if which == 0:
        torch.zeros(draw.randrange(1, 1 << 16), device="cuda")
    elif which == 1:
        x.clone()
    elif which == 2:
        torch.cuda._sleep(draw.randrange(1, 20_000))
    elif which == 3:
        square @ square
    elif which == 4:
        LOWERED_QUANTIZE(x, "token", 128, draw.choice((0, 128)), VERSION)
    else:
        x.float().softmax(-1)


def stress(variant: Variant, matrices: list[Matrix], launches: int, seed: int, told: Any) -> int:
    """Launch a variant so often; the number of outputs that differed from the portable kernel's."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    square = torch.randn(256, 256, device="cuda").bfloat16()
    wrong, done, burst = 0, 0, 0
    while done < launches:
        matrix = draw.choice(matrices)
        m = draw.randint(1, most_tokens(variant))
        told.put((str(variant), done, m, matrix.layout))
        x = torch.randn(m, matrix.k, device="cuda").bfloat16()
        compare, ys = burst % COMPARED == 0, []
        with launch.trying(variant):
            activation = LOWERED_QUANTIZE(x, "token", 128, 0, VERSION)
            for _ in range(min(BURST, launches - done)):
                if draw.random() < 0.3:
                    foreign(draw, x, square)
                y = matrix.run(activation)
                done += 1
                if compare and len(ys) < 8:
                    ys.append(y)
        if compare:
            with launch.trying(timing.JUDGE):
                expected = matrix.run(activation)
            wrong += sum(not torch.equal(y, expected) for y in (*ys, y))
        torch.cuda.synchronize()
        burst += 1
    told.put((str(variant), done, 0, ""))
    return wrong


def work(variants: list[str], launches: int, seed: int, told: Any, results: Any) -> None:
    """The process that launches."""
    parsed = [Variant.parse(text) for text in variants]
    launch.compile_ahead(LinearSpec(WIDTHS, torch.bfloat16, v) for v in (*parsed, timing.JUDGE))
    matrices = [Matrix.of(*size) for size in SIZES]
    for variant in parsed:
        start = time.monotonic()
        try:
            wrong: Any = stress(variant, matrices, launches, seed, told)
        except Exception as error:  # noqa: BLE001  reported, and the context may be lost
            results.put((str(variant), f"{type(error).__name__}: {error}"[:300], 0.0))
            return
        results.put((str(variant), wrong, time.monotonic() - start))


def watch(variants: list[str], launches: int, seed: int, seconds: float) -> list[dict[str, Any]]:
    """Rows of the table: every variant, what came of it. One that hangs or fails ends a process."""
    context = multiprocessing.get_context("spawn")
    rows: list[dict[str, Any]] = []
    left = list(variants)
    while left:
        told, results = context.Queue(), context.Queue()
        worker = context.Process(target=work, args=(left, launches, seed, told, results))
        worker.start()
        last, heard = (left[0], 0, 0, "starting"), time.monotonic()
        patience = 10 * seconds  # the first burst waits for the compiler
        while True:
            try:
                while True:
                    last = told.get_nowait()
                    heard, patience = time.monotonic(), seconds
            except queue.Empty:
                pass
            try:
                name, outcome, took = results.get(timeout=0.2)
            except queue.Empty:
                quiet = time.monotonic() - heard
                if worker.is_alive() and quiet < patience:
                    continue
                name = last[0] if last[0] in left else left[0]
                what = f"hung for {quiet:.0f} s" if worker.is_alive() else "its process died"
                outcome, took = f"{what} after {last[1]} launches, M = {last[2]}, {last[3]}", 0.0
            failed = isinstance(outcome, str)
            rows.append(
                {
                    "variant": name,
                    "launches": last[1] if failed else launches,
                    "wrong": None if failed else outcome,
                    "failed": outcome if failed else "",
                    "seconds": took,
                }
            )
            print(rows[-1], flush=True)
            left.remove(name)
            heard = time.monotonic()
            if failed or not left:
                break
        worker.join(5)
        if worker.is_alive():
            worker.kill()
            worker.join()
    return rows


def main() -> int:
    """Launch, watch, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--launches", type=int, default=LAUNCHES, help="of all variants together")
    parser.add_argument("--variants", nargs="*", help="only these")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(2), "little"))
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds for a burst")
    options = parser.parse_args()
    timing.available()
    target = Target.of("cuda")
    variants = options.variants or sorted(map(str, dispatch.shipped(target)))
    each = -(-options.launches // len(variants))
    print(f"{len(variants)} variants, {each} launches each, seed {options.seed}", flush=True)
    rows = watch(variants, each, options.seed, options.patience)
    total = sum(row["launches"] for row in rows)
    bars = [
        Bar.at_least("launches of shipped variants", total, LAUNCHES),
        Bar.exactly("variants that hung or failed", sum(bool(r["failed"]) for r in rows), 0),
        Bar.exactly("outputs that differ", sum(r["wrong"] or 0 for r in rows), 0),
    ]
    for bar in bars:
        print(f"{'met   ' if bar.met else 'MISSED'} {bar.name}: {bar.measured} {bar.target}")
    if not options.variants and options.launches >= LAUNCHES:
        extra = {"seed": options.seed, "sizes": SIZES}
        print("written:", write_results(__file__, rows, bars, device="cuda", extra=extra).name)
    return int(not all(bar.met for bar in bars[1:]))


if __name__ == "__main__":
    raise SystemExit(main())
