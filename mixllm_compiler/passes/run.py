"""Run the pipeline that the options ask for, with the instruments they ask for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..ir.graph import MixGraph
from ..lowering.target import Target
from ..options import Options
from ..runtime import records
from .context import Context
from .instruments import Dumper, Instrument, Timer, Tracer, Verifier
from .pipeline import choose_pipeline
from .summary import write_artifacts


def run_passes(graph: MixGraph, options: Options, more: Sequence[Instrument] = ()) -> Context:
    """Run the pipeline that the options ask for."""
    ctx = Context(options, target_of(graph), plan=options.resolved_plan())
    pipeline = choose_pipeline(options.pipeline, options.disable)
    instruments: list[Instrument] = [Timer(), Tracer(), *more]
    if options.verify:
        instruments.append(Verifier())
    if options.dump is not None:
        folder = Path(options.dump) / f"graph{records.count()}"
        dumper = Dumper(folder)
        dumper.begin(graph)
        instruments.append(dumper)
    pipeline.run(graph, ctx, instruments)
    if options.dump is not None:
        write_artifacts(folder, graph, ctx)
    return ctx


def target_of(graph: MixGraph) -> Target:
    """The device that the graph's weights (or else its inputs) are on."""
    devices = [b.tensor.device for b in graph.bindings.values()]
    devices += [v.device for v in graph.inputs if isinstance(v, torch.Tensor)]
    return Target.of(devices[0] if devices else torch.device("cpu"))
