"""A forward of the model's own, so that models do not share Dynamo's recompile limit.

Every transformers model is compiled through one and the same decorator frame; past 8 graphs of
that code object, Dynamo runs further models in float without a word.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import torch


def own_frame(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` behind a function with a new code object; its signature stays visible."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    clone = types.FunctionType(
        call.__code__.replace(), call.__globals__, "forward", None, call.__closure__
    )
    return functools.wraps(forward)(clone)


class CompiledForward:
    """What stands in for `model.forward`; a deep copy of the model gets one of its own.

    As a plain function it would be shared by the copy, which would then run with the weights of
    the model it was copied from.
    """

    def __init__(self, forward: Callable[..., Any], **settings: Any) -> None:
        functools.update_wrapper(self, forward)
        self._forward = forward
        self._settings = settings
        self._compiled = torch.compile(own_frame(forward), **settings)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._compiled(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledForward:
        return CompiledForward(copy.deepcopy(self._forward, memo), **self._settings)
