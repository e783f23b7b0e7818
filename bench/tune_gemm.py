"""Which variant of the CUDA kernels is fastest? Writes the dispatcher's table for this GPU.

    python bench/tune_gemm.py           all sizes
    python bench/tune_gemm.py --shapes 64x32,448x32 --tokens 1,64

Every candidate is checked against another variant's result, bit for bit, before it is timed: by
graph replay over weights larger than the cache. The mix of widths is that of `row_mix.json`. Times
go to `bench/results`, the best of each problem into the package.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch

from gpu_timing import capture, copies
from mixed_linears import MixedLinear, random_weight
from mixllm_compiler.errors import LoweringError
from mixllm_compiler.formats.layout import pack
from mixllm_compiler.lowering import sources
from mixllm_compiler.lowering.cuda import dispatch, launch
from mixllm_compiler.lowering.cuda.cost import Problem
from mixllm_compiler.lowering.cuda.variants import Variant
from mixllm_compiler.lowering.target import Target
from mixllm_compiler.runtime import build
from results_io import write_results

SHAPES = ((64, 32), (448, 32), (96, 32), (64, 112), (128, 224), (16, 32), (32, 32), (224, 32))
"""(tiles of 64 rows, groups of 128 along K)"""

TOKENS = (1, 4, 8, 12, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096)
SHARES = {2: 0.04, 3: 0.21, 4: 0.42, 5: 0.20, 6: 0.08, 8: 0.05}
BETTER = 0.99  # another variant than the cost model's must be faster by this factor
TABLES = Path(dispatch.__file__).parent / "tables"


def row_counts(tiles: int) -> dict[int, int]:
    """Tiles of each width, of about the mix's shares."""
    widths = [b for b, share in SHARES.items() for _ in range(max(1, round(share * tiles)))]
    widths = sorted((widths + [4] * tiles)[:tiles])
    return {bits: widths.count(bits) for bits in sorted(set(widths))}


def make(tiles: int, groups: int) -> MixedLinear:
    """A matrix of so many tiles, rows at random."""
    counts = row_counts(tiles)
    rows = torch.tensor([b for b, n in counts.items() for _ in range(64 * n)], dtype=torch.uint8)
    weight = random_weight(rows[torch.randperm(len(rows))], groups * 128)
    packed = pack(weight, "cuda64.v1")
    return MixedLinear(weight, packed.layout, copies(packed.blob))


def time_variants(
    linear: MixedLinear, m: int, target: Target, without: list[str]
) -> dict[str, float]:
    """µs of every candidate that runs here."""
    x = torch.randn(m, linear.layout.k, device="cuda").bfloat16()
    activation = linear.quantize(x)
    blobs = linear.blobs if m <= 256 else linear.blobs[:4]
    with launch.trying(Variant("mma", (64, 4))):
        expected = linear.gemm(activation, linear.blobs[0])
    found = {}
    for variant in dispatch.candidates(m, target):
        if variant.regime in without:
            continue
        with launch.trying(variant):
            try:
                y = linear.gemm(activation, linear.blobs[0])
            except LoweringError as error:
                print(f"{variant}: {error}")
                continue
            if not torch.equal(y, expected):
                print(f"{variant} is WRONG at M = {m}, '{linear.layout}'")
                continue
            run = capture(lambda blob: linear.gemm(activation, blob), blobs, 1e-3)
            found[str(variant)] = min(run() for _ in range(3)) * 1e6
    return found


def main() -> None:
    """Time, write the table and the times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", help="tiles x groups, comma between")
    parser.add_argument("--tokens", help="numbers, comma between")
    parser.add_argument("--without", nargs="*", default=[], help="regimes that are not timed")
    options = parser.parse_args()
    sources.use_store(build.materialize, build.build)
    shapes = SHAPES
    if options.shapes:
        shapes = tuple(tuple(map(int, s.split("x"))) for s in options.shapes.split(","))
    tokens = tuple(map(int, options.tokens.split(","))) if options.tokens else TOKENS
    target = Target.of("cuda")
    count = torch.cuda.get_device_properties(0).multi_processor_count
    rows: list[dict[str, Any]] = []
    entries: list[tuple[int, int, int, str]] = []
    for tiles, groups in shapes:
        linear = make(tiles, groups)
        for m in tokens:
            times = time_variants(linear, m, target, options.without)
            best = min(times, key=times.__getitem__)
            cheap = str(dispatch.by_cost(m, Problem.of(linear.layout), target, count))
            if cheap in times and times[best] > BETTER * times[cheap]:
                best = cheap
            entries.append((m, tiles, groups, best))
            rows.append({"tiles": tiles, "groups": groups, "tokens": m, "best": best, **times})
            print(tiles, groups, m, best, f"{times[best]:.2f}", flush=True)
        write(target, entries, rows)


def write(
    target: Target, entries: list[tuple[int, int, int, str]], rows: list[dict[str, Any]]
) -> None:
    """The table and the times of what was timed until now."""
    slug = re.sub(r"[^a-z0-9]+", "-", target.name.lower()).strip("-")
    lines = ",\n".join(f"    {json.dumps(entry)}" for entry in sorted(entries))
    TABLES.mkdir(exist_ok=True)
    (TABLES / f"{slug}.json").write_text(f'{{\n  "entries": [\n{lines}\n  ]\n}}\n')
    write_results(__file__, rows, [], device="cuda")


if __name__ == "__main__":
    main()
