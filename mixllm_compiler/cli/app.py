"""All verbs of the command `mixllm`; one file a verb, or a small group.

Nothing heavy is imported here: `mixllm --help` must answer at once. Each verb imports torch,
transformers and the compiler itself when it runs.
"""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import compiling, demo, doctor, inspecting, passes, planning, tune
from .verb import add

app = typer.Typer(
    name="mixllm",
    help=(
        "Quantize a language model to mixed precision, one output feature at a time, and "
        "compile it.\n\n"
        "MODEL is a folder in the format of Hugging Face transformers, a model id on its hub, or "
        "the word [bold]demo[/bold] for the small model that ships with this package."
    ),
    epilog=(
        "Begin with [bold]mixllm demo[/bold], then [bold]mixllm inspect MODEL[/bold] and "
        "[bold]mixllm generate MODEL --bits 4.7 --prompt 'The river'[/bold]. "
        "Exit codes: 0 done, 1 refused or failed, 2 usage."
    ),
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mixllm-compiler {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options of the command itself; the help text is that of `app`."""


SEE, MAKE, RUN = "See", "Score and plan", "Compile and run"

add(app, demo.demo, panel=RUN)
add(app, compiling.compile, panel=RUN)
add(app, compiling.generate, panel=RUN)
add(app, planning.score, panel=MAKE)
add(app, planning.plan, panel=MAKE)
add(app, tune.tune, panel=RUN)
add(app, inspecting.inspect, panel=SEE)
add(app, inspecting.explain, panel=SEE)
add(app, passes.passes, panel=SEE)
add(app, doctor.doctor, panel=SEE)
