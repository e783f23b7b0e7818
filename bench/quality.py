"""What each way to spend bits costs in quality, on text that was not calibrated on.

    python bench/quality.py --model DIR --texts DIR --calibration FILE

Rows: the float model, uniform 8 and 4 bits, the paper's rule (10 % of the output features at 8
bits), the byte-true knapsack at the very same size, and, for information, all widths at that
size. Weights are rounded to nearest, activations are int8 per group, and every quantized model
runs through `torch.compile(backend="mixllm")`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mixllm_compiler import Plan, score
from mixllm_compiler.allocation.allocate import make_plan, uniform_plan
from mixllm_compiler.evaluation.measure import Estimate, Quality, compare, kl_ratio
from mixllm_compiler.evaluation.text import read_windows
from mixllm_compiler.formats.row_format import WIDTHS
from mixllm_compiler.frames import own_frame
from mixllm_compiler.options import Options
from mixllm_compiler.runtime import records
from results_io import Bar, write_results

TEXTS = ("wikitext2_test", "gutenberg_test")
PAPER, KNAPSACK = "paper, 10 % at 8", "knapsack {4,8}"


@dataclass(frozen=True)
class Size:
    """What a quantized model takes, measured on its packed tensors."""

    true_bits: float
    resident_bits: float
    linears_mb: float
    file_mb: float
    file_bits: float


def main(argv: list[str] | None = None) -> int:
    """Score, plan, measure, print; write the results unless `--quick`."""
    args = _arguments(argv)
    torch.set_num_threads(args.threads)
    console = Console(width=None if Console().is_terminal else 140)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    model = model.to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    name = args.name or args.model.resolve().name

    started = time.perf_counter()
    plans = make_plans(model, args, console)
    planned = time.perf_counter()
    models = {label: compiled(model, plan) for label, plan in plans.items()}
    with records.collect() as graphs:
        qualities = {
            text: measure(model, tokenizer, models, text, count, args)
            for text, count in zip(TEXTS, args.windows, strict=True)
        }
    sizes = {label: size_of(model, args.model, plan, graphs) for label, plan in plans.items()}
    rows = [
        row
        for text, found in qualities.items()
        for row in rows_of(text, found, plans, sizes, float_size(model, args.model))
    ]
    bars = bars_of(name, qualities, plans, sizes)
    if not args.quick:
        extra = {
            "calibration": args.calibration.name,
            "calibration tokens": args.sequences * args.length,
            "window": args.window,
            "windows": dict(zip(TEXTS, args.windows, strict=True)),
            "seconds of scoring": round(planned - started, 1),
            "seconds of measuring": round(time.perf_counter() - planned, 1),
        }
        console.print(
            write_results(f"quality-{name}", rows, bars, device=args.device, extra=extra).name
        )
    show(console, name, rows, bars)
    return 0


def make_plans(
    model: PreTrainedModel, args: argparse.Namespace, console: Console
) -> dict[str, Plan]:
    """One plan per row of the table."""

    def scores(kind: str, widths: tuple[int, ...]) -> Any:
        with console.status(f"scoring: {kind}"):
            return score(
                model,
                args.calibration,
                kind=kind,
                widths=widths,
                sequences=args.sequences,
                length=args.length,
            )

    fisher = scores("fisher-sequence", WIDTHS)
    paper = make_plan(scores("paper", (4, 8)), preset="paper")
    same = {"bytes": paper.true_bytes}
    return {
        "W8A8": uniform_plan(fisher.fingerprint, fisher.shapes, 8),
        "W4A8": uniform_plan(fisher.fingerprint, fisher.shapes, 4),
        PAPER: paper,
        KNAPSACK: make_plan(fisher, **same, widths=Options().widths),
        "knapsack {3,4,5,6,8}": make_plan(fisher, **same, widths=WIDTHS[1:]),
        "knapsack {2,3,4,5,6,8}": make_plan(fisher, **same, widths=WIDTHS),
    }


def compiled(model: PreTrainedModel, plan: Plan) -> Callable[..., Any]:
    """The model with this plan, through the backend; the model itself stays float."""
    options = {"plan": plan, "lower": "eager", "quiet": True}
    return torch.compile(own_frame(model.forward), backend="mixllm", options=options)


def measure(
    model: PreTrainedModel,
    tokenizer: Any,
    models: Mapping[str, Callable[..., Any]],
    text: str,
    count: int,
    args: argparse.Namespace,
) -> dict[str, Quality]:
    """All plans against float on one text."""
    windows = read_windows(args.texts / f"{text}.txt", tokenizer, count=count, length=args.window)
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[n]}"))
    with Progress(*columns) as bar:
        task = bar.add_task(text, n="")
        return compare(
            model,
            models,
            windows,
            progress=lambda done, runs: bar.update(
                task, completed=done, total=runs, n=f"{done}/{runs} windows × models"
            ),
        )


def size_of(model: PreTrainedModel, folder: Path, plan: Plan, graphs: list[Any]) -> Size:
    """From the packed tensors of the plan's graph; the rest of the file in its own dtype."""
    graph = next(g for g in graphs if g.plan_digest == plan.digest)
    weights = sum(r.n * r.k for r in graph.quantized)
    assert len(graph.quantized) == len(plan.sites), "a planned matrix was not packed"
    resident = sum((r.resident_bits or 0) * r.n * r.k for r in graph.quantized) / weights
    linears = graph.true_bits() * weights / 8
    everything = model.num_parameters()
    whole = linears + (everything - weights) * stored_bytes(folder)
    return Size(graph.true_bits(), resident, linears / 1e6, whole / 1e6, 8 * whole / everything)


def float_size(model: PreTrainedModel, folder: Path) -> Size:
    """Of the float model as it is stored."""
    linears = sum(
        m.weight.numel()
        for name, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and name != "lm_head"
    )
    each, everything = stored_bytes(folder), model.num_parameters()
    bits = 8.0 * each
    return Size(bits, bits, linears * each / 1e6, everything * each / 1e6, bits)


def stored_bytes(folder: Path) -> int:
    """Bytes of a float parameter in the checkpoint."""
    return int(AutoConfig.from_pretrained(folder).dtype.itemsize)


def rows_of(
    text: str,
    found: Mapping[str, Quality],
    plans: Mapping[str, Plan],
    sizes: Mapping[str, Size],
    float_size: Size,
) -> list[dict[str, Any]]:
    """The table for one text."""
    any_quality = next(iter(found.values()))
    rows = [
        {
            "text": text,
            "plan": "float",
            **_size_columns(float_size),
            "perplexity": round(any_quality.float_perplexity, 3),
            "bits per byte": round(any_quality.float_bits_per_byte, 4),
        }
    ]
    for label, quality in found.items():
        kl, top1, ratio = quality.mean_kl, quality.top1, kl_ratio(quality, found[PAPER])
        plan = plans[label]
        rows.append(
            {
                "text": text,
                "plan": label,
                **_size_columns(sizes[label]),
                "perplexity": round(quality.perplexity, 3),
                "bits per byte": round(quality.bits_per_byte, 4),
                "KL": _significant(kl.value),
                "KL se": _significant(kl.se, 2),
                "KL / paper": round(ratio.value, 4),
                "KL / paper se": round(ratio.se, 4),
                "top-1": round(top1.value, 4),
                "top-1 se": round(top1.se, 4),
                "predicted KL": None
                if plan.score_kind != "fisher-sequence"
                else _significant(plan.predicted_loss or 0.0),
                "rows": {f"w{bits}": n for bits, n in plan.rows_per_width().items()},
            }
        )
    return rows


def _size_columns(size: Size) -> dict[str, float]:
    return {
        "true bits": round(size.true_bits, 4),
        "resident bits": round(size.resident_bits, 4),
        "linears MB": round(size.linears_mb, 2),
        "file MB": round(size.file_mb, 2),
        "file bits": round(size.file_bits, 3),
    }


def _significant(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def bars_of(
    name: str,
    qualities: Mapping[str, Mapping[str, Quality]],
    plans: Mapping[str, Plan],
    sizes: Mapping[str, Size],
) -> list[Bar]:
    """What had to be reached."""
    bars = []
    for text, found in qualities.items():
        ratio: Estimate = kl_ratio(found[KNAPSACK], found[PAPER])
        title = f"{name}: default knapsack's KL / preset paper's at its true bits, {text}"
        bars.append(Bar.at_most(title, ratio.value, 1.0, ratio.se))
    share = sizes[KNAPSACK].true_bits / plans[PAPER].true_bits
    title = f"{name}: true bits of the packed tensors / budget"
    bars.append(Bar(title, "in (0.995, 1]", share, 0.995 < share <= 1))
    certificate = plans[KNAPSACK].certificate
    gap = None if certificate is None else certificate.gap
    bars.append(Bar.at_most(f"{name}: gap to the LP bound", gap, 1e-4))
    return bars


def show(console: Console, name: str, rows: list[dict[str, Any]], bars: list[Bar]) -> None:
    """The tables, for people."""
    for text in TEXTS:
        table = Table(title=f"{name} on {text}")
        table.add_column("plan")
        heads = ("true bits", "resident", "linears MB", "file MB", "perplexity", "bits/byte")
        for head in (*heads, "KL to float", "KL / paper", "top-1"):
            table.add_column(head, justify="right", no_wrap=True)
        for row in (row for row in rows if row["text"] == text):
            cells = [
                f"{row['true bits']:.3f}",
                f"{row['resident bits']:.3f}",
                f"{row['linears MB']:.2f}",
                f"{row['file MB']:.2f}",
                f"{row['perplexity']:.2f}",
                f"{row['bits per byte']:.4f}",
            ]
            if "KL" in row:
                cells += [
                    f"{row['KL']:.5f} ± {row['KL se']:.5f}",
                    f"{row['KL / paper']:.3f} ± {row['KL / paper se']:.3f}",
                    f"{100 * row['top-1']:.2f} %",
                ]
            table.add_row(row["plan"], *cells)
        console.print(table)
    for bar in bars:
        spread = "" if bar.se is None else f" ± {bar.se:.2g}"
        console.print(
            f"{'met   ' if bar.met else 'MISSED'} {bar.name}: {bar.measured:.5g}{spread} "
            f"(target {bar.target})"
        )


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a causal LM")
    add("--texts", type=Path, required=True, help=f"folder with {' and '.join(TEXTS)} (.txt)")
    add("--calibration", type=Path, required=True, help="text file to score on")
    add("--name", help="of the model in the results; by default the folder's name")
    add("--sequences", type=int, default=8, help="calibration sequences")
    add("--length", type=int, default=1024, help="tokens of each")
    add("--windows", default="24,16", help="windows of the two texts")
    add("--window", type=int, default=1024, help="tokens of each")
    add("--threads", type=int, default=2)
    add("--device", default="cpu", help="cpu or cuda")
    add("--quick", action="store_true", help="two short windows, nothing is written")
    args = parser.parse_args(argv)
    args.windows = [int(count) for count in args.windows.split(",")]
    if len(args.windows) != len(TEXTS):
        parser.error(f"--windows needs {len(TEXTS)} numbers, one a text")
    if args.quick:
        args.sequences, args.length, args.windows, args.window = 2, 256, [2, 2], 256
    return args


if __name__ == "__main__":
    raise SystemExit(main())
