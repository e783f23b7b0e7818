"""Which variant of the CUDA kernels is fastest? Writes the table that ships for this GPU.

    python bench/tune_gemm.py           all sizes
    python bench/tune_gemm.py --shapes 64x32,448x32 --tokens 1,64

It is `mixllm tune` with Llama's shapes and the package's folder: see `lowering/cuda/tuning.py`. The
best of each problem goes into the package, the times of all to `bench/results`. A file beside the
results keeps what was timed, and the next call goes on from there; `--again` begins anew.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mixllm_compiler import __version__, runtime  # noqa: F401  kernels go into the build cache
from mixllm_compiler.lowering.cuda import dispatch, timed, timing, tuning
from results_io import RESULTS, write_results

TABLES = Path(dispatch.__file__).parent / "tables"


def main() -> None:
    """Time, write the table and the times."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--shapes", help="tiles x groups, comma between")
    parser.add_argument("--tokens", help="numbers, comma between")
    parser.add_argument("--without", nargs="*", default=[], help="regimes that are not timed")
    parser.add_argument("--again", action="store_true", help="begin anew")
    options = parser.parse_args()
    shapes = tuning.SHAPES
    if options.shapes:
        shapes = tuple(tuple(map(int, s.split("x"))) for s in options.shapes.split(","))
    tokens = tuning.TOKENS
    if options.tokens:
        tokens = tuple(map(int, options.tokens.split(",")))
    target = timing.available()
    path = RESULTS / f"{timed.file_name(target.name)}.tmp"
    made = tuning.tune(
        [tuning.mixed(*shape) for shape in shapes],
        tokens,
        target,
        torch.cuda.get_device_properties("cuda").multi_processor_count,
        timing.GpuTimer(),
        path,
        made_by=__version__,
        again=options.again,
        without=options.without,
    )
    for m, tiles, groups in made:
        table = timed.read(path, target)
        best = str(table.best[m, tiles, groups])
        us = table.times[m, tiles, groups][best]
        print(tiles, groups, m, best, f"{us:.2f}", flush=True)
    table = timed.read(path, target)
    rows = [
        {"tiles": tiles, "groups": groups, "tokens": m, "best": str(table.best[key]), **times}
        for key, times in sorted(table.times.items())
        for m, tiles, groups in [key]
    ]
    write_results(__file__, rows, [], device="cuda")
    table.times = {}
    table.save(TABLES / timed.file_name(target.name))
    path.unlink()


if __name__ == "__main__":
    main()
