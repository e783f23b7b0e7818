"""The order of passes: an explicit list, a pass itself, and text that reads back.

canonicalize-linears,annotate-linears,rotate-inputs{block=128},annotate-salience,…
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, nearest
from ..ir.graph import MixGraph
from .allocate_bits import AllocateBits
from .annotate_linears import AnnotateLinears
from .annotate_salience import AnnotateSalience
from .base import Changes, Pass, parse_value
from .canonicalize_linears import CanonicalizeLinears
from .fuse_quantizers import FuseQuantizers
from .instruments import Instrument
from .pack_weights import PackWeights
from .quantize_weights import QuantizeWeights
from .rewrite_linears import RewriteLinears
from .rotate_inputs import RotateInputs
from .select_kernels import SelectKernels
from .share_quantizers import ShareQuantizers

if TYPE_CHECKING:
    from .context import Context

OWN_PASSES: tuple[type[Pass], ...] = (
    # annotate: nothing is computed differently
    CanonicalizeLinears,
    AnnotateLinears,
    # transform: the float function stays equal
    RotateInputs,
    # plan: annotations only
    AnnotateSalience,
    AllocateBits,
    # rewrite: three semantic ops a linear
    QuantizeWeights,
    RewriteLinears,
    ShareQuantizers,
    # lower: kernels, what they take in of their neighbours, and their blobs
    SelectKernels,
    FuseQuantizers,
    PackWeights,
)


class Pipeline(Pass):
    """Passes in order; itself a pass, so pipelines nest."""

    name = "pipeline"

    def __init__(self, passes: Sequence[Pass]) -> None:
        self.passes = list(passes)

    def run(self, graph: MixGraph, ctx: Context, instruments: Sequence[Instrument] = ()) -> Changes:
        total = Changes()
        for step in self.passes:
            if isinstance(step, Pipeline):
                total.lines += step.run(graph, ctx, instruments).lines
                continue
            for instrument in instruments:
                instrument.before(step, graph, ctx)
            changes = step(graph, ctx)
            for instrument in reversed(instruments):
                instrument.after(step, graph, ctx, changes)
            total.lines += changes.lines
        return total

    def names(self) -> list[str]:
        flat: list[str] = []
        for step in self.passes:
            flat += step.names() if isinstance(step, Pipeline) else [step.name]
        return flat

    def without(self, names: Sequence[str]) -> Pipeline:
        """The same pipeline less some passes.

        Raises:
            OptionError: a name that is not in it.
        """
        for name in names:
            if name not in self.names():
                raise OptionError(f"cannot disable {name!r}.{nearest(name, self.names())}")
        return Pipeline([p for p in self.passes if p.name not in names])

    def until(self, name: str) -> Pipeline:
        """The passes up to and including `name`."""
        if name not in self.names():
            raise OptionError(f"no pass {name!r} in this pipeline.{nearest(name, self.names())}")
        return Pipeline(self.passes[: self.names().index(name) + 1])

    def spec(self) -> str:
        """Text that `parse` reads back."""
        return ",".join(p.spec() for p in self.passes)

    def arguments(self) -> dict[str, Any]:
        return {}


def parse(text: str) -> Pipeline:
    """A pipeline from spec text.

    Raises:
        OptionError: unknown pass, bad argument, or text that is no spec.
    """
    from .registry import make_pass

    steps, at = [], 0
    pattern = re.compile(r"\s*([\w-]+)\s*(?:\{([^{}]*)\})?\s*(,|$)")
    text = text.strip()
    while at < len(text):
        match = pattern.match(text, at)
        if match is None:
            raise OptionError(
                f"cannot read the pipeline {text!r} at {text[at : at + 20]!r}; "
                "write 'pass-name,other-pass{key=value,key=value}'"
            )
        arguments = {}
        for item in filter(None, (match[2] or "").split(",")):
            key, equals, value = item.partition("=")
            if not equals:
                raise OptionError(f"{item!r} in the pipeline text is not key=value")
            arguments[key.strip()] = parse_value(value.strip())
        steps.append(make_pass(match[1], **arguments))
        at = match.end()
    return Pipeline(steps)


def default_pipeline() -> Pipeline:
    """The package's passes with registered ones in their places."""
    from .registry import make_pass, registered

    passes: list[Pass] = [make() for make in OWN_PASSES]
    for registration in registered():
        if registration.after is None:
            continue
        names = [p.name for p in passes]
        if registration.after not in names:
            raise OptionError(
                f"pass {registration.name!r} wants to run after {registration.after!r}, which is "
                f"no pass.{nearest(registration.after, names)}"
            )
        passes.insert(names.index(registration.after) + 1, make_pass(registration.name))
    return Pipeline(passes)


def choose_pipeline(given: object, disable: Sequence[str]) -> Pipeline:
    """The pipeline that options ask for."""
    if given is None:
        chosen = default_pipeline()
    elif isinstance(given, Pipeline):
        chosen = given
    elif isinstance(given, str):
        chosen = parse(given)
    else:
        raise OptionError(f"pipeline must be spec text or a Pipeline, not {type(given).__name__}")
    return chosen.without(disable)
