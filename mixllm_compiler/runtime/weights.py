"""Process-wide caches, keyed weakly by the identity of float weights.

Prefill, decode and every recompile of a model must use the same rows and share one packed copy.
Entries carry a stamp (version counter and pointer), so a weight that was written in place is
planned and packed again, and they vanish with the weight.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .. import compat
from ..formats.layout import PackedWeight, pack, unpack
from ..ir.graph import Matrix, Rows

if TYPE_CHECKING:
    from ..allocation.plan import Plan

_LOCK = threading.RLock()
_EPOCHS: dict[int, int] = {}


def stamp(weight: Tensor) -> tuple[object, ...]:
    """What differs when a weight's values may have changed since it was quantized."""
    return (*compat.stamp(weight), _EPOCHS.get(id(weight), 0))


def packing_key(matrix: Matrix, group: int, family: str) -> tuple[Hashable, ...]:
    """What besides the float values decides a packed blob."""
    assert matrix.widths is not None
    rows = hashlib.sha256(matrix.widths.cpu().numpy().tobytes())
    if matrix.spans is not None:
        rows.update(matrix.spans.cpu().numpy().tobytes())
    return (matrix.transposed, matrix.expert, matrix.transform, group, family, rows.digest())


@dataclass
class _Entry:
    weight: weakref.ref[Tensor]
    stamp: tuple[object, ...]
    values: dict[Hashable, PackedWeight] = field(default_factory=dict)


class PackedCache:
    """Packed blobs of float weights.

    Attributes:
        packs: how often a weight was packed since the process began; a test counts it.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self.packs = 0

    def get(self, weight: Tensor, key: Hashable) -> PackedWeight | None:
        with _LOCK:
            entry = self._entries.get(id(weight))
            if entry is None or entry.weight() is not weight or entry.stamp != stamp(weight):
                return None
            return entry.values.get(key)

    def put(self, weight: Tensor, key: Hashable, value: PackedWeight) -> None:
        with _LOCK:
            self.packs += 1
            entry = self._entries.get(id(weight))
            if entry is None or entry.weight() is not weight or entry.stamp != stamp(weight):
                entry = _Entry(_weak(weight, self._entries), stamp(weight))
                self._entries[id(weight)] = entry
            entry.values[key] = value

    def restamp(self, weight: Tensor) -> None:
        """The float storage was released: what was packed from it stays valid."""
        with _LOCK:
            entry = self._entries.get(id(weight))
            if entry is not None and entry.weight() is weight:
                entry.stamp = stamp(weight)

    def forget(self, weight: Tensor) -> None:
        with _LOCK:
            self._entries.pop(id(weight), None)

    def __len__(self) -> int:
        return len(self._entries)


def _weak(weight: Tensor, entries: dict[int, _Entry]) -> weakref.ref[Tensor]:
    key = id(weight)

    def gone(ref: weakref.ref[Tensor]) -> None:
        with _LOCK:
            entry = entries.get(key)
            if entry is not None and entry.weight is ref:
                del entries[key]
                _EPOCHS.pop(key, None)

    return weakref.ref(weight, gone)


CACHE = PackedCache()


def repacked(packed: PackedWeight, packing: str) -> PackedWeight:
    """A module's own blob as a kernel reads it: packed once, and again when the blob changes."""
    key = ("module", packing)
    known = CACHE.get(packed.blob, key)
    if known is None:
        with torch.no_grad(), torch.inference_mode(False):
            known = pack(unpack(packed), packing)
        CACHE.put(packed.blob, key, known)
    return known


@dataclass
class PlannedModel:
    """The widths in force for the weights of one captured graph.

    Attributes:
        plan: where they come from.
        rows: widths and spans per matrix name of that graph.
        weights: float weight and stamp per matrix name.
        root: the model, if Dynamo could say which.
        broken: why the graph ended early, if a graph break ended it.
    """

    plan: Plan
    rows: Mapping[str, Rows]
    weights: dict[str, tuple[weakref.ref[Tensor], tuple[object, ...]]]
    root: weakref.ref[torch.nn.Module] | None
    broken: str | None = None

    def fresh(self, name: str, weight: Tensor) -> bool:
        known = self.weights.get(name)
        return known is not None and known[0]() is weight and known[1] == stamp(weight)

    def covers(self, matrices: Iterable[Matrix]) -> bool:
        return all(self.fresh(m.name, m.binding.tensor) for m in matrices)

    def intact(self) -> bool:
        """Whether every weight still is what was planned."""
        live = ((ref(), was) for ref, was in self.weights.values())
        return all(weight is not None and stamp(weight) == was for weight, was in live)

    def alive(self) -> bool:
        return any(ref() is not None for ref, _ in self.weights.values())


class PlanStore:
    """Plans in force, by the options that made them."""

    def __init__(self) -> None:
        self._plans: dict[str, list[PlannedModel]] = {}

    def find(self, digest: str, matrices: list[Matrix]) -> PlannedModel | None:
        """The plan that covers all these weights, if there is one."""
        with _LOCK:
            self._forget_dead()
            plans = self._plans.get(digest, [])
            return next((p for p in reversed(plans) if p.covers(matrices)), None)

    def _forget_dead(self) -> None:
        """Drop the plans of models that are gone, whatever options made them."""
        live = ((digest, [p for p in plans if p.alive()]) for digest, plans in self._plans.items())
        self._plans = {digest: plans for digest, plans in live if plans}

    def piece_before(
        self, digest: str, root: torch.nn.Module | None, matrices: list[Matrix]
    ) -> PlannedModel | None:
        """An earlier graph of the same root whose plan does not know some of these names."""
        if root is None:
            return None
        with _LOCK:
            for planned in reversed(self._plans.get(digest, [])):
                if planned.root is None or planned.root() is not root:
                    continue
                unknown = [m for m in matrices if m.name not in planned.weights]
                rest = [m for m in matrices if m.name in planned.weights]
                if unknown and planned.intact() and planned.covers(rest):
                    return planned
        return None

    def add(
        self,
        digest: str,
        plan: Plan,
        matrices: list[Matrix],
        root: torch.nn.Module | None,
        broken: str | None,
    ) -> PlannedModel:
        rows = {m.name: (m.widths, m.spans) for m in matrices if m.widths is not None}
        weights = {
            m.name: (weakref.ref(m.binding.tensor), stamp(m.binding.tensor)) for m in matrices
        }
        planned = PlannedModel(
            plan, rows, weights, None if root is None else weakref.ref(root), broken
        )
        with _LOCK:
            self._plans.setdefault(digest, []).append(planned)
        return planned

    def restamp(self, weight: Tensor) -> None:
        with _LOCK:
            for planned in (p for plans in self._plans.values() for p in plans):
                for name, (ref, _) in planned.weights.items():
                    if ref() is weight:
                        planned.weights[name] = (ref, stamp(weight))

    def forget(self, weight: Tensor) -> None:
        with _LOCK:
            for digest, plans in self._plans.items():
                self._plans[digest] = [
                    p for p in plans if all(ref() is not weight for ref, _ in p.weights.values())
                ]


PLANS = PlanStore()


def release(weight: Tensor) -> None:
    """Free the float storage; shape and dtype stay, so guards hold."""
    weight.untyped_storage().resize_(0)
    CACHE.restamp(weight)
    PLANS.restamp(weight)


def invalidate(weights: Iterable[Tensor]) -> int:
    """Forget plans and packed copies of these weights, and let their guards fail once.

    For the one change nothing can see: `p.data.copy_(…)`. Returns how many were known.
    """
    count = 0
    with _LOCK:
        for weight in weights:
            known = id(weight) in CACHE._entries
            count += known
            _EPOCHS[id(weight)] = _EPOCHS.get(id(weight), 0) + 1
            CACHE.forget(weight)
            PLANS.forget(weight)
    return count


def freshness_check(weights: Iterable[Tensor]) -> Callable[[object], bool]:
    """A guard: True while none of these weights was changed in place."""
    weights = list(weights)
    same = compat.unchanged(weights)
    epochs = [(id(w), _EPOCHS.get(id(w), 0)) for w in weights]

    def fresh(_: object) -> bool:
        if not same():
            return False
        return not _EPOCHS or all(_EPOCHS.get(key, 0) == epoch for key, epoch in epochs)

    return fresh
