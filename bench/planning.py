"""How long a plan takes, how much memory, and how close to the best plan it is.

    python bench/planning.py

Models of random scores: the shapes of a 70B Llama with as many layers as make ten million rows,
and of wiki-88m, whose plans are made again and again. A row's loss at the lowest width is
log-normal around its matrix's median, falls about fourfold a bit, and is 7 % larger in groups twice
as long. Every case runs in a process of its own, so that its peak memory is its own; making the
scores is not timed, but in the peak. Where other work shares the cores, the CPU seconds of the one
thread say more than the clock.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from typing import Any

import torch
from rich.console import Console

from mixllm_compiler.allocation.allocate import make_plan
from mixllm_compiler.formats.fingerprint import Fingerprint, MatrixPrint
from mixllm_compiler.options import Options
from mixllm_compiler.salience.scores import Scores
from results_io import Bar, write_results

# layers, hidden, key and value, intermediate
MODELS = {
    "70B": (80, 8192, 1024, 28672),
    "70B, 120 layers": (120, 8192, 1024, 28672),
    "wiki-88m": (12, 768, 256, 2048),
}
TILES: dict[str, dict[str, Any]] = {
    "rows": {"tile": 1},
    "tiles": {},
    "tiles, tp=8": {"tp": 8},
    "tiles, 2 widths a layer": {"formats_per_layer": 2},
    "tiles, by KL": {},
    "tiles, two group sizes": {},
}
CASES = [
    ("70B, 120 layers", "rows"),
    ("70B, 120 layers", "tiles"),
    ("70B, 120 layers", "tiles, two group sizes"),
    ("70B", "rows"),
    *(("70B", way) for way in list(TILES)[1:]),
    *(("wiki-88m", way) for way in TILES if way != "tiles, tp=8"),
]
BITS = 4.4


def main(argv: list[str] | None = None) -> int:
    """Run every case in a process of its own; write the results."""
    args = _arguments(argv)
    if args.case:
        print(json.dumps(measure(*args.case, args.threads)))
        return 0
    console = Console()
    rows = []
    for case in CASES:
        with console.status(", ".join(case)):
            command = [sys.executable, __file__, "--threads", str(args.threads), "--case", *case]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout))
        console.print(rows[-1])
    by_case = {(row["model"], row["of"]): row for row in rows}
    bars = [
        Bar.at_most(f"CPU seconds to plan ten million rows, {way}", case["CPU s"], 60)
        for way in ("rows", "tiles", "tiles, two group sizes")
        if (case := by_case["70B, 120 layers", way])
    ]
    bars += [
        Bar.at_most("seconds to plan wiki-88m again, tiles", by_case["wiki-88m", "tiles"]["s"], 2),
        Bar.at_most(
            "largest gap to the bound, any number of widths",
            max(row["gap"] for row in rows if "formats_per_layer" not in TILES[row["of"]]),
            1e-4,
        ),
    ]
    print(write_results(__file__, rows, bars, device="cpu", extra={"threads": args.threads}).name)
    return 0


def measure(model: str, of: str, threads: int) -> dict[str, Any]:
    """Seconds, peak memory and gap of one plan."""
    torch.set_num_threads(threads)
    scores = random_scores(*MODELS[model], spans=(1, 2) if "sizes" in of else (1,))
    scored = _peak()
    budget: dict[str, Any] = {"bits": BITS}
    if of == "tiles, by KL":
        budget = {"kl": make_plan(scores, bits=BITS).predicted_loss}
    start, worked = time.perf_counter(), time.process_time()
    plan = make_plan(scores, **budget, **TILES[of])
    seconds, worked = time.perf_counter() - start, time.process_time() - worked
    assert plan.certificate is not None
    return {
        "model": model,
        "of": of,
        "rows": sum(n for n, _ in scores.shapes.values()),
        "formats": len(scores.formats),
        "s": round(seconds, 2),
        "CPU s": round(worked, 2),
        "peak GB": round(_peak(), 2),
        "of it scores GB": round(scored, 2),
        "true bits": round(plan.true_bits, 4),
        "gap": plan.certificate.gap,
    }


def random_scores(
    layers: int, hidden: int, kv: int, intermediate: int, spans: tuple[int, ...], seed: int = 0
) -> Scores:
    """Scores of a Llama of these sizes, in groups of 128 times `spans`."""
    formats = Options(spans=spans).formats
    shapes = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    names = {f"model.layers.{i}.{part}.weight": part for i in range(layers) for part in shapes}
    draw = torch.Generator().manual_seed(seed)
    bits = torch.tensor([f.bits for f in formats])
    longer = torch.tensor([1 + 0.07 * math.log2(f.group / 128) for f in formats])
    loss = {}
    for name, part in names.items():
        median = torch.randn(1, generator=draw) - 12
        scale = torch.exp(median + 1.5 * torch.randn(shapes[part][0], 1, generator=draw))
        noise = torch.exp(0.1 * torch.randn(shapes[part][0], len(formats), generator=draw))
        loss[name] = scale * noise * longer * 4.0 ** (2 - bits)
    group = {"q": "qkv", "k": "qkv", "v": "qkv", "gate": "gate_up", "up": "gate_up"}
    heads = {name: part.split(".")[1].removesuffix("_proj") for name, part in names.items()}
    return Scores(
        kind="random",
        formats=formats,
        loss=loss,
        shapes={name: shapes[part] for name, part in names.items()},
        fingerprint=Fingerprint(
            {name: MatrixPrint(*shapes[part], "bfloat16", name) for name, part in names.items()}
        ),
        siblings={
            name: f"{name.split('.')[2]}.{group[head]}"
            for name, head in heads.items()
            if head in group
        },
    )


def _peak() -> float:
    """Largest resident memory of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--case", nargs=2, metavar=("MODEL", "OF"), help="one case; prints JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
