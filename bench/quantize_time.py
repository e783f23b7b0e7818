"""How long it takes to score, plan and quantize a model from a checkpoint to packed weights.

    python bench/quantize_time.py --model DIR --calibration FILE

The whole recipe: kfac scores of six widths on 16 sequences, a plan, another plan for another size,
then GPTQ with refit and descent on 64 sequences; everything is counted, capture included.
"""

from __future__ import annotations

import argparse
import resource
import time
from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from mixllm_compiler import plan, quantize, score
from mixllm_compiler.evaluation.text import read_windows
from mixllm_compiler.formats.row_format import WIDTHS
from results_io import Bar, write_results


def main(argv: list[str] | None = None) -> int:
    """Time each step once, print, write."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model = model.to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = read_windows(
        args.calibration, tokenizer, count=args.sequences, length=args.length, begin=False
    ).ids
    rows: list[dict[str, object]] = []
    ours = {"widths": WIDTHS, "family": "two-level", "rotate": 256}

    def timed(what: str, started: float, cpu: float) -> float:
        seconds = time.perf_counter() - started
        row = {"step": what, "seconds": round(seconds, 2)}
        rows.append({**row, "CPU seconds": round(time.process_time() - cpu, 2)})
        Console().print(rows[-1])
        return seconds

    begun = time.perf_counter(), time.process_time()
    scores = score(model, ids[: args.score_sequences], kind="kfac", **ours)  # type: ignore[arg-type]
    scoring = timed("score", *begun)
    now = time.perf_counter(), time.process_time()
    made = plan(scores, bits=4.4)
    timed("plan", *now)
    now = time.perf_counter(), time.process_time()
    plan(scores, bits=3.6)
    again = timed("plan again", *now)
    now = time.perf_counter(), time.process_time()
    quantize(model, made, ids, scores=scores)
    timed("quantize", *now)
    everything = timed("everything", *begun)
    name = args.model.resolve().name
    bars = [
        Bar.at_most(f"{name}: seconds from checkpoint to packed weights", everything, 480),
        Bar.at_most(f"{name}: seconds of scoring", scoring, 90),
        Bar.at_most(f"{name}: seconds of planning again", again, 2),
    ]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    extra = {"model": name, "threads": args.threads, "peak memory GB": round(peak, 2)}
    extra |= {"score tokens": args.score_sequences * args.length}
    extra |= {"calibration tokens": args.sequences * args.length}
    Console().print(write_results(__file__, rows, bars, device=args.device, extra=extra).name)
    return 0


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a causal LM of linear modules")
    add("--calibration", type=Path, required=True, help="text file")
    add("--score-sequences", type=int, default=16)
    add("--sequences", type=int, default=64, help="to quantize on")
    add("--length", type=int, default=1024, help="tokens of each")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="cpu or cuda")
    return parser.parse_args(argv)


if __name__ == "__main__":
    raise SystemExit(main())
