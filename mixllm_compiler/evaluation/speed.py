"""Tokens per second of prefill and decode, as `generate` gives them to its caller.

Every model runs in the form its owner chose (eager, compiled, quantized); all of them take
turns, so that what else the machine does meets all alike, and medians are reported.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import OptionError


@dataclass(frozen=True)
class Speed:
    """Median speeds of one model.

    Attributes:
        prefill: tokens of the prompt per second, until the first new token is there.
        decode: new tokens per second after the first.
        warm_up: seconds of the first call, compilation included.
        prefills, decodes: the single measurements, in order.
    """

    prefill: float
    decode: float
    warm_up: float
    prefills: tuple[float, ...]
    decodes: tuple[float, ...]


def measure_speed(
    models: Mapping[str, Any],
    *,
    prompt: Tensor | int = 128,
    new_tokens: int = 32,
    repeats: int = 5,
    progress: Callable[[int, int], None] | None = None,
    **generation: Any,
) -> dict[str, Speed]:
    """Greedy generation from one prompt, model by model and repeat by repeat.

    Args:
        models: name → a model with `generate`. Compiled models must run compiled code there:
            `mixllm_compiler.compile(model)` or `model.compile()`, not `torch.compile(model)`.
        prompt: ids [B, T], or T for so many arbitrary tokens.
        new_tokens: tokens to generate, at least 2; the first belongs to prefill.
        repeats: after two calls of each model that compile and warm up.
        progress: called with (calls done, calls in all).
        generation: more arguments of `generate`, e.g. `cache_implementation="static"`.

    Raises:
        OptionError: nothing to measure.
    """
    if not models or repeats < 1 or new_tokens < 2:
        raise OptionError("speed needs a model, a repeat and at least 2 new tokens")
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    warm: dict[str, float] = {}
    done, calls = 0, (repeats + 2) * len(models)
    # The second call settles what the first one marked as changing (shapes of a growing cache).
    for turn in range(repeats + 2):
        for name, model in models.items():
            ids = _prompt(model, prompt)
            started = time.perf_counter()
            speeds = _once(model, ids, new_tokens, generation)
            warm.setdefault(name, time.perf_counter() - started)
            if turn >= 2:
                runs[name].append(speeds)
            done += 1
            if progress is not None:
                progress(done, calls)
    found = {}
    for name, values in runs.items():
        prefills, decodes = zip(*values, strict=True)
        found[name] = Speed(
            statistics.median(prefills), statistics.median(decodes), warm[name], prefills, decodes
        )
    return found


class _Clock:
    """A streamer of `generate`: notes when the prompt and each token come by."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        # `generate` hands over tokens on the CPU, so the device has finished them.
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left to do."""


def _once(
    model: Any, ids: Tensor, new_tokens: int, generation: Mapping[str, Any]
) -> tuple[float, float]:
    clock = _Clock()
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        streamer=clock,
        **{"pad_token_id": 0, **generation},
    )
    started, first, *_, last = clock.times
    batch, length = ids.shape
    return batch * length / (first - started), batch * (new_tokens - 1) / (last - first)


def _prompt(model: Any, prompt: Tensor | int) -> Tensor:
    device = next(model.parameters()).device
    if isinstance(prompt, Tensor):
        return prompt.to(device)
    draw = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (1, prompt), generator=draw).to(device)
