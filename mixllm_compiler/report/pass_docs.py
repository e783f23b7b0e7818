"""Documentation of the passes, taken from the passes.

python -m mixllm_compiler.report.pass_docs docs/passes.md
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..passes.base import FunctionPass, Pass
from ..passes.pipeline import OWN_PASSES, default_pipeline
from ..passes.registry import known_passes

STAGES = {
    "annotate": "Nothing is computed differently; what the graph contains is written down.",
    "transform": "The graph changes, the float function stays equal.",
    "plan": "Annotations only: every row gets scores, then a width.",
    "rewrite": "Linears become the semantic ops (see [ir.md](ir.md)).",
    "lower": "Kernels are chosen, and weights are packed as they read them.",
}


@dataclass(frozen=True)
class PassDescription:
    """What a pass says about itself.

    Attributes:
        name, stage, requires, ensures: as declared.
        summary: first line of its documentation.
        text: the whole of it.
        where: module it is defined in, "" for this package's own passes.
        arguments: parameters with their defaults, `"block=0"`.
        default: whether the default pipeline runs it.
    """

    name: str
    stage: str
    requires: tuple[str, ...]
    ensures: tuple[str, ...]
    summary: str
    text: str
    where: str
    arguments: tuple[str, ...]
    default: bool


def describe_passes() -> list[PassDescription]:
    """All known passes: the default pipeline in its order, then the others."""
    known, order = known_passes(), default_pipeline().names()
    names = [*order, *(name for name in known if name not in order)]
    return [describe(name, known[name], default=name in order) for name in names]


def describe(name: str, make: Callable[..., Pass], default: bool = True) -> PassDescription:
    """One pass, by its constructor."""
    source: Any = make
    stage, requires, ensures = "user", frozenset[str](), frozenset[str]()
    if isinstance(make, functools.partial) and make.func is FunctionPass:
        source = make.args[0]
    elif isinstance(make, type) and issubclass(make, Pass):
        stage, requires, ensures = make.stage, frozenset(make.requires), frozenset(make.ensures)
    own = source in OWN_PASSES
    text = _documentation(source, own)
    return PassDescription(
        name,
        stage,
        tuple(sorted(requires)),
        tuple(sorted(ensures)),
        " ".join(text.partition("\n\n")[0].split()) or "(not documented)",
        text,
        "" if own else str(getattr(source, "__module__", "")),
        _arguments(source),
        default,
    )


def _documentation(source: Any, own: bool) -> str:
    """A pass of this package is documented by its file, another one by its own docstring."""
    about = inspect.cleandoc(source.__doc__ or "")
    if not own:
        inherited = source.__doc__ == Pass.__doc__
        return "" if inherited else about
    module = inspect.cleandoc(sys.modules[source.__module__].__doc__ or "")
    return module if not source.__dict__.get("__doc__") else f"{module}\n\n{about}"


def _arguments(source: Any) -> tuple[str, ...]:
    if not isinstance(source, type) or "__init__" not in source.__dict__:
        return ()
    parameters = inspect.signature(source).parameters.values()
    return tuple(f"{p.name}={p.default}" for p in parameters)


def markdown() -> str:
    """The whole page; only of this package's own passes, whatever else is installed."""
    passes = [describe(p.name, p) for p in OWN_PASSES]
    lines = [
        "# Passes",
        "",
        "Made from the passes' own docstrings by "
        "`python -m mixllm_compiler.report.pass_docs docs/passes.md`; a test keeps it up to date. "
        "`mixllm passes` lists the same, with passes of yours and of installed packages.",
        "",
        "| pass | stage | needs | ensures | what it does |",
        "|---|---|---|---|---|",
    ]
    for p in passes:
        cells = (f"[{p.name}](#{p.name})", p.stage, _facts(p.requires), _facts(p.ensures))
        lines.append(f"| {' | '.join(cells)} | {p.summary} |")
    pipeline = ",".join(p.name for p in OWN_PASSES)
    lines += [
        "",
        'As spec text, for `options={"pipeline": …}` (`mixllm passes --spec`):',
        "",
        "```",
        *(part + "," for part in pipeline.split(",")[:-1]),
        pipeline.split(",")[-1],
        "```",
    ]
    for stage, about in STAGES.items():
        inside = [p for p in passes if p.stage == stage]
        lines += ["", f"## Stage {stage}", "", about]
        for p in inside:
            lines += ["", f"### {p.name}", "", p.text]
            if p.arguments:
                listed = ", ".join(f"`{argument}`" for argument in p.arguments)
                lines += ["", f"Arguments: {listed}."]
    return "\n".join(lines) + "\n"


def _facts(facts: tuple[str, ...]) -> str:
    return ", ".join(facts) or "–"


def main(arguments: list[str]) -> int:
    """Write the page to a file, or to standard output."""
    text = markdown()
    if arguments:
        Path(arguments[0]).write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
