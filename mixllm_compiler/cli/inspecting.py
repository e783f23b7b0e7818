"""`mixllm inspect` and `mixllm explain`: what would be quantized, and what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UnsupportedModel
from . import arguments as arg
from .verb import Output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..report.coverage import Coverage

COVERAGE_PASSES = "canonicalize-linears,annotate-linears"

EachMatrix = Annotated[
    bool, typer.Option("--all", "-a", help="Every matrix by name, not alike ones in one line.")
]


def inspect(
    model: arg.Model,
    each: EachMatrix = False,
    bits: arg.Bits = None,
    group: arg.Group = None,
    lm_head: arg.LmHead = False,
    exclude: arg.Exclude = None,
    device: arg.Device = None,
    dtype: arg.Dtype = None,
) -> Output:
    """What of a model would be quantized, what stays float, and why; in seconds.

    Linears are found in the captured graph, by what they compute, not by the model's name. A
    linear module that the graph does not contain is listed, too. The exit code is 1 if nothing
    would be quantized.

    Examples:
        mixllm inspect demo
        mixllm inspect ./my-model --bits 4.2 --lm-head --exclude '*.layers.0.*'
    """
    from ..options import DEFAULT_BITS
    from ..report.coverage import coverage_table
    from . import models

    loaded, tokenizer = models.load(model, device, dtype)
    options = arg.planning_options(group=group, lm_head=lm_head, exclude=exclude)
    found = coverage(loaded, tokenizer, options)
    budget = DEFAULT_BITS if bits is None else bits
    return Output(found.data(budget), coverage_table(found, budget, each), not found.quantized)


def coverage(model: PreTrainedModel, tokenizer: Any, options: dict[str, Any]) -> Coverage:
    """What of a model would be quantized.

    Raises:
        UnsupportedModel: it has no linear.
    """
    from .. import api
    from ..report.coverage import Coverage
    from . import models

    ids = models.prompt_ids(model, tokenizer, None)
    settings = {**options, "pipeline": COVERAGE_PASSES}
    explained = api.explain(model, ids, options=settings, use_cache=False)
    found = Coverage.of(model, explained.graphs)
    if not found.matrices:
        raise UnsupportedModel(f"{type(model).__name__} has no linear with a constant weight")
    return found


def explain(
    model: arg.Model,
    bits: arg.Bits = None,
    plan: arg.Plan = None,
    data: arg.Data = "self",
    sequences: arg.Sequences = None,
    length: arg.Length = None,
    seed: arg.Seed = 0,
    preset: arg.Preset = "best",
    widths: arg.Widths = None,
    group: arg.Group = None,
    spans: arg.Spans = None,
    rotate: arg.Rotate = None,
    family: arg.Family = None,
    lm_head: arg.LmHead = False,
    exclude: arg.Exclude = None,
    pin: arg.Pin = None,
    device: arg.Device = None,
    dtype: arg.Dtype = None,
) -> Output:
    """Run the whole pipeline and show, for every linear, its rows per width, size and kernel.

    Like `mixllm compile`, but without compiling the rest of the graph: it takes seconds.

    Examples:
        mixllm explain demo --bits 4.7
        mixllm explain ./my-model --plan plan.safetensors --json
    """
    from .. import api
    from ..report.bits_map import BitsMap
    from ..report.terminal import bits_table, graph_tables
    from . import models
    from .compiling import compile_model, graph_data

    loaded, tokenizer = models.load(model, device, dtype)
    settings = arg.planning_options(
        widths=widths,
        group=group,
        spans=spans,
        rotate=rotate,
        family=family,
        lm_head=lm_head,
        exclude=exclude,
        pin=pin,
    )
    settings |= {"preset": preset}
    settings |= arg.scoring_options(sequences=sequences, length=length, seed=seed)
    compile_model(loaded, tokenizer, bits, plan, data, settings)
    ids = models.prompt_ids(loaded, tokenizer, None)
    graphs = api.explain(loaded, ids, use_cache=False).graphs
    show: list[Any] = [part for graph in graphs for part in graph_tables(graph)]
    show += ["", bits_table(BitsMap.of_graphs(graphs))]
    return Output({"graphs": [graph_data(g) for g in graphs]}, show)
