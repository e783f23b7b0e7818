"""A forward of the model's own, so that models do not share Dynamo's recompile limit.

Every transformers model is compiled through one and the same decorator frame; past 8 graphs of
that code object, Dynamo runs further models in float without a word.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any


def own_frame(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` behind a function with a new code object; its signature stays visible."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    clone = types.FunctionType(
        call.__code__.replace(), call.__globals__, "forward", None, call.__closure__
    )
    return functools.wraps(forward)(clone)
