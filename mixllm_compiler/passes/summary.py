"""What a finished pipeline left behind: the graph's record, and the files of a dump."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import compat
from ..formats.bits import resident_bits, true_bits
from ..formats.layout import Layout, unpack
from ..ir.annotations import quantized_experts_of, quantized_of
from ..ir.graph import Matrix, MixGraph
from ..ir.ops import MODES
from ..ir.text import render
from ..lowering.cost import predict_float_seconds, predict_seconds
from ..lowering.lowered import LOWERED_LINEAR, implementation
from ..lowering.target import Target
from ..runtime.records import GraphRecord, LinearRecord

if TYPE_CHECKING:
    from .context import Context


def summarize(graph: MixGraph, ctx: Context) -> GraphRecord:
    """The record of one compiled graph."""
    plan = ctx.plan
    return GraphRecord(
        linears=_linears(graph, ctx.target),
        passes=tuple((r.name, r.stage, len(r.changes), r.seconds) for r in ctx.records),
        plan_digest=plan.digest if plan is not None else "",
        asked=plan.asked if plan is not None else "",
        score=plan.score_kind if plan is not None else ctx.score_kind,
        note=ctx.score_note,
        predicted_loss=plan.predicted_loss if plan is not None else None,
        gap=plan.certificate.gap if plan is not None and plan.certificate is not None else None,
        broken=compat.break_reason(graph.module),
        planned_before=ctx.known is not None,
        root=None if graph.root is None else weakref.ref(graph.root),
        code=render(graph, "compiled"),
    )


def _linears(graph: MixGraph, target: Target) -> tuple[LinearRecord, ...]:
    tokens = _tokens(graph)
    return tuple(_linear(m, tokens.get(m.name, 0), target) for m in graph.matrices.values())


def _linear(matrix: Matrix, m: int, target: Target) -> LinearRecord:
    """The record of one matrix that M tokens go through."""
    float_bits = 8 * matrix.binding.tensor.element_size()
    if matrix.packed is None:
        return LinearRecord(
            matrix.name, matrix.n, matrix.k, kept_float=matrix.kept_float, float_bits=float_bits
        )
    layout = matrix.packed.layout
    return LinearRecord(
        matrix.name,
        matrix.n,
        matrix.k,
        dict(matrix.packed.layout.widths),
        true_bits([unpack(matrix.packed).sharing(matrix.spans)]),
        resident_bits([matrix.packed]),
        matrix.kernel,
        float_bits=float_bits if matrix.widths is not None else 32,
        tokens=m,
        seconds=predict_seconds(m, layout, target),
        float_seconds=predict_float_seconds(m, matrix.n, matrix.k, target),
    )


def _tokens(graph: MixGraph) -> dict[str, int]:
    """Matrix → M of its first use: rows of its output in this graph's example.

    Experts share the rows of their product; each is said to have the mean.
    """
    found: dict[str, int] = {}
    for node in graph.graph.nodes:
        record, experts = quantized_of(node), quantized_experts_of(node)
        example = node.meta.get("example_value")
        names = experts.matrices if experts is not None else (record.matrix,) if record else ()
        if not names or not isinstance(example, torch.Tensor):
            continue
        m = 1
        for size in example.shape[:-1]:
            m *= int(compat.hint(size) or 1)
        for name in names:
            if example.shape[-1] == graph.matrices[name].n:
                found.setdefault(name, -(-m // len(names)))
    return found


def write_artifacts(folder: Path, graph: MixGraph, ctx: Context) -> None:
    """Plan, kernel sources and a summary table beside the IR of every pass."""
    record = summarize(graph, ctx)
    if ctx.plan is not None:
        ctx.plan.save(folder / "plan.safetensors")
        (folder / "plan.txt").write_text(ctx.plan.summary() + "\n")
    for name, source in kernel_sources(graph).items():
        (folder / "kernels").mkdir(exist_ok=True)
        (folder / "kernels" / name).write_text(source)
    (folder / "summary.txt").write_text(table(record))


def table(record: GraphRecord) -> str:
    """The record as a plain-text table: linears, then passes."""
    lines = [record.headline(), ""]
    if record.note:
        lines += [record.note, ""]
    width = max([len(line.name) for line in record.linears] + [6])
    lines.append(
        f"{'linear':<{width}}  {'shape':>13}  {'true bits':>9}  {'resident':>8}  rows, kernel"
    )
    for line in record.linears:
        shape = f"{line.n}×{line.k}"
        if line.kept_float:
            lines.append(
                f"{line.name:<{width}}  {shape:>13}  {'float':>9}  {'':>8}  {line.kept_float}"
            )
            continue
        rows = " ".join(f"w{b}:{n}" for b, n in line.rows.items())
        figures = f"{line.true_bits:>9.3f}  {line.resident_bits:>8.3f}"
        time = _time(line)
        lines.append(f"{line.name:<{width}}  {shape:>13}  {figures}  {rows}, {line.kernel}{time}")
    lines += ["", f"{'pass':<22}  {'stage':<10}  {'changes':>7}  {'seconds':>8}"]
    for name, stage, changes, seconds in record.passes:
        lines.append(f"{name:<22}  {stage:<10}  {changes:>7}  {seconds:>8.3f}")
    return "\n".join(lines) + "\n"


def _time(line: LinearRecord) -> str:
    """Predicted time against the float linear, "" where the device is unknown."""
    if line.seconds is None or line.float_seconds is None:
        return ""
    was, now = 1e6 * line.float_seconds, 1e6 * line.seconds
    return f", at M = {line.tokens} at best {now:.1f} µs (bf16 {was:.1f})"


def kernel_sources(graph: MixGraph) -> dict[str, str]:
    """File name → source of every generated kernel that the graph's lowered ops call."""
    found: dict[str, str] = {}
    for node in graph.calls(LOWERED_LINEAR):
        args: Any = node.args
        scales, blob, bias, layout, dtype, kernel = (args[i] for i in (1, 3, 4, 5, 6, 7))
        quantizer = scales.args[0]
        device = graph.module.get_buffer(blob.target).device
        mode = next(str(a) for a in quantizer.args if a in MODES)
        found |= implementation(kernel).sources(
            Layout.parse(layout), mode, dtype, bias is not None, Target.of(device)
        )
    return found
