"""mixllm-compiler: large language models made small and fast, one output feature at a time.

`torch.compile(model, backend="mixllm")` needs no import of this package. The names below are
for the other two doors: the Python functions and passes of your own. They are imported on first
use, so `import mixllm_compiler` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "compile": "api",
    "score": "api",
    "plan": "api",
    "quantize": "api",
    "explain": "api",
    "bisect": "passes.bisect",
    "invalidate": "api",
    "PackedLinear": "modules",
    "Plan": "allocation.plan",
    "Scores": "salience.scores",
    "QuantizedWeight": "formats.neutral",
    "true_bits": "formats.bits",
    "resident_bits": "formats.bits",
    "Pass": "passes.base",
    "Pipeline": "passes.pipeline",
    "register_pass": "passes.registry",
}

__all__ = [*_HOME, "__version__"]

if TYPE_CHECKING:
    from .allocation.plan import Plan as Plan
    from .api import compile as compile
    from .api import explain as explain
    from .api import invalidate as invalidate
    from .api import plan as plan
    from .api import quantize as quantize
    from .api import score as score
    from .formats.bits import resident_bits as resident_bits
    from .formats.bits import true_bits as true_bits
    from .formats.neutral import QuantizedWeight as QuantizedWeight
    from .modules import PackedLinear as PackedLinear
    from .passes.base import Pass as Pass
    from .passes.bisect import bisect as bisect
    from .passes.pipeline import Pipeline as Pipeline
    from .passes.registry import register_pass as register_pass
    from .salience.scores import Scores as Scores


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
