"""Quantize a whole model layer by layer on calibration text.

Two streams of activations go through the captured graph side by side: the float model's, and that
of the model as far as it is quantized. Where linears read a value, both stop; the linears are
quantized for the inputs that the quantized stream really delivers; then both go on. Memory: the
values that cross one cut, for all calibration tokens and both streams.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from .. import compat
from ..allocation.plan import Plan, SitePlan
from ..calibration.moments import Moments
from ..calibration.segments import Segment, SegmentInterpreter, cut
from ..errors import OptionError, PlanMismatch, UnsupportedModel, nearest
from ..formats.fingerprint import fingerprint
from ..formats.layout import pack
from ..formats.neutral import QuantizedWeight
from ..formats.row_format import spread
from ..ir.annotations import LinearSite
from ..ir.graph import Matrix
from ..ir.reference import quantize_activation
from ..options import Options
from ..quantizers.encode import Encoded, by_span, encode
from ..quantizers.gptq import SWEEPS, quantize_gptq
from ..quantizers.hessian import DAMPING, factorize, require_finite
from ..quantizers.list_search import quantize_by_search
from ..quantizers.refit import refit
from ..quantizers.rtn import quantize_rtn
from ..runtime.weights import CACHE, packing_key
from .captured_model import CapturedModel, Values, capture_model, even_batch
from .quantize_experts import ExpertGroup, expert_linears

log = logging.getLogger("mixllm_compiler")

METHODS = ("gptq", "rtn", "search")


@dataclass(frozen=True)
class Recipe:
    """How float rows become codes.

    Attributes:
        method: "gptq", "rtn" (nearest codes on grids weighted by diag(H)), or "search" (two-level
            rows only: the best of many sequences of codes in a group; two to three times the time).
        clip: search clipped ranges.
        propagate: calibrate on the inputs that the quantized model produces; else on the float
            model's, quantized.
        refit: correct the weights for those inputs first; needs `propagate`.
        sweeps: rounds of descent after GPTQ; "search" always has all.
        damping: of the Hessian, in units of its mean diagonal.
        held_out: share of batches on which the strength of the refit is chosen.
    """

    method: str = "gptq"
    clip: bool = True
    propagate: bool = True
    refit: bool = True
    sweeps: int = SWEEPS
    damping: float = DAMPING
    held_out: float = 0.125

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"unknown method {self.method!r}.{nearest(self.method, METHODS)}")
        if not 0 < self.held_out < 1:
            raise OptionError(f"held_out = {self.held_out} is no share of the text")

    def require_family(self, family: str) -> None:
        """Refuse rows that the method does not make.

        Raises:
            OptionError: says which family they must have.
        """
        if self.method == "search" and family != "two-level":
            raise OptionError(
                f"method 'search' makes two-level rows, not {family!r}: give family='two-level', "
                "or use method 'gptq'"
            )

    @property
    def cross(self) -> bool:
        """Whether the refit's cross moments are needed."""
        return self.refit and self.propagate


@dataclass
class _Group:
    """Linears that read one value, or the experts of a product.

    Attributes:
        x: the value at which both streams stop: all that these linears read is known there.
    """

    x: fx.Node
    sites: list[tuple[fx.Node, LinearSite]]
    experts: ExpertGroup | None = None

    @property
    def name(self) -> str:
        """A matrix of the group."""
        return self.sites[0][1].matrix if self.experts is None else self.experts.site.matrices[0]


class QuantizingRun:
    """One calibrated quantization of a captured model.

    Attributes:
        weights: matrix name → its quantized weight, as far as the run has come.
        strengths: matrix name → λ of its refit, None where it kept the float weights.
        sparse: expert → tokens that reached it, where they are fewer than its inputs: nothing is
            fitted to so few, its codes are the nearest ones on clipped grids.
    """

    def __init__(
        self,
        captured: CapturedModel,
        wanted: Mapping[str, SitePlan],
        mode: str,
        recipe: Recipe,
        row_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            wanted: matrix name of the graph → its plan; other linears stay float.
            mode: of the activations, "token" or "group".
            row_weights: matrix name → [N] how much an error of each output matters.

        Raises:
            OptionError: too few batches to hold one out, or rows that the method does not make.
        """
        for plan in wanted.values():
            recipe.require_family(plan.family)
        self.captured, self.wanted, self.mode, self.recipe = captured, wanted, mode, recipe
        self.row_weights = row_weights or {}
        self.weights: dict[str, QuantizedWeight] = {}
        self.strengths: dict[str, float | None] = {}
        self.sparse: dict[str, int] = {}
        count = len(captured.batches)
        self._held = max(1, round(recipe.held_out * count)) if recipe.cross else 0
        if self._held >= count and recipe.cross:
            raise OptionError(
                f"a refit needs two batches of calibration text or more, not {count}: one is held "
                "out. Give more sequences, smaller batches, or refit=False"
            )

    def run(self, progress: Callable[[int, int], None] | None = None) -> dict[str, QuantizedWeight]:
        """Quantize everything that is wanted.

        Args:
            progress: called with (groups of linears done, groups in all).
        """
        graph = self.captured.graph
        groups = self._groups()
        late: dict[fx.Node, fx.Node] = {}  # what shows the routing is read at the last product
        for group in groups:
            late |= {} if group.experts is None else {group.experts.index: group.experts.node}
        segments = cut(graph.graph, [g.x for g in groups], late)
        plain = SegmentInterpreter(graph.module)
        floats = [self.captured.inputs(b) for b in range(len(self.captured.batches))]
        ours: list[Values] | None = None
        done = 0
        override: dict[fx.Node, Callable[..., Any]] = {}
        ready: dict[fx.Node, Tensor] = {}
        with torch.no_grad(), compat.fast_products():
            for segment in segments[:-1]:
                self._advance(segment, floats, plain, ready)
                if ours is None:
                    ours = [dict(values) for values in floats]
                elif self.recipe.propagate:
                    mixed = SegmentInterpreter(graph.module, override)
                    self._advance(segment, ours, mixed, ready)
                else:
                    ours = [dict(values) for values in floats]
                # A linear may lie behind the next cut: only what has run is forgotten.
                override = {n: f for n, f in override.items() if n not in segment.nodes}
                ready = {n: w for n, w in ready.items() if n not in segment.nodes}
                group = groups[done]
                if segment.nodes[-1] is not group.x:
                    raise _cannot_stop(group)
                override |= self._quantize(group, floats, ours)
                ready |= self._transformed(group)
                done += 1
                if progress is not None:
                    progress(done, len(groups))
        if done < len(groups):
            raise _cannot_stop(groups[done])
        return self.weights

    def _groups(self) -> list[_Group]:
        """Linears by the value they read, in the graph's order of those values."""
        graph = self.captured.graph
        place = {n: i for i, n in enumerate(graph.graph.nodes)}
        found: dict[fx.Node, _Group] = {}
        for node, site in graph.sites():
            x = node.args[0]
            if site.matrix in self.wanted and isinstance(x, fx.Node):
                found.setdefault(x, _Group(x, [])).sites.append((node, site))
        for group in found.values():
            formats = {(w.group, w.family) for _, s in group.sites for w in [self.wanted[s.matrix]]}
            if len(formats) > 1:
                names = ", ".join(site.matrix for _, site in group.sites)
                raise OptionError(f"{names} read one value; a plan gives them one group and family")
        for node, grouped in graph.grouped_sites():
            if all(name in self.wanted for name in grouped.matrices):
                experts = ExpertGroup.of(node, grouped)
                stop = max(experts.product.x, experts.product.offsets, key=place.__getitem__)
                found[node] = _Group(stop, [], experts)
        return sorted(found.values(), key=lambda g: place[g.x])

    def _advance(
        self,
        segment: Segment,
        streams: list[Values],
        interpreter: SegmentInterpreter,
        ready: Mapping[fx.Node, Any],
    ) -> None:
        """Run a segment in every batch; afterwards a stream holds what lies behind it."""
        for i, values in enumerate(streams):
            out = interpreter.run_segment(segment, {**values, **ready})
            streams[i] = self.captured.inputs(i) | out

    def _transformed(self, group: _Group) -> dict[fx.Node, Tensor]:
        """Rotated float weights, once for all batches."""
        found = {}
        if group.experts is not None:
            matrices = [self.captured.graph.matrices[n] for n in group.experts.site.matrices]
            if matrices[0].transform:
                turned = group.experts.product.weight.all_input_nodes[0]
                stack = torch.stack([m.value() for m in matrices])
                found[turned] = stack.to(matrices[0].binding.tensor.dtype)
        for node, site in group.sites:
            weight = node.args[1]
            matrix = self.captured.graph.matrices[site.matrix]
            if matrix.transform and isinstance(weight, fx.Node):
                found[weight] = matrix.value().to(matrix.binding.tensor.dtype)
        return found

    def _quantize(
        self, group: _Group, floats: list[Values], ours: list[Values]
    ) -> dict[fx.Node, Callable[..., Any]]:
        """Quantize the linears of a group; what to call in their place from now on."""
        if group.experts is not None:
            return self._quantize_experts(group.experts, floats, ours)
        matrices = self.captured.graph.matrices
        first = self.wanted[group.sites[0][1].matrix]
        k = group.sites[0][1].k
        names = list(dict.fromkeys(site.matrix for _, site in group.sites))
        fresh = [name for name in names if name not in self.weights]
        if fresh:
            x = ours[0][group.x]
            moments = Moments(k, x.device, self.recipe.cross)
            for i, (values, mine) in enumerate(zip(floats, ours, strict=True)):
                x_hat = dequantized(mine[group.x], self.mode, first.group).reshape(-1, k)
                target = values[group.x].reshape(-1, k) if self.recipe.cross else None
                moments.add(x_hat, target, i >= len(ours) - self._held)
            self._solve([matrices[name] for name in fresh], moments)
        shared = _Shared(self.mode, first.group)
        return {
            node: functools.partial(
                _linear, shared, self.weights[site.matrix].dequantize(torch.float32)
            )
            for node, site in group.sites
        }

    def _quantize_experts(
        self, group: ExpertGroup, floats: list[Values], ours: list[Values]
    ) -> dict[fx.Node, Callable[..., Any]]:
        """Quantize the experts of a product, one after the other: each has inputs of its own."""
        first = self.wanted[group.site.matrices[0]]
        rounded = functools.partial(dequantized, mode=self.mode, group=first.group)
        for e, name in enumerate(group.site.matrices):
            matrix, cross = self.captured.graph.matrices[name], self.recipe.cross
            if name in self.weights:
                continue
            moments = group.moments(e, floats, ours, self._held, cross, rounded)
            if moments.tokens >= matrix.k:
                self._solve([matrix], moments)
                continue
            self.sparse[name] = moments.tokens
            plan = self.wanted[name]
            self.weights[name] = quantize_rtn(
                matrix.value().float(),
                plan.widths,
                plan.group,
                matrix.transform,
                plan.family,
                clip=True,
                spans=plan.spans,
            )
        w_hats = [self.weights[name].dequantize(torch.float32) for name in group.site.matrices]
        return {group.node: functools.partial(expert_linears, rounded, w_hats)}

    def _solve(self, matrices: list[Matrix], moments: Moments) -> None:
        """Quantize siblings as one matrix: they share inputs, and their rows are independent."""
        recipe, h = self.recipe, moments.second()
        require_finite(h, matrices[0].name)
        wanted = [self.wanted[m.name] for m in matrices]
        w = torch.cat([m.value().float() for m in matrices])
        widths = torch.cat([p.widths for p in wanted]).to(w.device)
        if recipe.cross and 0 < moments.held_tokens < moments.tokens:
            weights = torch.cat([self.row_weights.get(m.name, torch.ones(m.n)) for m in matrices])
            share = moments.held_tokens / moments.tokens
            w, strength = refit(w, h, moments.cross(), *moments.held(), share, weights)
            self.strengths |= {m.name: strength for m in matrices}
        spans = [torch.ones_like(p.widths) if p.spans is None else p.spans for p in wanted]

        def coded_rows(rows: Tensor | slice, group: int) -> Encoded:
            longer = replace(wanted[0], group=group, spans=None)
            return self.encode(w[rows], longer, widths[rows], h, matrices[0].name)

        coded = by_span(torch.cat(spans).to(w.device), wanted[0].group, coded_rows)
        parts = coded.split([m.n for m in matrices])
        for matrix, part, plan in zip(matrices, parts, wanted, strict=True):
            self.weights[matrix.name] = part.stored(matrix.transform, plan.spans)

    def encode(self, w: Tensor, wanted: SitePlan, widths: Tensor, h: Tensor, name: str) -> Encoded:
        """Codes of W [N, K], for inputs of second moment H; `name` is for errors."""
        recipe, group, family = self.recipe, wanted.group, wanted.family
        if recipe.method == "rtn":
            importance = h.diagonal()
            return encode(w, widths, group, family, importance=importance, clip=recipe.clip)
        factor = factorize(h, group, name, recipe.damping)
        if recipe.method == "search":
            return quantize_by_search(w, widths, h, factor, group)
        return quantize_gptq(
            w, widths, h, factor, group, family, clip=recipe.clip, sweeps=recipe.sweeps
        )


def _cannot_stop(group: _Group) -> UnsupportedModel:
    return UnsupportedModel(
        f"the graph cannot be cut at the input of {group.name} to quantize it; "
        "quantize without calibration text"
    )


def dequantized(x: Tensor, mode: str, group: int) -> Tensor:
    """x̂ [..., K]: what is left of x [..., K] once it is int8; fp32."""
    codes, scales, _ = quantize_activation(x, mode, group)
    k = x.shape[-1]
    if scales.shape[-1] == 1:
        return codes[..., :k].float() * scales
    return codes[..., :k].float() * spread(scales, k, group)


class _Shared:
    """x̂ of the value that siblings read, quantized once."""

    def __init__(self, mode: str, group: int) -> None:
        self.mode, self.group = mode, group
        self._last: tuple[Tensor, Tensor] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self._last is None or self._last[0] is not x:
            self._last = x, dequantized(x, self.mode, self.group)
        return self._last[1]


def _linear(
    shared: _Shared, w_hat: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The quantized linear's float value; a node's arguments say x, the float weight, the bias."""
    y = shared(x) @ w_hat.t()
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def quantize_model(
    model: nn.Module,
    plan: Plan,
    ids: Tensor,
    recipe: Recipe,
    *,
    batch: int = 8,
    row_weights: Mapping[str, Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
    keep: bool = False,
) -> dict[str, QuantizedWeight]:
    """Quantize everything that a plan plans, calibrated on token ids [S, T].

    Args:
        batch: sequences that go through the model together, at most.
        row_weights: planned name → [N], see `QuantizingRun`.
        keep: remember the result for this model's float weights: compiling it with this plan
            finds them quantized.

    Returns:
        Planned name → quantized weight.

    Raises:
        PlanMismatch: the plan was made for another model.
        UnsupportedModel: the model cannot be captured in one graph.
    """
    first = next(iter(plan.sites.values()))
    options = Options(plan=plan, group=first.group, rotate=plan.rotation, quiet=True)
    size = even_batch(len(ids), min(batch, max(1, len(ids) // 2)))
    captured = capture_model(model, ids.split(size), options)
    matrices = {m.name: m for m in captured.graph.active()}
    own = fingerprint({name: m.stored() for name, m in matrices.items()})
    names = {o: p for o, p in plan.match(own, subset=True).items() if p in plan.sites}
    float_here = {m.name for m in captured.graph.matrices.values() if m.kept_float}
    missing = sorted(plan.sites.keys() - set(names.values()) - float_here)
    if missing:
        raise PlanMismatch(
            f"the plan has {missing[0]} ({len(missing)} of {len(plan.sites)} in all), which is no "
            "linear of this model's captured graph"
        )
    wanted = {o: plan.sites[p] for o, p in names.items()}
    weights = {o: row_weights[p] for o, p in names.items() if row_weights and p in row_weights}
    run = QuantizingRun(captured, wanted, plan.activation_mode, recipe, weights)
    found = run.run(progress)
    if run.sparse:
        least = min(run.sparse, key=run.sparse.__getitem__)
        log.warning(
            "mixllm: %d experts saw fewer tokens than they have inputs (%s %d) and were rounded to "
            "nearest; calibrate on more text: %s",
            len(run.sparse),
            least,
            run.sparse[least],
            ", ".join(run.sparse),
        )
    if keep:
        for name, weight in found.items():
            matrix = matrices[name]
            matrix.widths, matrix.spans = wanted[name].widths, wanted[name].spans
            key = packing_key(matrix, first.group, first.family)
            CACHE.put(matrix.binding.tensor, key, pack(weight, "plain.v1"))
    return {names[o]: weight for o, weight in found.items()}
