"""How far a quantized model is from its float model, window by window of a text.

The float model runs once per window, every candidate once, and only two sets of logits are in
memory at a time. All candidates see the same windows, so differences between them are paired:
their standard errors are far below those of the values themselves.
"""

from __future__ import annotations

import inspect
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import OptionError
from ..formats.files import write_whole
from .text import Windows

# A module or a compiled function: ids [B, T] → logits [B, T, V], or an output that has `logits`.
CausalLM = Callable[..., Any]

_CHUNK = 1 << 21  # logits turned into float64 at a time: 16 MB each


class Estimate(NamedTuple):
    """A value and its standard error (NaN where one window says nothing about it)."""

    value: float
    se: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ± {self.se:.1g}"


class Comparison(NamedTuple):
    """One window: means over its predicted tokens."""

    float_loss: float
    loss: float
    kl: float
    agreement: float


@dataclass(frozen=True)
class Quality:
    """What a quantized model predicts, against its float model.

    Attributes:
        tokens, bytes: predicted in all windows; every window has equally many tokens.
        float_loss, loss: nats per token of the float and of the quantized model, per window.
        kl: KL(float ‖ quantized) in nats per token, per window.
        agreement: share of tokens whose most likely successor is the same, per window.
    """

    tokens: int
    bytes: int
    float_loss: tuple[float, ...] = field(repr=False)
    loss: tuple[float, ...] = field(repr=False)
    kl: tuple[float, ...] = field(repr=False)
    agreement: tuple[float, ...] = field(repr=False)

    @property
    def mean_kl(self) -> Estimate:
        return mean(self.kl)

    @property
    def top1(self) -> Estimate:
        """Agreement of the most likely token."""
        return mean(self.agreement)

    @property
    def perplexity(self) -> float:
        return math.exp(mean(self.loss).value)

    @property
    def float_perplexity(self) -> float:
        return math.exp(mean(self.float_loss).value)

    @property
    def bits_per_byte(self) -> float:
        return mean(self.loss).value * self.tokens / self.bytes / math.log(2)

    @property
    def float_bits_per_byte(self) -> float:
        return mean(self.float_loss).value * self.tokens / self.bytes / math.log(2)

    def to_json(self) -> dict[str, Any]:
        """The figures, and the values per window that `from_json` reads."""
        figures = {
            "perplexity": self.perplexity,
            "float_perplexity": self.float_perplexity,
            "kl": self.mean_kl._asdict(),
            "top1": self.top1._asdict(),
            "bits_per_byte": self.bits_per_byte,
            "float_bits_per_byte": self.float_bits_per_byte,
        }
        return _finite({**figures, "windows": asdict(self)})

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Quality:
        """Inverse of `to_json`."""
        stored = document["windows"]
        lists = {
            key: tuple(math.nan if x is None else x for x in values)
            for key, values in stored.items()
            if isinstance(values, list)
        }
        return cls(**{**stored, **lists})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one JSON file; it is there whole or not at all."""
        write_whole(path, (json.dumps(self.to_json(), indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Quality:
        """Read what `save` wrote."""
        return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))


def mean(values: Sequence[float]) -> Estimate:
    """Mean over windows, with the standard error of independent ones."""
    count = len(values)
    middle = math.fsum(values) / count
    if count == 1:
        return Estimate(middle, math.nan)
    variance = math.fsum((v - middle) ** 2 for v in values) / (count - 1)
    return Estimate(middle, math.sqrt(variance / count))


def kl_ratio(quality: Quality, baseline: Quality) -> Estimate:
    """Mean KL of one model over that of another on the same windows.

    The standard error is that of a ratio of paired means (delta method): what counts is the
    spread of kl − ratio·baseline, in which windows that are hard for both cancel.

    Raises:
        OptionError: the two were not measured on equally many windows.
    """
    if len(quality.kl) != len(baseline.kl):
        raise OptionError(
            f"{len(quality.kl)} and {len(baseline.kl)} windows are not the same windows"
        )
    below = mean(baseline.kl).value
    if below == 0:
        return Estimate(math.nan, math.nan)
    ratio = mean(quality.kl).value / below
    residuals = [a - ratio * b for a, b in zip(quality.kl, baseline.kl, strict=True)]
    return Estimate(ratio, mean(residuals).se / below)


def compare(
    float_model: CausalLM,
    candidates: Mapping[str, CausalLM],
    windows: Windows,
    *,
    device: torch.device | str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Quality]:
    """Measure quantized models against their float model on the same windows.

    Args:
        float_model: in eval mode; a module, or a function of ids [1, T].
        candidates: name → quantized model, likewise. Compiled models compile at their first
            window.
        windows: see `text.read_windows`.
        device: where ids go; by default where the float model's parameters are, else the CPU.
        progress: called with (model runs done, model runs in all).

    Returns:
        Name → `Quality`, in the order of `candidates`.
    """
    if device is None:
        device = _device(float_model)
    runs, done = len(windows) * (1 + len(candidates)), 0
    found: dict[str, list[Comparison]] = {name: [] for name in candidates}
    with torch.no_grad():
        for row in windows.ids:
            ids = row.to(device)
            reference = logits(float_model, ids)
            done = _tell(progress, done, runs)
            for name, model in candidates.items():
                found[name].append(compare_logits(reference, logits(model, ids), ids))
                done = _tell(progress, done, runs)
    size = sum(windows.bytes)
    return {
        name: Quality(windows.tokens, size, *zip(*values, strict=True))
        for name, values in found.items()
    }


def logits(model: CausalLM, ids: Tensor) -> Tensor:
    """[T, V] of one window of ids [T], without a cache."""
    forward = model.forward if isinstance(model, nn.Module) else model
    parameters = inspect.signature(forward).parameters
    extra = {"use_cache": False} if "use_cache" in parameters else {}
    output = model(ids.unsqueeze(0), **extra)
    found: Tensor = output if isinstance(output, Tensor) else output.logits
    return found[0]


def compare_logits(reference: Tensor, candidate: Tensor, ids: Tensor) -> Comparison:
    """Compare logits [T, V] that two models give for ids [T]; arithmetic in float64.

    Logits of −inf (padded vocabularies) are probabilities of 0 and add nothing to the KL.
    """
    labels = ids[1:]
    count = len(labels)
    sums = torch.zeros(4, dtype=torch.float64)
    step = max(1, _CHUNK // reference.shape[-1])
    for at in range(0, count, step):
        rows = slice(at, min(at + step, count))
        p = reference[rows].double().log_softmax(-1)
        q = candidate[rows].double().log_softmax(-1)
        truth = labels[rows].unsqueeze(1)
        same = p.argmax(-1) == q.argmax(-1)
        losses = -p.gather(1, truth).sum(), -q.gather(1, truth).sum()
        weight = p.exp()
        kl = (weight * (p - q).masked_fill_(weight == 0, 0)).sum()
        sums += torch.stack([*losses, kl, same.sum().double()]).cpu()
    return Comparison(*(sums / count).tolist())


def _device(model: CausalLM) -> torch.device:
    tensor = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    return torch.device("cpu") if tensor is None else tensor.device


def _tell(progress: Callable[[int, int], None] | None, done: int, runs: int) -> int:
    if progress is not None:
        progress(done + 1, runs)
    return done + 1


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
