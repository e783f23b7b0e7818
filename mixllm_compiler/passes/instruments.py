"""What can be wrapped around every pass: time, verification, dumps. Passes know none of it."""

from __future__ import annotations

import difflib
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from .. import compat
from ..ir.graph import MixGraph
from ..ir.text import render
from ..ir.verify import verify
from .base import Changes, Pass
from .context import Record

if TYPE_CHECKING:
    from .context import Context

log = logging.getLogger("mixllm_compiler.passes")


class Instrument:
    """Called before and after every pass of a pipeline."""

    def before(self, step: Pass, graph: MixGraph, ctx: Context) -> None:
        """The pass is about to run."""

    def after(self, step: Pass, graph: MixGraph, ctx: Context, changes: Changes) -> None:
        """The pass has run."""


class Timer(Instrument):
    """Records every pass in the context, with its seconds."""

    def __init__(self) -> None:
        self._started = 0.0

    def before(self, step: Pass, graph: MixGraph, ctx: Context) -> None:
        self._started = time.perf_counter()

    def after(self, step: Pass, graph: MixGraph, ctx: Context, changes: Changes) -> None:
        seconds = time.perf_counter() - self._started
        ctx.records.append(Record(step.name, step.stage, changes, seconds))
        log.info("%s: %d changes in %.3f s", step.name, len(changes), seconds)
        for what, why in changes.lines:
            log.debug("%s: %s: %s", step.name, what, why)


class Verifier(Instrument):
    """Checks after every pass that the graph is what its facts say."""

    def after(self, step: Pass, graph: MixGraph, ctx: Context, changes: Changes) -> None:
        verify(graph, step.name)


class Tracer(Instrument):
    """The graph after every pass in `TORCH_TRACE` and, at debug level, in the log."""

    def after(self, step: Pass, graph: MixGraph, ctx: Context, changes: Changes) -> None:
        compat.trace_artifact(f"mixllm_{step.name}", lambda: render(graph, f"after {step.name}"))
        if log.isEnabledFor(logging.DEBUG):
            log.debug("after %s\n%s", step.name, render(graph, f"after {step.name}"))


class Dumper(Instrument):
    """`00-captured.py`, `01-canonicalize-linears.py`, … and a diff for every step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._count = 0
        self._last = ""

    def begin(self, graph: MixGraph) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._write("captured", render(graph, "captured"))

    def after(self, step: Pass, graph: MixGraph, ctx: Context, changes: Changes) -> None:
        header = f"after {step.name}"
        self._write(step.name, render(graph, header), changes)

    def _write(self, name: str, text: str, changes: Changes | None = None) -> None:
        stem = f"{self._count:02d}-{name}"
        notes = "".join(f"# {what}: {why}\n" for what, why in changes.lines) if changes else ""
        (self.folder / f"{stem}.py").write_text(notes + text)
        if self._count:
            delta = difflib.unified_diff(
                self._last.splitlines(), text.splitlines(), "before", name, lineterm="", n=2
            )
            (self.folder / f"{stem}.diff").write_text("\n".join(delta) + "\n")
        self._last = text
        self._count += 1
