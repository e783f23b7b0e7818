"""What can go wrong on the user's side, each with a name of its own.

Messages say what happened, where, why, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MixLLMError(RuntimeError):
    """Base of every error that a user can mend."""


class OptionError(MixLLMError, ValueError):
    """An option, a pass name, a preset or a piece of spec text that does not exist."""


class UnsupportedModel(MixLLMError):
    """The model cannot be captured or quantized in the state it is in."""


class WeightError(MixLLMError):
    """A weight's values or storage forbid quantizing it."""


class PlanMismatch(MixLLMError, ValueError):
    """A plan or a score file was made for another model."""


class BudgetError(MixLLMError, ValueError):
    """A budget that no allocation can meet."""


class GraphBreakError(MixLLMError):
    """The model was captured in pieces, so that no whole-model plan can be made."""


class GradModeError(MixLLMError):
    """Gradients were asked of a quantized model."""


class VerifyError(MixLLMError):
    """A pass left the graph in a state that its stage does not allow."""


class LoweringError(MixLLMError):
    """A kernel could not be generated, built or launched."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`' Did you mean …?'` for the closest known name, or a list of all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known)}."
