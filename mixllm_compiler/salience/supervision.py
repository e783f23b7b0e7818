"""Which tokens have a loss, what their labels are, and the loss's gradient at the logits.

The gradient of cross-entropy is softmax − onehot(label): it is written down, a few tokens at a
time, and not left to autograd, which would hold three arrays of tokens × vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import OptionError, UnsupportedModel
from .kinds import MIN_TOKENS, ScoreSpec

_CHUNK = 1 << 22  # numbers of tokens × vocabulary in fp32 at a time


@dataclass(frozen=True)
class LossInputs:
    """Where the loss of a graph comes from.

    Attributes:
        ids: placeholder of token ids [B, T], None if there is none.
        mask: placeholder that says which tokens are real, None if all are.
        logits: the value that is the logits [B, T, V], None if the graph has none.
        activations: floating-point placeholders that are no weights.
        outputs: all values that the graph returns.
    """

    ids: fx.Node | None
    mask: fx.Node | None
    logits: fx.Node | None
    activations: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    def batch(self, inputs: Mapping[fx.Node, Any]) -> int:
        """Sequences in these inputs."""
        for node in (self.ids, *self.activations):
            if node is not None and inputs[node].dim() >= 2:
                return int(inputs[node].shape[0])
        return 1


@dataclass(frozen=True)
class Supervision:
    """Tokens of one batch that have a loss.

    Attributes:
        weights: fp32 [B, T'], 0 where a position has no loss; T' positions have logits.
        labels: int64 [B, T'] next tokens, None where they are drawn from the model.
        reach: bool [B, T], positions whose values a loss depends on; None if all are.
        name: of the loss, for people.
    """

    weights: Tensor
    labels: Tensor | None
    reach: Tensor | None
    name: str

    @property
    def tokens(self) -> Tensor:
        """fp64 [B], the summed weights of each sequence."""
        return self.weights.double().sum(1).cpu()


def supervise(
    logits: Tensor,
    inputs: Mapping[fx.Node, Any],
    where: LossInputs,
    spec: ScoreSpec,
    token_weights: Tensor | None = None,
) -> Supervision:
    """What is supervised in a batch whose logits are [B, T', V]; their values are not read.

    Position t predicts token t + 1, whose mask and weight count. Logits that do not cover the ids
    (the last position only) are all supervised, by labels drawn from the model.

    Args:
        token_weights: [B, T] of this batch; 0 means no loss on that token.
    """
    (b, t), device = logits.shape[:2], logits.device
    ids = inputs[where.ids] if where.ids is not None else None
    mask = inputs[where.mask] if where.mask is not None else None
    if ids is None or ids.shape[1] != t or t < 2:
        return Supervision(torch.ones(b, t, device=device), None, None, "sampled labels")
    weights = torch.zeros(b, t, device=device)
    weights[:, :-1] = 1
    real = None
    if mask is not None and mask.shape == ids.shape:
        real = mask != 0
        weights[:, :-1] *= real[:, 1:]
    if token_weights is not None:
        weights[:, :-1] *= token_weights[:, 1:].to(weights)
    # Attention looks back only: a position matters to the losses at and after it.
    reach = (weights > 0).flip(1).cumsum(1).flip(1) > 0
    if real is not None:
        reach &= real
    labels = None
    if spec.labels == "text":
        labels = torch.cat((ids[:, 1:], ids[:, :1]), 1)
    return Supervision(weights, labels, reach, "sampled labels" if labels is None else "next-token")


def everything(inputs: Mapping[fx.Node, Any], where: LossInputs) -> Supervision:
    """All real tokens of a batch, for statistics of inputs without a loss."""
    ids = inputs[where.ids] if where.ids is not None else None
    if ids is None:
        rows = [inputs[n].shape[:-1].numel() for n in where.activations]
        size = where.batch(inputs)
        return Supervision(torch.ones(size, max(rows, default=size) // size), None, None, "")
    mask = inputs[where.mask] if where.mask is not None else torch.ones_like(ids)
    return Supervision((mask != 0).float(), None, mask != 0, "")


def supervised_tokens(inputs: Mapping[fx.Node, Any], where: LossInputs) -> int:
    """How many tokens of a batch a loss would cover."""
    ids = inputs[where.ids] if where.ids is not None else None
    if isinstance(ids, Tensor):
        return int(ids.shape[0] * max(ids.shape[1] - 1, 1))
    rows = (inputs[n].shape[:-1].numel() for n in where.activations)
    return int(max(rows, default=0))


def check_tokens(ids: Tensor, weights: Tensor | None) -> None:
    """Whether these ids [S, T] and weights [S, T] or None are enough to score on.

    Raises:
        OptionError: too few tokens have a loss; weights of another shape, negative or not finite.
    """
    if weights is None:
        tokens = ids.shape[0] * (ids.shape[1] - 1)
    elif weights.shape != ids.shape:
        raise OptionError(
            f"token_weights are {list(weights.shape)}, the token ids {list(ids.shape)}; give one "
            "weight for each token"
        )
    elif not bool((weights >= 0).all() and weights.isfinite().all()):
        raise OptionError("token_weights must be finite numbers from 0 on")
    else:
        tokens = int((weights[:, 1:] > 0).sum())
    if tokens < MIN_TOKENS:
        raise OptionError(
            f"{tokens} tokens have a loss ({ids.shape[0]} sequences of {ids.shape[1]}, the "
            f"first without one), fewer than the {MIN_TOKENS} that scores need; give more text"
        )


def loss_scale(weights: Tensor, kind: str) -> Tensor:
    """By what a token's gradient is multiplied so that its loss has its weight in a score.

    Squares of gradients add up to the curvature of Σ w ℓ if each has √w; a first-order change
    has w.
    """
    return weights if kind == "paper" else weights.sqrt()


def output_gradient(p: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
    """Gradient of cross-entropy at logits with softmax p [t, V] (overwritten), times scale [t]."""
    p.scatter_add_(1, labels[:, None], torch.full_like(labels, -1)[:, None].to(p.dtype))
    return p.mul_(scale[:, None])


def probabilities(logits: Tensor) -> Tensor:
    """fp32 softmax of [t, V].

    Raises:
        UnsupportedModel: NaN or +inf; −inf may be meant (a padded vocabulary).
    """
    if not bool((logits < math.inf).all()):
        raise UnsupportedModel(
            "the float model's own logits are NaN or infinite, so it cannot be scored; check "
            "its weights, or load it in bfloat16 or float32 if it is in float16"
        )
    return logits.float().softmax(-1)


def draw(p: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [t]: one label for each row of p [t, V] by inversion of its distribution."""
    total = p.cumsum(-1, dtype=torch.float64 if p.shape[-1] > 1 << 16 else torch.float32)
    at = torch.rand(len(p), 1, generator=generator, device=p.device, dtype=total.dtype)
    found = torch.searchsorted(total, at * total[:, -1:], right=True).squeeze(1)
    return found.clamp_max_(p.shape[-1] - 1)


def generator_of(device: torch.device, seed: int, sequence: int) -> torch.Generator:
    """Every sequence draws labels of its own, whatever batch it is in.

    The CPU's generator reads 32 bits of a seed.
    """
    return torch.Generator(device).manual_seed((100_003 * seed + sequence) % (1 << 32))


def chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Positions of one sequence, in pieces of at most `_CHUNK` logits."""
    step = max(1, _CHUNK // vocabulary)
    return (slice(at, min(at + step, tokens)) for at in range(0, tokens, step))


@dataclass(frozen=True)
class TokenGradients:
    """Gradients at the logits of some tokens of one sequence.

    Attributes:
        sequence: index in the batch.
        part: positions.
        gradient: fp32 [t, V] of the tokens' weighted losses.
        curvature: fp32 [V], Σ_t w_t p(1 − p): the exact mean over labels of squared gradients.
    """

    sequence: int
    part: slice
    gradient: Tensor
    curvature: Tensor


def token_gradients(
    logits: Callable[[int, slice], Tensor],
    vocabulary: int,
    found: Supervision,
    spec: ScoreSpec,
    first: int,
) -> Iterator[TokenGradients]:
    """Gradients of the summed losses, a few tokens at a time, where there is a loss at all.

    Args:
        logits: (sequence of the batch, positions) → [t, V]; asked for once each.
        first: index of the batch's first sequence in the whole data.
    """
    scale = loss_scale(found.weights, spec.kind)
    device = scale.device
    for b in range(len(scale)):
        generator = generator_of(device, spec.seed, first + b)
        for part in chunks(scale.shape[1], vocabulary):
            if not bool((scale[b, part] > 0).any()):
                continue
            p = probabilities(logits(b, part))
            curvature = found.weights[b, part] @ (p - p * p)
            labels = draw(p, generator) if found.labels is None else found.labels[b, part]
            yield TokenGradients(b, part, output_gradient(p, labels, scale[b, part]), curvature)


def logit_gradient(logits: Tensor, found: Supervision, spec: ScoreSpec, first: int) -> Tensor:
    """Gradient of the summed losses [B, T', V] in the logits' dtype; see `token_gradients`."""
    gradient = torch.zeros_like(logits)
    pieces = token_gradients(lambda b, t: logits[b, t], logits.shape[-1], found, spec, first)
    for piece in pieces:
        gradient[piece.sequence, piece.part] = piece.gradient.to(logits.dtype)
    return gradient


def projection_gradients(
    outputs: Sequence[Any], spec: ScoreSpec, first: int
) -> tuple[dict[int, Tensor], int]:
    """(index of an output → random gradient / √width, tokens), for graphs without logits."""
    found, tokens = {}, 1
    for i, out in enumerate(outputs):
        if isinstance(out, Tensor) and out.requires_grad and out.is_floating_point():
            direction = torch.randn(
                out.shape, generator=generator_of(torch.device("cpu"), spec.seed, first)
            )
            found[i] = (direction / out.shape[-1] ** 0.5).to(out)
            tokens = max(tokens, out.numel() // out.shape[-1])
    return found, tokens
