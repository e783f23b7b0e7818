"""Tables and the map of bits for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from ..formats.tables import same_place
from .bits_map import BitsMap, common_prefix, layer_name
from .bits_plot import colour_of

if TYPE_CHECKING:
    from ..runtime.records import GraphRecord, LinearRecord
    from .health import Check
    from .pass_docs import PassDescription

FITS = 12  # layers whose numbers stand beside each other on an ordinary terminal
_BARS = "▁▂▃▄▅▆▇█"


def plain_table(*columns: str, numbers: Sequence[str] = (), title: str = "") -> Table:
    """A table without lines but one under its head; the columns in `numbers` are on the right."""
    table = Table(box=box.SIMPLE_HEAD, title=title or None, title_justify="left", pad_edge=False)
    for at, column in enumerate(columns):
        right = column in numbers
        # Names and numbers stay whole: on a narrow terminal, prose gives way.
        table.add_column(column, justify="right" if right else "left", no_wrap=right or at == 0)
    return table


def graph_tables(graph: GraphRecord) -> list[RenderableType]:
    """What became of every linear of a compiled graph, alike ones of all layers in one line."""
    numbers = ("count", "shape", "bits", "resident")
    prefix = common_prefix(line.name for line in graph.linears)
    table = plain_table(linears_of(prefix), *numbers, "rows per width", numbers=numbers)
    timed = any(line.seconds is not None for line in graph.linears)
    if timed:
        table.add_column("at best, each", justify="right")
    below = []
    for (name, n, k, _, reason), lines in _alike(graph.linears).items():
        if reason:
            below.append(f"float: {len(lines)}× {name} [{n}×{k}], {reason}")
            continue
        true = _mean(lines, [line.true_bits for line in lines])
        resident = _mean(lines, [line.resident_bits for line in lines])
        cells = (name.removeprefix(prefix), str(len(lines)), f"{n}×{k}", true, resident)
        table.add_row(*cells, _rows(lines), *([_time(lines[0])] if timed else []))
    return [
        Text(graph.headline(), style="bold"),
        *([Text(graph.note, style="yellow")] if graph.note else []),
        table,
        *(Text(line) for line in _kernels(graph)),
        *(Text(line, style="yellow") for line in below),
    ]


def _kernels(graph: GraphRecord) -> list[str]:
    """Which kernels run the quantized linears; by name only where they differ."""
    kernels: dict[str, list[str]] = {}
    for line in graph.quantized:
        if line.kernel:
            kernels.setdefault(line.kernel, []).append(same_place(line.name))
    if len(kernels) == 1:
        return [f"kernel of all: {next(iter(kernels))}"]
    return [f"kernel {name}: {', '.join(dict.fromkeys(of))}" for name, of in kernels.items()]


def linears_of(prefix: str) -> str:
    """Head of a column of names that have lost a common prefix."""
    return f"in {prefix.removesuffix('.')}" if prefix else "linear"


def _alike(
    lines: Iterable[LinearRecord],
) -> dict[tuple[str, int, int, str, str], list[LinearRecord]]:
    groups: dict[tuple[str, int, int, str, str], list[LinearRecord]] = {}
    for line in lines:
        key = (same_place(line.name), line.n, line.k, line.kernel, line.kept_float)
        groups.setdefault(key, []).append(line)
    return groups


def _rows(lines: Iterable[LinearRecord]) -> str:
    rows: dict[int, int] = {}
    for line in lines:
        for bits, count in line.rows.items():
            rows[bits] = rows.get(bits, 0) + count
    return " ".join(f"w{bits}:{count}" for bits, count in sorted(rows.items()))


def _time(line: LinearRecord) -> str:
    """Predicted microseconds of one such linear, beside those of its bf16 twin."""
    if line.seconds is None or line.float_seconds is None:
        return ""
    now, was = 1e6 * line.seconds, 1e6 * line.float_seconds
    return f"{now:.1f} µs (bf16 {was:.1f}) at M = {line.tokens}"


def _mean(lines: Sequence[LinearRecord], bits: Sequence[float | None]) -> str:
    weights = [line.n * line.k for line in lines]
    total = sum((b or 0.0) * w for b, w in zip(bits, weights, strict=True))
    return f"{total / sum(weights):.3f}"


def bits_table(bits: BitsMap) -> Table:
    """The map of bits: a coloured number per layer, or a bar where there are many layers."""
    few = len(bits.layers) <= FITS
    layers = [layer_name(layer) for layer in bits.layers]
    table = Table(box=None, title="true bits per layer", title_justify="left", pad_edge=False)
    table.add_column("")
    for column in layers if few else [f"layers {layers[0]} to {layers[-1]}"]:
        table.add_column(column, justify="center" if few else "left")
    table.add_column("all", justify="right")
    for place in bits.places:
        row = bits.row(place)
        cells = [_cell(b) for b in row] if few else [Text.assemble(*map(_bar, row))]
        table.add_row(place, *cells, f"{bits.average(place):.2f}")
    return table


def _cell(bits: float | None) -> Text:
    if bits is None:
        return Text("")
    return Text(f" {bits:.2f} ", style=f"#101010 on {colour_of(bits)}")


def _bar(bits: float | None) -> tuple[str, str]:
    """One letter between 2 and 8 bits."""
    if bits is None:
        return " ", ""
    step = round((min(max(bits, 2.0), 8.0) - 2.0) / 6.0 * (len(_BARS) - 1))
    return _BARS[step], colour_of(bits)


def passes_table(passes: Sequence[PassDescription]) -> Table:
    """Every pass with its place, what it needs and what it does."""
    table = plain_table("pass", "stage", "what it does")
    for step in passes:
        needs, ensures = (", ".join(facts) or "nothing" for facts in (step.requires, step.ensures))
        dim = f"\nneeds {needs}, ensures {ensures}"
        dim += f", from {step.where}" if step.where else ""
        dim += "" if step.default else "; not in the default pipeline"
        about = Text.assemble(step.summary, (dim, "dim"))
        table.add_row(Text(step.name, style="bold"), step.stage, about)
    return table


def checks_table(checks: Sequence[Check]) -> Table:
    """The state of every part, with what to do where something is missing."""
    marks = {"ok": Text("ok", style="green"), "missing": Text("missing", style="bold red")}
    table = plain_table("what", "state", "")
    for check in checks:
        mark = marks.get(check.state, Text(check.state, style="yellow"))
        table.add_row(check.name, mark, Text(check.detail))
    return table
