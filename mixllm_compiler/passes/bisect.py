"""Find the pass that broke a model.

After every pass the graph is run on the example inputs and compared with what its stage promises:

    annotate, plan    bit-equal to the graph before
    transform, user   the same function up to rounding
    rewrite           the float graph with quantized weights and activations substituted
    lower             every lowered op equals its expansion: integers exactly, floats to 1e-5
                      (quantizers behind a norm as `lowering.agreement` says)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from ..capture import capture
from ..formats.layout import unpack
from ..frames import own_frame
from ..ir import reference
from ..ir.annotations import GroupedSite, LinearSite
from ..ir.experts import grouped_product
from ..ir.graph import MixGraph
from ..lowering.agreement import disagreement
from ..lowering.fused import ADD_NORM_QUANTIZE, NORM_QUANTIZE
from ..lowering.lowered import EXPANSIONS
from ..options import Options
from .base import Changes, Pass
from .instruments import Instrument
from .run import run_passes

if TYPE_CHECKING:
    from .context import Context

REWRITE_LIMIT = 1e-4
KERNEL_LIMIT = 1e-5
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-9}  # of other dtypes: 5e-2


@dataclass(frozen=True)
class Check:
    """What one pass did to the results.

    Attributes:
        name: of the pass.
        error: largest deviation from what its stage promises, relative to the largest value.
        limit: what its stage allows.
        where: the node that deviates, if a single one could be named.
    """

    name: str
    error: float
    limit: float
    where: str = ""

    @property
    def ok(self) -> bool:
        return self.error <= self.limit


@dataclass
class Bisection:
    """All checks of one graph, in order; `culprit` is the first pass that broke it."""

    checks: list[Check] = field(default_factory=list)

    @property
    def culprit(self) -> Check | None:
        return next((c for c in self.checks if not c.ok), None)

    def __str__(self) -> str:
        lines = [
            f"{'ok ' if c.ok else 'BAD'} {c.name:<24} error {c.error:.1e}, allowed {c.limit:.0e}"
            + (f", first at {c.where}" if c.where else "")
            for c in self.checks
        ]
        culprit = self.culprit
        end = f"{culprit.name} broke the model" if culprit else "no pass broke the model"
        return "\n".join([*lines, end])


def bisect(
    model: nn.Module, *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> list[Bisection]:
    """Run the pipeline pass by pass on a model and its inputs; one `Bisection` per graph.

    Args:
        args, kwargs: inputs of the model.
        options: backend options; the pipeline under suspicion is `options["pipeline"]`.
    """
    found: list[Bisection] = []
    opts = Options.parse({**(options or {}), "quiet": True, "release": False})

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        graph = capture(gm, inputs)
        checker = Bisector(graph)
        run_passes(graph, opts, [checker])
        found.append(checker.result)
        return gm

    forward = getattr(model, "_mixllm_float_forward", model.forward)
    with torch.no_grad():
        torch.compile(own_frame(forward), backend=backend)(*args, **kwargs)
    return found


class Bisector(Instrument):
    """Compares the graph's results before and after every pass."""

    def __init__(self, graph: MixGraph) -> None:
        self.result = Bisection()
        self._last = _run(graph)
        self._substituted: list[Tensor] | None = None
        self._float: _Snapshot | None = None

    def before(self, step: Pass, graph: MixGraph, ctx: Context) -> None:
        if step.stage == "rewrite" and self._float is None:
            self._float = _Snapshot(graph)

    def after(self, step: Pass, graph: MixGraph, ctx: Context, changes: Changes) -> None:
        if step.stage == "lower":
            if "packed" in graph.facts:
                error, where = _lowered_error(graph)
            else:  # kernels cannot read the blobs yet: their definitions run
                error, where = _error(_run_defined(graph), self._last), ""
            self.result.checks.append(Check(step.name, error, KERNEL_LIMIT, where))
            return
        now = _run(graph)
        expected, limit = self._last, 0.0
        if step.stage in ("transform", "user"):
            limit = max((_ROUNDING.get(t.dtype, 5e-2) for t in now), default=0.0)
        if step.stage == "rewrite" and "rewritten" in graph.facts:
            assert self._float is not None
            if self._substituted is None:
                self._substituted = self._float.run(graph, ctx.activation_mode)
            expected = self._substituted
            limit = max((REWRITE_LIMIT, *(_ROUNDING.get(t.dtype, 5e-2) for t in now)))
        self.result.checks.append(Check(step.name, _error(now, expected), limit))
        self._last = now


class _Snapshot:
    """The float graph as it was before it was rewritten, with its linears' annotations."""

    def __init__(self, graph: MixGraph) -> None:
        self.graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        self.output = self.graph.graph_copy(graph.graph, mapping)
        self.graph.output(self.output)
        self.sites: dict[fx.Node, LinearSite] = {mapping[n]: s for n, s in graph.sites()}
        self.experts: dict[fx.Node, GroupedSite] = {mapping[n]: s for n, s in graph.grouped_sites()}

    def run(self, graph: MixGraph, mode: str) -> list[Tensor]:
        """Its results with Ŵ and x̂ in place of W and x."""
        sites, experts = self.sites, self.experts

        class Substituted(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                site, product = sites.get(n), grouped_product(n)
                if n in experts and product is not None:
                    x, offsets = self.env[product.x], self.env[product.offsets]
                    return _substituted_experts(graph, experts[n], mode, x, offsets)
                if site is None:
                    return super().run_node(n)
                operands: Any = n.args
                x, bias = self.env[operands[0]], self.env.get(operands[2])
                return _substituted_linear(graph, site.matrix, mode, x, bias)

        module = fx.GraphModule(graph.module, self.graph)
        return _tensors(Substituted(module, garbage_collect_values=False).run(*_own(graph.inputs)))


def _substituted_experts(
    graph: MixGraph, site: GroupedSite, mode: str, x: Tensor, offsets: Tensor
) -> Tensor:
    y, start = x.new_zeros(len(x), site.n), 0
    for name, end in zip(site.matrices, offsets.tolist(), strict=True):
        y[start:end] = _substituted_linear(graph, name, mode, x[start:end], None)
        start = end
    return y


def _substituted_linear(
    graph: MixGraph, name: str, mode: str, x: Tensor, bias: Tensor | None
) -> Tensor:
    packed = graph.matrices[name].packed
    assert packed is not None
    group = packed.layout.group
    codes, scales, _ = reference.quantize_activation(x, mode, group)
    each = scales if mode == "token" else scales.repeat_interleave(group, -1)
    quantized = (codes.double() * each.double())[..., : packed.layout.k]
    y = quantized @ unpack(packed).dequantize().t()
    if bias is not None:
        y = y + bias.double()
    return y.to(x.dtype)


def _lowered_error(graph: MixGraph) -> tuple[float, str]:
    """The largest deviation of a lowered op from its expansion on the same arguments."""
    worst, where = 0.0, ""

    class Compared(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            nonlocal worst, where
            result = super().call_function(target, args, kwargs)
            expansion = EXPANSIONS.get(target)
            if expansion is not None:
                error = _deviation(target, _tensors(result), _tensors(expansion(*args, **kwargs)))
                if error > worst:
                    worst, where = error, f"{target}({args[-3:]})"
            return result

    Compared(graph.module, garbage_collect_values=False).run(*_own(graph.inputs))
    return worst, where if worst > KERNEL_LIMIT else ""


def _run_defined(graph: MixGraph) -> list[Tensor]:
    """The graph's results with definitions in place of lowered ops."""

    class Defined(fx.Interpreter):
        def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
            return super().call_function(EXPANSIONS.get(target, target), args, kwargs)

    with torch.no_grad():
        module = Defined(graph.module, garbage_collect_values=False)
        return _tensors(module.run(*_own(graph.inputs)))


def _deviation(target: Any, found: list[Tensor], expected: list[Tensor]) -> float:
    """`_error`; behind a norm, whose sums have no one order, codes may be off by one."""
    if target not in (NORM_QUANTIZE, ADD_NORM_QUANTIZE):
        return _error(found, expected)
    if disagreement((found[0], found[1], found[2]), (expected[0], expected[1], expected[2])):
        return float("inf")
    return _error(found[3:], expected[3:])


def _run(graph: MixGraph) -> list[Tensor]:
    with torch.no_grad():
        return _tensors(graph.module(*_own(graph.inputs)))


def _own(inputs: Sequence[Any]) -> list[Any]:
    """Copies of everything a graph may write into; symbols become their hints."""
    from .. import compat

    def own(value: Any) -> Any:
        if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
            return value.detach().clone()
        return compat.hint(value)

    return [own(v) for v in inputs]


def _tensors(outputs: Any) -> list[Tensor]:
    flat = torch.utils._pytree.tree_leaves(outputs)
    return [t.detach() for t in flat if isinstance(t, Tensor)]


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest relative deviation; infinite if shapes or NaNs differ; integers must be equal."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if not a.numel() or torch.equal(a, b):
            continue
        if not a.is_floating_point():
            return float("inf")
        size = float(b.double().abs().max()) or 1.0
        error = float((a.double() - b.double()).abs().max()) / size
        worst = max(worst, error if error == error else float("inf"))
    return worst
