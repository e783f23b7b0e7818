"""Scores of output features from one backward pass over a captured float graph.

For y = x Wᵀ and a change Δ of row n, the first-order change of the loss of sequence d is
Σ_t δ_t (x_t·Δ), with δ the gradient at the output. No gradient of a weight is ever formed, so
weights need no `requires_grad` and memory is that of the activations.

Kinds (A_d = Σ_t δ_t (x_t·Δ), δ from the *summed* token losses, T tokens a sequence):
    fisher-sequence   ½ mean_d A_d² / T            nats per token; adds up over layers
    paper             mean_d |u + ½u²|, u = A_d/T   MixLLM eq. 4: arXiv 2412.14590
    weight-error      ‖Δ‖²                          no gradient: the announced fallback
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from ..errors import UnsupportedModel
from ..formats.row_format import RowFormat
from ..ir import ops, reference
from ..quantizers.rtn import quantize_rows

GRADIENT_KINDS = ("fisher-sequence", "paper")
KINDS = (*GRADIENT_KINDS, "weight-error")


@dataclass(frozen=True)
class Probe:
    """One linear to score: its matrix, the node of its input, and the float rows [N, K]."""

    matrix: str
    x: fx.Node
    weight: Callable[[], Tensor]


@dataclass
class Tally:
    """Running sums over sequences: what becomes the scores of a model.

    Attributes:
        kind: a gradient kind.
        formats: candidate formats F.
        sums: fp64 [N, F] per matrix.
        sequences, tokens: supervised so far.
        loss: which loss was differentiated, for people.
    """

    kind: str
    formats: tuple[RowFormat, ...]
    sums: dict[str, Tensor] = field(default_factory=dict)
    sequences: int = 0
    tokens: int = 0
    loss: str = ""

    def add(self, per_sequence: Mapping[str, Tensor], sequences: int, tokens: int) -> None:
        """Add one batch: A [B, N, F] per matrix; `tokens` over the whole batch."""
        length = tokens / sequences
        for name, a in per_sequence.items():
            a = a.double()
            if self.kind == "paper":
                u = a / length
                part = (u + 0.5 * u * u).abs().sum(0)
            else:
                part = 0.5 * a.square().sum(0) / length
            self.sums[name] = self.sums.get(name, 0) + part.cpu()
        self.sequences += sequences
        self.tokens += tokens

    def losses(self) -> dict[str, Tensor]:
        """fp32 [N, F] per matrix, the mean over sequences."""
        return {name: (s / self.sequences).float() for name, s in self.sums.items()}


class Profiler(fx.Interpreter):
    """Runs a float graph with real weights and takes A [B, N, F] at every probe."""

    def __init__(
        self, gm: fx.GraphModule, probes: Mapping[fx.Node, Probe], formats: Sequence[RowFormat]
    ) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.probes = probes
        self.formats = formats
        self.batch = 1
        self.found: dict[str, Tensor] = {}

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is ops.HADAMARD:  # the op has no gradient, its meaning in plain torch does
            target = reference.hadamard
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch._C._set_grad_enabled:
            return None  # a no_grad region of the model must not cut the gradient
        y = super().run_node(n)
        probe = self.probes.get(n)
        if probe is None:
            return y
        if not y.requires_grad:
            y = y.detach().requires_grad_()  # a leaf: nothing before it needs a gradient
        x = self.env[probe.x].detach()

        def hook(dy: Tensor) -> None:
            self._take(probe, x, dy)

        y.register_hook(hook)
        return y

    def _take(self, probe: Probe, x: Tensor, dy: Tensor) -> None:
        with torch.no_grad():
            w = probe.weight().float()
            x, dy = x.float(), dy.float()
            columns = []
            for fmt in self.formats:
                delta = quantize_rows(w, fmt).dequantize(torch.float32) - w
                z = F.linear(x, delta) * dy
                columns.append(z.reshape(self.batch, -1, z.shape[-1]).sum(1))
            a = torch.stack(columns, -1)
        # A weight used twice: the change happens in both places at once.
        seen = self.found.get(probe.matrix)
        self.found[probe.matrix] = a if seen is None else seen + a


@dataclass(frozen=True)
class LossInputs:
    """Where the loss of a graph comes from.

    Attributes:
        ids: index of the input that holds token ids [B, T], None if there is none.
        mask: index of the input that says which tokens are real, None if all are.
        logits: index of the output that holds logits [B, T, V], None if there is none.
        activations: indices of floating-point inputs that are no weights.
    """

    ids: int | None
    mask: int | None
    logits: int | None
    activations: tuple[int, ...] = ()

    def batch(self, inputs: Sequence[Any]) -> int:
        """Sequences in these inputs."""
        for index in (self.ids, *self.activations):
            if index is not None and inputs[index].dim() >= 2:
                return int(inputs[index].shape[0])
        return 1


def profile(
    gm: fx.GraphModule,
    inputs: Sequence[Any],
    probes: Mapping[fx.Node, Probe],
    where: LossInputs,
    tally: Tally,
    seed: int = 0,
) -> Any:
    """Score one batch into `tally`; returns the graph's outputs, detached.

    Works under no_grad and inference_mode. The loss is next-token cross-entropy if the logits
    cover the ids, else cross-entropy to labels sampled from the model (an own-logits KL has no
    gradient), else a random projection of the floating-point outputs.
    """
    with torch.inference_mode(False), torch.enable_grad():
        own = [_own(v) for v in inputs]
        run = Profiler(gm, probes, tally.formats)
        ids = own[where.ids] if where.ids is not None else None
        run.batch = where.batch(own)
        outputs = run.run(*own)
        flat = outputs if isinstance(outputs, tuple | list) else (outputs,)
        mask = own[where.mask] if where.mask is not None else None
        logits = flat[where.logits] if where.logits is not None else None
        loss, tokens, kind = _loss(logits, ids, mask, flat, seed)
        if loss is not None and loss.requires_grad:
            loss.backward()
            tally.loss = kind
            tally.add(run.found, run.batch, tokens)
        # Values hold the hooks and hooks hold the run: a cycle of gigabytes, until it is cut.
        run.env.clear()
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach(), outputs)


def supervised_tokens(inputs: Sequence[Any], where: LossInputs) -> int:
    """How many tokens of these inputs a loss would cover."""
    ids = inputs[where.ids] if where.ids is not None else None
    if isinstance(ids, Tensor):
        return int(ids.shape[0] * max(ids.shape[1] - 1, 1))
    rows = (inputs[i].numel() // inputs[i].shape[-1] for i in where.activations)
    return int(max(rows, default=0))


def _own(value: Any) -> Any:
    """Inputs of our own: caches must not be written twice, inference tensors cannot be traced."""
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if isinstance(value, nn.Parameter):
        return value.detach().clone() if value.is_inference() else value.detach()
    return value.detach().clone() if isinstance(value, Tensor) else value


def _loss(
    logits: Tensor | None,
    ids: Tensor | None,
    mask: Tensor | None,
    outputs: Sequence[Any],
    seed: int,
) -> tuple[Tensor | None, int, str]:
    """(summed loss, supervised tokens, name)."""
    if logits is not None and logits.dim() == 3:
        # -inf may be meant (a padded vocabulary); NaN and +inf give no gradient and no labels.
        if not bool((logits.detach() < math.inf).all()):
            raise UnsupportedModel(
                "the float model's own logits are NaN or infinite, so it cannot be scored; check "
                "its weights, or load it in bfloat16 or float32 if it is in float16"
            )
        if ids is not None and logits.shape[1] == ids.shape[1] > 1:
            labels = ids[:, 1:].clone()
            if mask is not None and mask.shape == ids.shape:
                labels[mask[:, 1:] == 0] = -100
            flat = logits[:, :-1].flatten(0, 1).float()
            tokens = int((labels != -100).sum())
            total = F.cross_entropy(flat, labels.flatten(), reduction="sum")
            return total, max(tokens, 1), "next-token"
        flat = logits.flatten(0, 1).float()
        draw = torch.Generator(flat.device).manual_seed(seed)
        labels = torch.multinomial(flat.detach().softmax(-1), 1, generator=draw).flatten()
        total = F.cross_entropy(flat, labels, reduction="sum")
        return total, flat.shape[0], "sampled labels"
    summed: Tensor | None = None
    tokens = 1
    for out in outputs:
        if isinstance(out, Tensor) and out.requires_grad and out.is_floating_point():
            draw = torch.Generator().manual_seed(seed)
            direction = torch.randn(out.shape, generator=draw).to(out.device)
            part = (out.float() * direction).sum() / out.shape[-1] ** 0.5
            summed = part if summed is None else summed + part
            tokens = max(tokens, out.numel() // out.shape[-1])
    return summed, tokens, "random projection"


def weight_error(weight: Tensor, formats: Sequence[RowFormat]) -> Tensor:
    """fp32 [N, F]: ‖Δ‖² of every row, the score that needs no data."""
    w = weight.float()
    errors = [(quantize_rows(w, f).dequantize(torch.float32) - w).square().sum(1) for f in formats]
    return torch.stack(errors, 1)
