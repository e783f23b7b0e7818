"""Where the time of a compilation goes: Dynamo, each of our passes, Inductor.

    python bench/compile_time.py [--layers 12 --hidden 512]

A Llama with random weights is compiled in a process of its own for every row: with an empty
Inductor cache (cold), with the cache which that left (warm), and with `lower="eager"`. It is
planned inside the compilation, on its example inputs, with rows and inputs as they are: asymmetric
rows of 4 and 8 bits, not rotated.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.table import Table

from results_io import ROOT, Bar, write_results

SCORING = "annotate-salience"
# (row, lowering, whether the Inductor cache of the row before is kept)
CASES = (
    ("Inductor, cold", "inductor", False),
    ("Inductor, warm", "inductor", True),
    ("eager", "eager", True),
)
SHARE = 0.10
PLAIN = {"family": "asym", "widths": (4, 8), "rotate": 0}


def main(argv: list[str] | None = None) -> int:
    """Measure every case in a process of its own, print, write."""
    args = _arguments(argv)
    if args.child:
        print(json.dumps(measure(args)))
        return 0
    console = Console(width=None if Console().is_terminal else 120)
    rows = []
    with tempfile.TemporaryDirectory(prefix="compile-time-") as folder:
        cache = 0
        for label, lower, keep in CASES:
            cache += not keep
            with console.status(label):
                rows.append({"case": label, **in_child(args, lower, f"{folder}/{cache}")})
    bars = bars_of(rows)
    shape = f"{args.layers} layers, hidden {args.hidden}, {args.tokens} tokens"
    console.print(write_results(__file__, rows, bars, device="cpu", extra={"model": shape}).name)
    show(console, shape, rows, bars)
    return 0


def in_child(args: argparse.Namespace, lower: str, cache: str) -> dict[str, Any]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--child", "--lower", lower]
    for key in ("layers", "hidden", "tokens", "threads"):
        command += [f"--{key}", str(getattr(args, key))]
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[1:])} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


class Stopwatch:
    """Wraps functions and adds up the seconds spent in each."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watch(self, owner: Any, name: str) -> None:
        """Time every call of `owner.name` from now on."""
        inner: Callable[..., Any] = getattr(owner, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                spent = time.perf_counter() - started
                self.seconds[name] = self.seconds.get(name, 0.0) + spent

        setattr(owner, name, watched)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Compile and run once, in this process."""
    started = time.perf_counter()
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from mixllm_compiler import backend, compat
    from mixllm_compiler.runtime import records

    imported = time.perf_counter() - started
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=args.hidden,
        intermediate_size=128 * round(args.hidden * 8 / 3 / 128),
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // 64,
        num_key_value_heads=max(1, args.hidden // 128),
        max_position_embeddings=max(2048, args.tokens),
    )
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(config.vocab_size, (1, args.tokens))
    watch = Stopwatch()
    watch.watch(backend, "_compile")
    watch.watch(compat, "compile_with_inductor")
    options = {**PLAIN, "lower": args.lower, "quiet": True}
    compiled = torch.compile(model, backend="mixllm", options=options, dynamic=False)
    with torch.no_grad(), records.collect() as graphs:
        first = timed(lambda: compiled(ids, use_cache=False))
        run = min(timed(lambda: compiled(ids, use_cache=False)) for _ in range(3))
    (graph,) = graphs
    assert len(graph.quantized) == 7 * args.layers, "a decoder linear stayed float"
    passes = {name: round(seconds, 3) for name, _, _, seconds in graph.passes}
    total = first - run
    inductor = watch.seconds.get("compile_with_inductor", 0.0)
    inside = watch.seconds["_compile"]
    scoring = passes[SCORING]
    return {
        "total s": round(total, 2),
        "dynamo s": round(total - inside, 2),
        # Everything of ours: the passes, capture, guards, records.
        "own s": round(inside - inductor - scoring, 2),
        "scoring s": round(scoring, 2),
        "inductor s": round(inductor, 2),
        "inductor share": round(inductor / total, 3),
        "import s": round(imported, 2),
        "run s": round(run, 3),
        "score": graph.score,
        "passes": passes,
    }


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def bars_of(rows: list[dict[str, Any]]) -> list[Bar]:
    """Our own share of a cold compilation."""
    cold = rows[0]
    share = cold["own s"] / cold["total s"]
    return [Bar.at_most("own passes without scoring / cold compilation", share, SHARE)]


def show(console: Console, shape: str, rows: list[dict[str, Any]], bars: list[Bar]) -> None:
    """Two tables: the parts of each compilation, and the passes one by one."""
    parts = ("total s", "dynamo s", "own s", "scoring s", "inductor s", "import s")
    table = Table("case", title=f"Seconds to compile a Llama of {shape}")
    for part in parts:
        table.add_column(part.removesuffix(" s"), justify="right")
    for row in rows:
        table.add_row(row["case"], *(f"{row[part]:.2f}" for part in parts))
    console.print(table)
    table = Table("pass", title="Seconds of each pass")
    for row in rows:
        table.add_column(row["case"], justify="right")
    for name in rows[0]["passes"]:
        table.add_row(name, *(f"{row['passes'][name]:.3f}" for row in rows))
    console.print(table)
    for bar in bars:
        met = "met   " if bar.met else "MISSED"
        console.print(f"{met} {bar.name}: {bar.measured:.3f} (target {bar.target})")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--layers", type=int, default=12)
    add("--hidden", type=int, default=512, help="a multiple of 128")
    add("--tokens", type=int, default=640, help="example inputs, which are also scored on")
    add("--threads", type=int, default=2)
    add("--lower", default="inductor", help=argparse.SUPPRESS)
    add("--child", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
