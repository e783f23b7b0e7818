"""`mixllm compile` and `mixllm generate`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import arguments as arg
from .verb import Output

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..runtime.records import GraphRecord

MAY_SAMPLE = "Temperature of sampling; 0 takes the likeliest token."


def compile(
    model: arg.Model,
    bits: arg.Bits = None,
    plan: arg.Plan = None,
    dump: Annotated[
        Path | None,
        typer.Option("--dump", help="Folder for the IR after every pass, the plan, the kernels."),
    ] = None,
    prompt: arg.Prompt = None,
    tokens: arg.Tokens = 32,
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
    quantizer: arg.Quantizer = "rtn",
    lm_head: arg.LmHead = False,
    exclude: arg.Exclude = None,
    pin: arg.Pin = None,
    lower: arg.Lower = "inductor",
    device: arg.Device = None,
    dtype: arg.Dtype = None,
) -> Output:
    """Score, plan, quantize and compile a model, and say what became of every linear.

    With --dump, the graph after every pass is written as Python that a person can read, with the
    difference to the pass before. With --prompt, the compiled model writes a continuation.

    Examples:
        mixllm compile demo --bits 4.7 --dump dump
        mixllm compile ./my-model --plan plan.safetensors --prompt 'The river' --tokens 40
    """
    from . import models

    loaded, tokenizer = models.load(model, device, dtype)
    ids = models.prompt_ids(loaded, tokenizer, prompt)
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
    settings |= {"preset": preset, "lower": lower, "dump": dump, "quantizer": quantizer}
    settings |= arg.scoring_options(sequences=sequences, length=length, seed=seed)
    started = time.perf_counter()
    compile_model(loaded, tokenizer, bits, plan, data, settings)
    planned = time.perf_counter()
    graphs, text = _first_run(loaded, tokenizer, ids, tokens if prompt is not None else 0)
    seconds = {"score and plan": planned - started, "compile": time.perf_counter() - planned}
    return _compiled(graphs, seconds, dump, text)


def compile_model(
    model: PreTrainedModel,
    tokenizer: Any,
    bits: float | None,
    plan: Path | None,
    data: str,
    settings: dict[str, Any],
) -> None:
    """`mixllm_compiler.compile` with a progress bar, for generation with fixed shapes."""
    from .. import api
    from . import models

    with models.progress("scoring") as step:
        api.compile(
            model,
            bits=bits,
            plan=plan,
            data=data,
            tokenizer=tokenizer,
            progress=step,
            dynamic=False,
            quiet=True,
            **settings,
        )


def _first_run(
    model: PreTrainedModel, tokenizer: Any, ids: Any, tokens: int
) -> tuple[list[GraphRecord], str | None]:
    """Run once, which compiles; generates where tokens are asked for."""
    import torch

    from ..runtime import records
    from . import models

    with records.collect() as graphs, models.waiting("compiling"), torch.no_grad():
        if not tokens:
            model(ids, use_cache=False)
            return graphs, None
        found = models.write(model, ids, tokens)
    return graphs, str(tokenizer.decode(found[0], skip_special_tokens=True))


def _compiled(
    graphs: list[GraphRecord], seconds: dict[str, float], dump: Path | None, text: str | None
) -> Output:
    from ..report.terminal import graph_tables

    found: dict[str, Any] = {
        "graphs": [graph_data(g) for g in graphs],
        "seconds": seconds,
        "dump": None if dump is None else str(dump),
    }
    show: list[Any] = graph_tables(graphs[0]) if graphs else []
    if len(graphs) > 1:
        show.append(f"{len(graphs)} graphs share these rows and weights")
    show.append(", ".join(f"{what} {value:.1f} s" for what, value in seconds.items()))
    if dump is not None:
        show.append(f"the IR after every pass, the plan and the kernels are in {dump}")
    if text is not None:
        found["text"] = text
        show += ["", text]
    return Output(found, show)


def graph_data(graph: GraphRecord) -> dict[str, Any]:
    """A compiled graph for `--json`."""
    quantized = bool(graph.quantized)
    return {
        "headline": graph.headline(),
        "true_bits": graph.true_bits() if quantized else None,
        "plan": graph.plan_digest,
        "asked": graph.asked,
        "score": graph.score,
        "note": graph.note,
        "predicted_loss": graph.predicted_loss,
        "gap": graph.gap,
        "linears": [
            {
                "name": line.name,
                "n": line.n,
                "k": line.k,
                "rows": line.rows,
                "true_bits": line.true_bits,
                "resident_bits": line.resident_bits,
                "kernel": line.kernel,
                "float": line.kept_float,
                "tokens": line.tokens,
                "predicted_seconds": line.seconds,
                "predicted_float_seconds": line.float_seconds,
            }
            for line in graph.linears
        ],
        "passes": [
            {"name": name, "stage": stage, "changes": changes, "seconds": seconds}
            for name, stage, changes, seconds in graph.passes
        ],
    }


def generate(
    model: arg.Model,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")] = "The",
    tokens: arg.Tokens = 64,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help=MAY_SAMPLE)] = 0.0,
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
    quantizer: arg.Quantizer = "rtn",
    lm_head: arg.LmHead = False,
    exclude: arg.Exclude = None,
    pin: arg.Pin = None,
    lower: arg.Lower = "inductor",
    device: arg.Device = None,
    dtype: arg.Dtype = None,
) -> Output:
    """Compile a model and let it write.

    Examples:
        mixllm generate demo --prompt 'The river' --bits 4.7
        mixllm generate ./my-model --plan plan.safetensors --temperature 0.8 --tokens 100
    """
    import torch

    from ..runtime import records
    from . import models

    loaded, tokenizer = models.load(model, device, dtype)
    ids = models.prompt_ids(loaded, tokenizer, prompt)
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
    settings |= {"preset": preset, "lower": lower, "quantizer": quantizer}
    settings |= arg.scoring_options(sequences=sequences, length=length, seed=seed)
    compile_model(loaded, tokenizer, bits, plan, data, settings)
    sampling: dict[str, Any] = {}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature}
    with records.collect() as graphs, models.waiting("compiling"):
        models.write(loaded, ids, tokens, stop_after=3)  # compiles prefill and decode
    torch.manual_seed(seed)
    started = time.perf_counter()
    found = models.write(loaded, ids, tokens, **sampling)
    seconds = time.perf_counter() - started
    text = tokenizer.decode(found[0], skip_special_tokens=True)
    written = found.shape[1] - ids.shape[1]
    data_out = {
        "text": text,
        "tokens": written,
        "seconds": seconds,
        "true_bits": graphs[0].true_bits() if graphs else None,
        "headline": graphs[0].headline() if graphs else None,
    }
    speed = f"{written} tokens in {seconds:.1f} s, {written / seconds:.1f} tokens per second"
    return Output(data_out, [text, "", *([graphs[0].headline()] if graphs else []), speed])
