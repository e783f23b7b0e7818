"""`mixllm passes`: the compiler's steps and yours."""

from __future__ import annotations

from typing import Annotated

import typer

from .verb import Output


def passes(
    spec: Annotated[
        bool, typer.Option("--spec", help="Only the default pipeline, as text to edit.")
    ] = False,
) -> Output:
    """List every pass that is known: when it runs, what it needs, what it does.

    Passes of installed packages (entry points in the group `mixllm.passes`) are listed, too. The
    text of --spec can be given back as options={"pipeline": …}, changed or not.

    Examples:
        mixllm passes
        mixllm passes --spec
    """
    from ..passes.pipeline import default_pipeline

    pipeline = default_pipeline()
    if spec:
        return Output({"spec": pipeline.spec()}, [pipeline.spec()])

    import dataclasses

    from ..report.pass_docs import describe_passes
    from ..report.terminal import passes_table

    found = describe_passes()
    return Output(
        {"passes": [dataclasses.asdict(p) for p in found], "spec": pipeline.spec()},
        [passes_table(found)],
    )
