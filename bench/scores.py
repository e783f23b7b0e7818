"""How much text a gradient score needs before it ranks rows better than their weight error.

    python bench/scores.py --model DIR --calibration FILE --text FILE

Plans at one size, made from `fisher-sequence` scores on more and more text, against the plan
made from weight errors, which needs no text. Only weights are quantized here (round to nearest),
activations stay float: what differs between plans is which rows got which width.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mixllm_compiler import Plan, plan, score
from mixllm_compiler.evaluation.measure import compare, kl_ratio, mean
from mixllm_compiler.evaluation.text import Windows, read_windows
from mixllm_compiler.passes.annotate_salience import MIN_TOKENS
from mixllm_compiler.quantizers.rtn import quantize_rtn
from results_io import Bar, write_results

BASELINE = "weight-error"
# (sequences, tokens of each): as many tokens in one sequence and in several.
GRID = ((1, 33), (1, 129), (1, 513), (1, 1024), (4, 33), (4, 129), (8, 65), (4, 513), (8, 513))


def main(argv: list[str] | None = None) -> int:
    """Score, plan, measure, print, write."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    console = Console(width=None if Console().is_terminal else 100)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    test = read_windows(args.text, tokenizer, count=args.windows, length=args.window)
    text = read_windows(args.calibration, tokenizer, length=max(length for _, length in GRID)).ids

    baseline = measure(model, make(model, text[:1], BASELINE, args), test)
    rows = []
    for sequences, length in GRID:
        for draw in range(args.draws):
            # Other documents for every draw: windows far apart.
            start = draw * len(text) // args.draws
            ids = text[start : start + sequences, :length]
            with console.status(f"{sequences} × {length} tokens, draw {draw}"):
                quality = measure(model, make(model, ids, "fisher-sequence", args), test)
                torch._dynamo.reset()  # every shape is a graph of its own
            ratio = kl_ratio(quality, baseline)
            rows.append(
                {
                    "sequences": sequences,
                    "supervised tokens": sequences * (length - 1),
                    "draw": draw,
                    "KL": float(f"{quality.mean_kl.value:.4g}"),
                    "KL / weight error": round(ratio.value, 4),
                    "se": round(ratio.se, 4),
                }
            )
    enough = [row["KL / weight error"] for row in rows if row["supervised tokens"] >= MIN_TOKENS]
    worst = max(enough, default=math.nan)
    title = f"KL of plans from {MIN_TOKENS} supervised tokens or more / from weight error, worst"
    bars = [Bar.at_most(title, worst, 1.0)]
    extra = {"model": args.name or args.model.resolve().name, "bits": args.bits}
    extra |= {"widths": args.widths, "KL of the weight-error plan": baseline.mean_kl.value}
    console.print(write_results(__file__, rows, bars, device="cpu", extra=extra).name)
    show(console, rows, bars)
    return 0


def make(model: PreTrainedModel, ids: torch.Tensor, kind: str, args: argparse.Namespace) -> Plan:
    """The knapsack's plan from scores of one kind."""
    plain = {"family": "asym", "rotate": 0}
    return plan(score(model, ids, kind=kind, widths=args.widths, **plain), bits=args.bits)


def measure(model: PreTrainedModel, made: Plan, test: Windows) -> Any:
    """Quality of the model with its weights rounded as planned."""
    return compare(model, {"": rounded(model, made)}, test)[""]


def rounded(model: PreTrainedModel, made: Plan) -> Callable[..., Any]:
    """The model with quantized, then dequantized weights."""
    weights = {}
    for name, site in made.sites.items():
        weight = model.get_submodule(name).weight.detach()
        quantized = quantize_rtn(weight, site.widths, site.group)
        weights[f"{name}.weight"] = quantized.dequantize(torch.float32)

    def call(input_ids: torch.Tensor) -> Any:
        return torch.func.functional_call(model, weights, (input_ids,), {"use_cache": False})

    return call


def show(console: Console, rows: list[dict[str, Any]], bars: list[Bar]) -> None:
    """One line for each amount of text, the mean over draws."""
    table = Table("sequences", "supervised tokens", "KL / weight error", "draws")
    amounts = dict.fromkeys((row["sequences"], row["supervised tokens"]) for row in rows)
    for sequences, tokens in amounts:
        mine = [r for r in rows if (r["sequences"], r["supervised tokens"]) == (sequences, tokens)]
        ratios = [row["KL / weight error"] for row in mine]
        draws = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        table.add_row(str(sequences), str(tokens), f"{mean(ratios).value:.3f}", draws)
    console.print(table)
    for bar in bars:
        met = "met   " if bar.met else "MISSED"
        console.print(f"{met} {bar.name}: {bar.measured:.3f} (target {bar.target})")


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a causal LM of linear modules")
    add("--calibration", type=Path, required=True, help="text file to score on")
    add("--text", type=Path, required=True, help="text file to measure on")
    add("--name", help="of the model in the results; by default the folder's name")
    add("--bits", type=float, default=4.4)
    add("--widths", default="4,8", help="candidate bits of rows")
    add("--draws", type=int, default=3, help="calibration texts for each amount")
    add("--windows", type=int, default=6, help="of the text to measure on")
    add("--window", type=int, default=512, help="tokens of each")
    add("--threads", type=int, default=2)
    args = parser.parse_args(argv)
    args.widths = tuple(int(bits) for bits in args.widths.split(","))
    return args


if __name__ == "__main__":
    raise SystemExit(main())
