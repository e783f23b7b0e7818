"""`mixllm demo`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated

import typer

from . import arguments as arg
from .verb import Output, stderr

Tell = Callable[[int, int], None]


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for the plot, the plan and the IR.")
    ] = Path("mixllm-demo"),
    bits: arg.Bits = None,
    widths: arg.Widths = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Hardly any text, nothing compiled: does it run?")
    ] = False,
) -> Output:
    """Everything at once, on the small model that ships with the package.

    Scores every output feature, plans, quantizes, compiles, and compares with the float model
    compiled by the same Inductor: size, perplexity, KL, speed, and a paragraph written by each.
    Takes a few minutes on two CPU cores.

    Examples:
        mixllm demo
        mixllm demo --bits 5 --widths 3,4,5,6,8 --out demo5
    """
    from ..demo.run import run
    from ..demo.table import demo_data, demo_report
    from . import models

    models.be_quiet()
    options = arg.planning_options(widths=widths)
    with _stages() as stages:
        found = run(out, stages, bits=bits, widths=options.get("widths"), quick=quick)
    return Output(demo_data(found), demo_report(found))


@contextmanager
def _stages() -> Iterator[Callable[[str], AbstractContextManager[Tell]]]:
    """One line a stage on standard error: its name, a bar, its time; finished ones stay."""
    console = stderr()
    if not console.is_terminal:
        yield _line_a_stage  # a log shows a bar only when all is over
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed

    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description:<46}"),
        BarColumn(bar_width=24),
        Elapsed(),
    )
    with Progress(*columns, console=console) as bar:

        @contextmanager
        def stage(label: str) -> Iterator[Tell]:
            task = bar.add_task(label, total=None)

            def tell(done: int, of: int) -> None:
                bar.update(task, completed=done, total=of)

            yield tell
            bar.update(task, completed=1, total=1)

        yield stage


@contextmanager
def _line_a_stage(label: str) -> Iterator[Tell]:
    started = time.perf_counter()
    typer.echo(f"{label} …", err=True)
    yield lambda done, of: None
    typer.echo(f"✓ {label}, {time.perf_counter() - started:.0f} s", err=True)
