"""`mixllm score` and `mixllm plan`: separate, because another budget costs only seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import arguments as arg
from .verb import Output

Out = Annotated[Path, typer.Option("--out", "-o", help="File to write.")]


def score(
    model: arg.Model,
    out: Out = Path("scores.safetensors"),
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            help="kfac (default), fisher-token, fisher-sequence, paper, zeroth-order, hessian or "
            "weight-error.",
        ),
    ] = None,
    data: arg.Data = "self",
    sequences: arg.Sequences = None,
    length: arg.Length = None,
    seed: arg.Seed = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Sequences at a time.")] = 1,
    preset: arg.Preset = "best",
    widths: arg.Widths = None,
    group: arg.Group = None,
    spans: arg.Spans = None,
    rotate: arg.Rotate = None,
    family: arg.Family = None,
    lm_head: arg.LmHead = False,
    exclude: arg.Exclude = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", help="Keep what is done here; go on from it.")
    ] = None,
    device: arg.Device = None,
    dtype: arg.Dtype = None,
) -> Output:
    """Score every output feature in every width: how much worse the model would get.

    Writes one file, from which `mixllm plan` makes a plan for any budget in seconds.

    Examples:
        mixllm score demo -o demo-scores.safetensors
        mixllm score ./my-model --data text.txt --sequences 16 --widths 3,4,5,8
        mixllm score ./my-model --preset paper -o paper.safetensors
    """
    from .. import api
    from . import models

    loaded, tokenizer = models.load(model, device, dtype)
    options = arg.planning_options(
        widths=widths,
        group=group,
        spans=spans,
        rotate=rotate,
        family=family,
        lm_head=lm_head,
        exclude=exclude,
    )
    with models.progress("scoring") as step:
        scores = api.score(
            loaded,
            data,
            kind=kind,
            preset=preset,
            tokenizer=tokenizer,
            batch=batch,
            progress=step,
            resume=resume,
            **arg.scoring_options(sequences=sequences, length=length, seed=seed),
            **options,
        )
    scores.save(out)
    totals = {
        name: dict(zip(scores.columns, row.tolist(), strict=True))
        for name, row in scores.totals().items()
    }
    found = {
        "file": str(out),
        "kind": scores.kind,
        "widths": list(scores.widths),
        "group": scores.group,
        "tokens": scores.tokens,
        "sequences": scores.sequences,
        "matrices": totals,
    }
    return Output(found, [scores.summary(), "", f"written to {out}"])


def plan(
    scores: Annotated[Path, typer.Argument(metavar="SCORES", help="What `mixllm score` wrote.")],
    out: Out = Path("plan.safetensors"),
    bits: arg.Bits = None,
    bytes: Annotated[
        int | None, typer.Option("--bytes", help="Budget in bytes of all quantized weights.")
    ] = None,
    kl: Annotated[
        float | None,
        typer.Option("--kl", help="Predicted KL in nats per token: the smallest plan within it."),
    ] = None,
    constant: Annotated[
        float, typer.Option("--constant", help="Predicted KL is this × predicted loss + floor.")
    ] = 1.0,
    floor: Annotated[
        float, typer.Option("--floor", help="What activations add to the predicted KL.")
    ] = 0.0,
    preset: arg.Preset = "best",
    widths: arg.Widths = None,
    exclude: arg.Exclude = None,
    pin: arg.Pin = None,
    tile: arg.Tile = None,
    window: arg.Window = None,
    siblings: arg.Siblings = True,
    tp: arg.TensorParallel = None,
    formats_per_layer: arg.FormatsPerLayer = None,
) -> Output:
    """Give every output feature a width, inside one budget for the whole model.

    The certificate says how far from the best plan of this size the answer can be at most.

    Examples:
        mixllm plan scores.safetensors --bits 4.7
        mixllm plan scores.safetensors --bits 4.5 --pin '*.down_proj=8' -o plan45.safetensors
        mixllm plan scores.safetensors --kl 0.003 --formats-per-layer 2
        mixllm plan paper.safetensors --preset paper
    """
    from .. import api
    from ..salience.scores import Scores

    options = arg.planning_options(
        widths=widths,
        exclude=exclude,
        pin=pin,
        tile=tile,
        window=window,
        siblings=siblings,
        tp=tp,
        formats_per_layer=formats_per_layer,
    )
    made = api.plan(
        Scores.load(scores),
        bits=bits,
        bytes=bytes,
        kl=kl,
        preset=preset,
        constant=constant,
        floor=floor,
        **options,
    )
    made.save(out)
    certificate = made.certificate
    found = {
        "file": str(out),
        "digest": made.digest,
        "asked": made.asked,
        "true_bits": made.true_bits,
        "true_bytes": made.true_bytes,
        "rows": made.rows_per_width(),
        "predicted_loss": made.predicted_loss,
        "predicted_kl": made.predicted_kl,
        "gap": None if certificate is None else certificate.gap,
        "activation_mode": made.activation_mode,
        "rotation": made.rotation,
        "matrices": {
            name: {"true_bits": site.true_bits, "rows": site.rows_per_width()}
            for name, site in made.sites.items()
        },
        "float": dict(made.float_sites),
    }
    return Output(found, [made.summary(), "", f"written to {out}"])
