"""Which scale and shift each published method gives an activation's channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..calibration.statistics import ChannelStatistics
from ..formats.row_format import DEFAULT_GROUP, RowFormat
from ..quantizers.rtn import rounding_error
from ..transforms import channels
from ..transforms.hadamard import block_hadamard
from .producers import Producer

_FORMAT = RowFormat(4, DEFAULT_GROUP, "asym")  # that AWQ's search rounds to


@dataclass(frozen=True)
class Inputs:
    """What a method knows about one activation.

    Attributes:
        seen: statistics over the calibration text.
        weights: float [N, K] of all linears that read it, one below the other.
        producer: what a scale can be folded into, or None.
        block: of the Hadamard transform that will follow, 0 for none.
    """

    seen: ChannelStatistics
    weights: Tensor
    producer: Producer | None
    block: int

    def tied(self, values: Tensor) -> Tensor:
        """Equal where channels come from one row of the producer."""
        return values if self.producer is None else self.producer.tied(values)

    @property
    def normed(self) -> bool:
        """Whether a norm produces it."""
        return self.producer is not None and all(t.dim() == 1 for t in self.producer.tensors)

    def rounding(self, s: Tensor) -> float:
        """Squared error of the outputs of sampled tokens with weights scaled by s and rounded."""
        x, w = self.seen.sample.float() / s.float(), self.weights.float() * s.float()
        if self.block:
            x, w = block_hadamard(x, self.block), block_hadamard(w, self.block)
        return float((x @ rounding_error(w, _FORMAT, None, False).t()).square().sum())


Channels = tuple[Tensor | None, Tensor | None]
"""s and z, [K]; None for ones and zeros."""


def _awq(inputs: Inputs, alpha: float | None) -> Channels:
    def scale(exponent: float) -> Tensor:
        return inputs.tied(channels.awq_scale(inputs.seen.mean_abs, exponent))

    return channels.best_alpha(scale, inputs.rounding) if alpha is None else scale(alpha), None


def _smoothquant(inputs: Inputs, alpha: float | None) -> Channels:
    exponent = 0.5 if alpha is None else alpha
    strongest = inputs.weights.abs().amax(0)
    return inputs.tied(channels.smooth_scale(inputs.seen.max_abs, strongest, exponent)), None


def _outliertune(inputs: Inputs, alpha: float | None) -> Channels:
    shift = inputs.tied(channels.centre(inputs.seen.low, inputs.seen.high))
    scale = channels.static_scale(inputs.seen.low - shift, inputs.seen.high - shift)
    return inputs.tied(scale), shift


def _mergequant(inputs: Inputs, alpha: float | None) -> Channels:
    """Only behind norms, where the step costs nothing."""
    seen = inputs.seen
    return (channels.static_scale(seen.low, seen.high) if inputs.normed else None), None


METHODS: dict[str, Callable[[Inputs, float | None], Channels]] = {
    "awq": _awq,
    "smoothquant": _smoothquant,
    "outliertune": _outliertune,
    "mergequant": _mergequant,
}
SHIFTING = ("outliertune",)
"""Those that shift channels too."""
