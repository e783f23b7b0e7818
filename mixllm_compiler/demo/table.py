"""The demonstration's result, as a person reads it in a terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..report.bits_map import BitsMap
from ..report.terminal import bits_table, plain_table

if TYPE_CHECKING:
    from .run import Demonstration, Line

COLUMNS = (
    "true\nbits",
    "bits in\nmemory",
    "stored\nMB",
    "perp-\nlexity",
    "KL to\nfloat",
    "same\ntop-1",
    "prefill\ntok./s",
    "decode\ntok./s",
)
FEW_TOKENS = 2000
SLOWER = "SLOWER THAN FLOAT"


def demo_report(found: Demonstration) -> list[RenderableType]:
    """Everything, in the order in which it is read."""
    return [
        "",
        comparison(found.lines),
        *(Text(line, style=_style(line)) for line in remarks(found)),
        "",
        paragraphs(found),
        "",
        bits_table(BitsMap.of_plan(found.plan)),
        "",
        *(Text(line) for line in endings(found)),
    ]


def comparison(lines: list[Line]) -> Table:
    """The table of all models."""
    table = plain_table("", *COLUMNS, numbers=COLUMNS)
    table.padding = (0, 0)  # fits in 80 columns
    for line in lines:
        speed = line.speed
        kl = "–" if line.kl is None else f"{line.kl:.4f}"
        if line.kl_error is not None and math.isfinite(line.kl_error):
            kl += f"\n± {line.kl_error:.4f}"
        table.add_row(
            Text(line.name, style="bold"),
            f"{line.bits:.2f}",
            "–" if line.resident is None else f"{line.resident:.2f}",
            f"{line.stored / 1e6:.1f}",
            f"{line.perplexity:.2f}",
            kl,
            "–" if line.top1 is None else f"{line.top1:.1%}",
            "–" if speed is None else f"{speed.prefill:,.0f}",
            "–" if speed is None else f"{speed.decode:,.0f}",
        )
    return table


def remarks(found: Demonstration) -> list[str]:
    """What the numbers mean, and what they do not show."""
    float_line, mixed = found.lines[0], found.lines[-1]
    said = [
        f"Measured on {found.tokens:,} tokens of held-out text. Nothing was calibrated on it: rows "
        "were scored on text that the model wrote itself.",
        f"The checkpoint is stored in bf16 and runs in float32; {float_line.stored / 1e6:.1f} MB "
        f"become {mixed.stored / 1e6:.1f} MB. Embeddings and the output head stay float.",
    ]
    predicted = found.plan.predicted_loss
    if predicted is not None and mixed.kl is not None:
        said.append(f"The plan predicted a KL of {predicted:.3g}, measured is {mixed.kl:.3g}.")
    kernels = {line.kernel for graph in found.graphs for line in graph.quantized}
    said += slower(float_line, mixed, kernels)
    if found.tokens < FEW_TOKENS:
        said.append(f"{found.tokens} tokens say nothing about quality; this was only a quick run.")
    return said


def _style(remark: str) -> str:
    return "bold yellow" if remark.startswith(SLOWER) else ""


def slower(float_line: Line, mixed: Line, kernels: set[str]) -> list[str]:
    """In words, where the quantized model is slower than float and why."""
    if float_line.speed is None or mixed.speed is None:
        return []
    ratios = {
        "prefill": float_line.speed.prefill / mixed.speed.prefill,
        "decode": float_line.speed.decode / mixed.speed.decode,
    }
    bad = [f"{ratio:.1f}x slower in {what}" for what, ratio in ratios.items() if ratio > 1.0]
    if not bad:
        return []
    why = ""
    if kernels == {"reference"}:
        why = (
            " Here the mixed linears run the reference implementation, which defines the results "
            "and unpacks its weights at every call; `mixllm doctor` says why there is no kernel."
        )
    return [f"{SLOWER} on this machine: {' and '.join(bad)}.{why}"]


def paragraphs(found: Demonstration) -> Table:
    """What both models wrote, side by side."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
    for name in found.texts:
        table.add_column(f"{name} continues …", ratio=1)
    table.add_row(*(Text(f"… {text} …") for text in found.texts.values()))
    head = Text.assemble("“", found.prompt, " …”", style="italic")
    whole = Table.grid(expand=True)
    whole.add_row(head)
    whole.add_row(table)
    return whole


def endings(found: Demonstration) -> list[str]:
    """What was written where, and how long it took."""
    said = [f"{path}: {_about(path.name)}" for path in found.files]
    whole = sum(found.seconds.values())
    parts = ", ".join(f"{label} {seconds:.0f} s" for label, seconds in found.seconds.items())
    return [*said, *found.notes, f"{whole:.0f} seconds: {parts}."]


def _about(name: str) -> str:
    return {
        "bits.svg": "the plot of bits per layer",
        "plan.safetensors": "the plan, for `mixllm explain demo --dtype float32 --plan …`",
        "ir": "the graph after every pass, with differences; begin with graph0/summary.txt",
    }.get(name, "")


def demo_data(found: Demonstration) -> dict[str, Any]:
    """The same for `--json`."""
    import dataclasses

    return {
        "models": [dataclasses.asdict(line) for line in found.lines],
        "heldout_tokens": found.tokens,
        "plan": {"digest": found.plan.digest, "asked": found.plan.asked},
        "predicted_kl": found.plan.predicted_loss,
        "prompt": found.prompt,
        "texts": found.texts,
        "seconds": found.seconds,
        "files": [str(path) for path in found.files],
        "notes": [*found.notes, *remarks(found)],
    }
