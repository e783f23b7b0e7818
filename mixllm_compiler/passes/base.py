"""What a pass is: a name, what it needs, what it establishes, and one function."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import fx

from ..errors import MixLLMError, OptionError
from ..ir.graph import MixGraph, mutated_inputs

if TYPE_CHECKING:
    from .context import Context


class PassError(MixLLMError):
    """A pass was run where its requirements are not met, or broke its own promise."""


@dataclass
class Changes:
    """What a pass did, for people: one line per change, and a count."""

    lines: list[tuple[str, str]] = field(default_factory=list)

    def add(self, what: object, why: str) -> None:
        self.lines.append((str(what), why))

    def __len__(self) -> int:
        return len(self.lines)


class Pass:
    """One step of the pipeline.

    Subclasses set `name` (verb-object, kebab-case), the facts they require and ensure, and the
    stage they belong to, and implement `run`. Parameters are keyword arguments of `__init__`
    with defaults, stored under the same names: spec text is read from and written to them.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[str] = "annotate"
    requires: ClassVar[frozenset[str] | set[str]] = frozenset()
    ensures: ClassVar[frozenset[str] | set[str]] = frozenset()

    def run(self, graph: MixGraph, ctx: Context) -> Changes | None:
        """Change `graph` in place; say what was done."""
        raise NotImplementedError(f"{type(self).__name__} does not implement run()")

    def __call__(self, graph: MixGraph, ctx: Context) -> Changes:
        """Run with requirements checked before and recorded after."""
        missing = set(self.requires) - graph.facts
        if missing:
            raise PassError(
                f"{self.name} needs {', '.join(sorted(missing))}, which no earlier pass "
                f"established; established so far: {', '.join(sorted(graph.facts)) or 'nothing'}"
            )
        changes = self.run(graph, ctx) or Changes()
        graph.settle()
        graph.facts |= set(self.ensures)
        return changes

    def arguments(self) -> dict[str, Any]:
        """Constructor arguments that differ from their defaults."""
        given = {}
        for key, parameter in inspect.signature(type(self).__init__).parameters.items():
            if key != "self" and hasattr(self, key) and getattr(self, key) != parameter.default:
                given[key] = getattr(self, key)
        return given

    def spec(self) -> str:
        """`name` or `name{key=value,…}`; `passes.pipeline.parse` reads it back."""
        inside = ",".join(f"{k}={v}" for k, v in self.arguments().items())
        return f"{self.name}{{{inside}}}" if inside else self.name


class FunctionPass(Pass):
    """A user's plain function over the `GraphModule`, wrapped as a pass.

    Dead-code elimination, the natural last line of such a function, deletes the in-place writes
    of static KV caches from Dynamo's graph; it is made safe while the function runs.
    """

    def __init__(
        self, function: Callable[[fx.GraphModule], fx.GraphModule | None], name: str, stage: str
    ) -> None:
        self.function = function
        self.name = name  # type: ignore[misc]
        self.stage = stage  # type: ignore[misc]

    def run(self, graph: MixGraph, ctx: Context) -> Changes:
        with _safe_dead_code_elimination(graph.graph):
            result = self.function(graph.module)
        if result is not None and result is not graph.module:
            raise PassError(
                f"{self.name} returned another GraphModule; change the one it is given in place "
                "(the caller of this graph is generated from that very object)"
            )
        graph.bindings = {n: b for n, b in graph.bindings.items() if n in set(graph.graph.nodes)}
        return Changes([(self.name, "user function")])

    def arguments(self) -> dict[str, Any]:
        return {}


class _safe_dead_code_elimination:
    """Make `graph.eliminate_dead_code()` keep nodes that write into their inputs."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        original = type(self.graph).eliminate_dead_code

        def keep_writes(is_impure_node: Callable[[fx.Node], bool] | None = None) -> bool:
            def impure(node: fx.Node) -> bool:
                said = is_impure_node(node) if is_impure_node else node.is_impure()
                return bool(said) or bool(mutated_inputs(node)) or node.op == "placeholder"

            return bool(original(self.graph, impure))

        self.graph.eliminate_dead_code = keep_writes  # type: ignore[method-assign]

    def __exit__(self, *_: object) -> None:
        del self.graph.eliminate_dead_code


def parse_value(text: str) -> Any:
    """A value inside spec braces: integer, float, true/false, or text."""
    if text in ("true", "false", "True", "False"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    if not text:
        raise OptionError("an empty value in a pipeline's spec text")
    return text


__all__ = ["Changes", "FunctionPass", "Pass", "PassError", "parse_value"]
