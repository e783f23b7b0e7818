"""What all verbs share: `--json`, `--debug`, exit codes, and one clear message for an error.

A verb is a function that returns an `Output`; it prints nothing itself except progress, which
goes to standard error, as errors do. So standard output holds the result and nothing else.
"""

from __future__ import annotations

import inspect
import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from ..errors import MixLLMError

Verb = Callable[..., "Output"]

_JSON = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_DEBUG = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@dataclass(frozen=True)
class Output:
    """The result of a verb.

    Attributes:
        data: what `--json` prints.
        show: what a person sees, printed in this order.
        failed: whether the exit code is 1 although there is a result.
    """

    data: Mapping[str, Any]
    show: Sequence[RenderableType] = field(default=())
    failed: bool = False


def stdout() -> Console:
    """Where results go."""
    return Console(highlight=False, soft_wrap=False)


def stderr() -> Console:
    """Where progress, notices and errors go."""
    return Console(stderr=True, highlight=False)


def add(app: typer.Typer, function: Verb, panel: str) -> None:
    """Make a function a verb of the command: its name, its docstring, its annotated parameters.

    A docstring's part after a line `Examples:` becomes the end of the help text.
    """
    text, _, examples = inspect.cleandoc(function.__doc__ or "").partition("Examples:\n")
    app.command(
        name=function.__name__,
        help="\n\n".join(" ".join(part.split()) for part in text.split("\n\n")).strip(),
        epilog=_examples(examples),
        rich_help_panel=panel,
    )(_run(function))


def _examples(block: str) -> str | None:
    # A blank line between them: rich would join the lines of a paragraph.
    lines = [line.strip() for line in block.splitlines() if line.strip()]
    return "\n\n".join(["Examples:", *(f"$ {line}" for line in lines)]) if lines else None


def _run(function: Verb) -> Callable[..., None]:
    """The function with `--json` and `--debug` beside its own parameters."""

    def command(*, json: bool, debug: bool, **arguments: Any) -> None:
        output = _guarded(function, debug, arguments)
        if json:
            typer.echo(_as_json(output.data))
        else:
            console = stdout()
            for part in output.show:
                if isinstance(part, str):
                    typer.echo(part)  # as it is: it may be a table, or text for another program
                else:
                    console.print(part)
        if output.failed:
            raise typer.Exit(1)

    hints = get_type_hints(function, include_extras=True)
    hints.pop("return", None)
    own = inspect.signature(function).parameters.values()
    parameters = [p.replace(annotation=hints[p.name]) for p in own]
    for name, annotation in (("json", _JSON), ("debug", _DEBUG)):
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        parameters.append(inspect.Parameter(name, kind, default=False, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__name__ = function.__name__
    return command


def _as_json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False, default=str)


def _guarded(function: Verb, debug: bool, arguments: Mapping[str, Any]) -> Output:
    """Run a verb; an error becomes one message and exit code 1."""
    try:
        return function(**arguments)
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except Exception as error:
        console = stderr()
        if debug:
            console.print(Text(traceback.format_exc()))
        # Soft: the terminal wraps, and a log keeps the line whole.
        told = Text.assemble(("mixllm: ", "bold red"), message(error))
        console.print(told, soft_wrap=True)
        raise typer.Exit(1) from error


def message(error: BaseException) -> str:
    """What to tell the user: the mendable error behind this one, or that it is ours."""
    mendable = mendable_error(error)
    if isinstance(mendable, OSError):
        place = f"{mendable.filename}: " if mendable.filename else ""
        return f"{place}{mendable.strerror or mendable}"
    if mendable is not None:
        return str(mendable)
    return (
        f"internal error: {type(error).__name__}: {error}\n"
        "Run again with --debug for the traceback, and report it."
    )


def mendable_error(error: BaseException | None) -> MixLLMError | OSError | None:
    """The error that a user can mend; Dynamo wraps what a backend raises in one of its own."""
    while error is not None:
        if isinstance(error, MixLLMError | FileNotFoundError | PermissionError):
            return error
        error = getattr(error, "inner_exception", None) or error.__cause__
    return None
