"""`mixllm tune`: time the CUDA kernels on the GPU at hand, so that the fastest are chosen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from .verb import Output

if TYPE_CHECKING:
    from ..lowering.cuda.timed import Table
    from ..lowering.cuda.tuning import Matrix


def tune(
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", help="Tune for the linears of this model; for Llama's by default."
        ),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option("--plan", "-p", help="Tune for the matrices and row widths of a plan."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="Numbers of tokens, as in 1,16,256,4096.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Forget what was timed before.")] = False,
) -> Output:
    """Time every variant of the CUDA kernels on this GPU; the fastest are used from then on.

    Takes minutes. The table is kept in the cache folder, goes before the one that ships, and is
    written after every problem: stop whenever you like, the next call goes on from there. Models
    never tune by themselves. CUDA_VISIBLE_DEVICES chooses among several GPUs.

    Examples:
        mixllm tune
        mixllm tune --model ./my-model
        mixllm tune --plan plan.safetensors --tokens 1,8,1024
    """
    from .. import __version__
    from ..lowering.cuda import timed, timing, tuning
    from . import models

    if model is not None and plan is not None:
        raise OptionError("a plan knows its matrices: give --model or --plan, not both")
    target, count = _gpu()
    matrices = tuning.unlike(_of_plan(plan) if plan else _of_model(model) if model else _llamas())
    path = timed.path_of(target)
    assert path is not None  # the runtime has a cache folder
    asked = tuning.TOKENS if tokens is None else _numbers(tokens)
    with models.progress(f"tuning for {target.name}") as step:
        made = list(
            tuning.tune(
                matrices,
                asked,
                target,
                count,
                timing.GpuTimer(),
                path,
                made_by=__version__,
                again=again,
                progress=step,
            )
        )
    table = timed.read(path, target)
    assert table is not None
    sizes = {matrix.size for matrix in matrices}
    rows = [_row(table, key) for key in sorted(table.best) if key[1:] in sizes and key[0] in asked]
    found = {"file": str(path), "device": target.name, "timed": len(made), "problems": rows}
    return Output(found, [_shown(rows), f"{len(made)} problems timed, written to {path}"])


def _gpu() -> tuple[Any, int]:
    """The target, and how many multiprocessors it has."""
    import torch

    from .. import runtime  # noqa: F401  sources and tables go to the cache folder
    from ..lowering.cuda import timing

    target = timing.available()
    return target, torch.cuda.get_device_properties("cuda").multi_processor_count


def _llamas() -> list[Matrix]:
    from ..lowering.cuda.tuning import SHAPES, mixed

    return [mixed(*shape) for shape in SHAPES]


def _of_model(name: str) -> list[Matrix]:
    """Its linears with the usual mix of widths, those of one shape once."""
    from ..formats.row_format import groups_of
    from ..lowering.cuda.layout import tiles
    from ..lowering.cuda.tuning import mixed
    from . import models
    from .inspecting import coverage

    loaded, tokenizer = models.load(name)
    shapes = {(line.n, line.k) for line in coverage(loaded, tokenizer, {}).quantized}
    if not shapes:
        raise OptionError(f"nothing of {name!r} would be quantized; see `mixllm inspect {name}`")
    return [mixed(tiles(n), groups_of(k, 128)) for n, k in sorted(shapes)]


def _of_plan(path: Path) -> list[Matrix]:
    """Its matrices that the CUDA kernels can run."""
    from ..allocation.plan import Plan
    from ..lowering.cuda import support, tuning

    sites = Plan.load(path).sites.values()
    known = [site for site in sites if (site.family, site.group) == ("two-level", 128)]
    matrices = [tuning.Matrix(site.widths, site.k) for site in known]
    matrices = [m for m in matrices if support.layout_reason(m.layout) is None]
    if not matrices:
        raise OptionError(
            f"{path} has no matrix that the CUDA kernels can run: they know two-level rows in "
            "groups of 128 (family='two-level')"
        )
    return matrices


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) for part in parts):
        raise OptionError(f"--tokens {text!r} is no list of numbers; write for example 1,16,4096")
    return tuple(sorted({int(part) for part in parts}))


def _row(table: Table, key: tuple[int, int, int]) -> dict[str, Any]:
    best, (m, tiles, groups) = str(table.best[key]), key
    us = table.times.get(key, {}).get(best)
    return {"n": 64 * tiles, "k": 128 * groups, "tokens": m, "variant": best, "us": us}


def _shown(rows: Sequence[dict[str, Any]]) -> Any:
    from ..report.terminal import plain_table

    table = plain_table("matrix", "tokens", "µs", "fastest", numbers=("tokens", "µs"))
    for row in sorted(rows, key=lambda r: (r["n"] * r["k"], r["n"], r["tokens"])):
        us = "" if row["us"] is None else f"{row['us']:.2f}"
        table.add_row(f"{row['n']}×{row['k']}", str(row["tokens"]), us, row["variant"])
    return table
