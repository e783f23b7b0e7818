"""An interrupted scoring run goes on with its next segment.

After each segment the scores so far and the gradients at the cut are written to one file. What ran
forward before the cut runs again, which is the smaller part of the work.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import OptionError
from ..formats.files import load_tensors, save_tensors

if TYPE_CHECKING:
    from .replay import Replay

VERSION = 1
_CONTENT = "partial scores"


@dataclass(frozen=True)
class Checkpoint:
    """The file of a scoring run.

    Attributes:
        path: of the file; it is there whole or not at all.
        made: what the run is of (model, text, settings), as text; only the same run goes on.
    """

    path: Path
    made: Mapping[str, str]

    def save(self, run: Replay, segment: int) -> None:
        """Keep what is known once `segment` and all after it are finished."""
        document = {
            "made": dict(self.made),
            "segment": segment,
            "loss": run.loss,
            "losses": [*run.statistics.losses],
            "squares": [*run.statistics.squares],
        }
        tensors = {"weights": run.weights}
        tensors |= {f"loss of {n}": t for n, t in run.statistics.losses.items()}
        tensors |= {f"squares of {n}": t for n, t in run.statistics.squares.items()}
        for name, changes in run.statistics.open_changes().items():
            tensors |= {f"changes of {name} in {d}": t for d, t in changes.items()}
        tensors |= {f"reach {b}": t for b, t in enumerate(run.reach) if t is not None}
        for b, gradients in enumerate(run.gradients):
            for node, parts in gradients.items():
                for j, part in enumerate(parts):
                    if part is not None:
                        tensors[f"gradient {b} {j} {node.name}"] = part
        save_tensors(self.path, _CONTENT, VERSION, tensors, document)

    def load(self, run: Replay) -> int:
        """Fill a run with what the file holds.

        Returns:
            How many segments, from the first on, are still to be done; all without a file.

        Raises:
            OptionError: the file is of another model, text or settings, or no such file at all.
        """
        if not self.path.exists():
            return len(run.segments)
        tensors, document = load_tensors(self.path, _CONTENT, VERSION)
        self._refuse_others(document)
        statistics = run.statistics
        statistics.losses = {n: tensors[f"loss of {n}"] for n in document["losses"]}
        statistics.squares = {n: tensors[f"squares of {n}"] for n in document["squares"]}
        run.weights, run.loss = tensors["weights"], document["loss"]
        segment = int(document["segment"])
        for done in run.segments[segment:]:
            statistics.forget(run.inside(done))
        nodes = {node.name: node for done in run.segments for node in done.outputs}
        for key, tensor in tensors.items():
            if key.startswith("changes of "):
                name, _, d = key.removeprefix("changes of ").rpartition(" in ")
                statistics.open_changes().setdefault(name, {})[int(d)] = tensor
            elif key.startswith("reach "):
                run.reach[int(key.removeprefix("reach "))] = tensor
            elif key.startswith("gradient "):
                _, b, j, name = key.split(" ")
                parts = run.gradients[int(b)].setdefault(nodes[name], [])
                parts += [None] * (int(j) + 1 - len(parts))
                parts[int(j)] = tensor
        return segment

    def _refuse_others(self, document: Mapping[str, Any]) -> None:
        made = document["made"]
        other = [k for k in {**made, **self.made} if made.get(k) != self.made.get(k)]
        if other:
            first = other[0]
            raise OptionError(
                f"{os.fspath(self.path)!r} was left by another scoring run: {', '.join(other)} "
                f"differ ({first}: {made.get(first)}, now {self.made.get(first)}); name another "
                "file to resume from, or delete this one"
            )


def data_digest(*tensors: Tensor | None) -> str:
    """12 hex digits over the values of tensors."""
    state = hashlib.sha256()
    for tensor in tensors:
        given = torch.empty(0) if tensor is None else tensor.detach().cpu().contiguous()
        state.update(f"{given.dtype} {list(given.shape)} ".encode())
        state.update(given.view(torch.uint8).numpy().tobytes() if given.numel() else b"")
    return state.hexdigest()[:12]
