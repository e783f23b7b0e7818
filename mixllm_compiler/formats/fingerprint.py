"""Which model something was made for: names, shapes, ties and sampled content of its matrices."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import PlanMismatch, WeightError

SAMPLE = 4096  # elements of a matrix that enter its hash

_CURE = {
    "plan": "Make one with mixllm_compiler.plan(mixllm_compiler.score(model, data), bits=4.4).",
    "scores": "Make them with mixllm_compiler.score(model, data).",
}
_MADE = {"plan": "this plan was made", "scores": "these scores were made"}
_SAYS = {"plan": "the plan says", "scores": "the scores say"}
_ANOTHER = "another model"
_OTHER_WEIGHTS = "other weights of the same architecture"
_HAS = {"plan": "the plan has", "scores": "the scores have"}


@dataclass(frozen=True)
class MatrixPrint:
    """What is remembered of one matrix W [N, K].

    Attributes:
        n, k: its shape.
        dtype: of the float weight, e.g. `"bfloat16"`.
        content: hex hash of dtype, shape and up to 4,096 elements.
    """

    n: int
    k: int
    dtype: str
    content: str


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """A model's matrices without their values; equal and hashed by `digest`.

    Attributes:
        matrices: name → print, in model order.
        ties: groups of names that share one tensor, each in model order.
    """

    matrices: Mapping[str, MatrixPrint]
    ties: tuple[tuple[str, ...], ...] = ()

    @cached_property
    def digest(self) -> str:
        """12 hex digits over names, shapes, contents and ties; the order of names is no part."""
        parts = (
            sorted((name, m.n, m.k, m.dtype, m.content) for name, m in self.matrices.items()),
            sorted(sorted(group) for group in self.ties),
        )
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Name → (N, K), in model order."""
        return {name: (m.n, m.k) for name, m in self.matrices.items()}

    def twins(self, name: str) -> tuple[str, ...]:
        """All names of the tensor that `name` names, itself included."""
        return next((group for group in self.ties if name in group), (name,))

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries and lists; inverse: `from_json`."""
        return {
            "matrices": {name: [m.n, m.k, m.dtype, m.content] for name, m in self.matrices.items()},
            "ties": [list(group) for group in self.ties],
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Fingerprint:
        """Inverse of `to_json`."""
        return cls(
            {name: MatrixPrint(*fields) for name, fields in document["matrices"].items()},
            tuple(tuple(group) for group in document["ties"]),
        )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fingerprint) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __str__(self) -> str:
        dtypes = ", ".join(sorted({m.dtype for m in self.matrices.values()}))
        return f"{len(self.matrices)} matrices ({dtypes}), fingerprint {self.digest}"


def fingerprint(weights: Mapping[str, Tensor]) -> Fingerprint:
    """Fingerprint of float matrices [N, K] (rows are output features), on any device.

    Raises:
        ValueError: a tensor is no matrix.
        WeightError: a weight has no values (meta device).
    """
    matrices: dict[str, MatrixPrint] = {}
    owners: dict[object, list[str]] = {}
    for name, w in weights.items():
        if w.ndim != 2:
            raise ValueError(f"{name} has the shape {list(w.shape)}; a fingerprint is of matrices")
        if w.device.type == "meta":
            raise WeightError(f"{name} is on the meta device: load the model's weights first")
        n, k = w.shape
        dtype = str(w.dtype).removeprefix("torch.")
        matrices[name] = MatrixPrint(n, k, dtype, _content(w, dtype))
        # The same bytes read in the same way: one tensor, whatever Python object holds it.
        view = (w.device, w.dtype, w.data_ptr(), tuple(w.shape), w.stride())
        owners.setdefault(view if w.numel() else name, []).append(name)
    ties = tuple(tuple(names) for names in owners.values() if len(names) > 1)
    return Fingerprint(matrices, ties)


def _content(w: Tensor, dtype: str) -> str:
    """16 hex digits; the stride shares no factor with K, so that all columns are visited."""
    n, k = w.shape
    step = max(1, math.ceil(w.numel() / SAMPLE))
    while k > 1 and math.gcd(step, k) > 1:
        step += 1
    at = torch.arange(0, w.numel(), step, device=w.device)
    sample = w.detach()[at // max(k, 1), at % max(k, 1)].cpu().contiguous()
    state = hashlib.sha256(f"{dtype} {n} {k} ".encode())
    state.update(sample.view(torch.uint8).numpy().tobytes())
    return state.hexdigest()[:16]


def match(
    own: Fingerprint,
    other: Fingerprint,
    *,
    what: Literal["plan", "scores"] = "plan",
    subset: bool = False,
) -> dict[str, str]:
    """Map every matrix of the model at hand to its name in a plan or in scores.

    Names must be equal, or become equal when one prefix (`model.`, `_orig_mod.`) is put before
    all names of one side.

    Args:
        own: the model at hand.
        other: what the plan or the scores were made for.
        what: names `other` in messages.
        subset: the model at hand may be a piece: `other` may have more matrices.

    Returns:
        name in `own` → name in `other`, in the order of `own`.

    Raises:
        PlanMismatch: names, shapes, ties or contents differ.
    """
    found: list[dict[str, str]] = []
    difference: _Difference | None = None
    for names in _alignments(own, other):
        wrong = _difference(own, other, names, what, subset)
        if wrong is None:
            found.append(names)
        # Names that fit say more about the difference than names that do not.
        elif difference is None or all(name in other.matrices for name in names.values()):
            difference = wrong
    if len(found) == 1:
        return found[0]
    if found:
        difference = _Difference(_ANOTHER, f"{len(found)} prefixes of names fit equally well")
    assert difference is not None  # at least one alignment was tried
    width = max(len(what), len("model")) + 1
    raise PlanMismatch(
        f"{_MADE[what]} for {difference.made_for}.\n"
        f"  {what + ':':<{width}} {other}\n"
        f"  {'model:':<{width}} {own}\n"
        f"  {difference.first}\n"
        f"{_CURE[what]}"
    )


def _alignments(own: Fingerprint, other: Fingerprint) -> Iterator[dict[str, str]]:
    """The ways to put names of one side beside names of the other: as they are, or by a prefix."""
    yield {name: name for name in own.matrices}
    if not own.matrices:
        return
    first = next(iter(own.matrices))
    for candidate in other.matrices:
        if first.endswith("." + candidate):
            prefix = first.removesuffix(candidate)
            if all(name.startswith(prefix) for name in own.matrices):
                yield {name: name.removeprefix(prefix) for name in own.matrices}
        elif candidate.endswith("." + first):
            prefix = candidate.removesuffix(first)
            yield {name: prefix + name for name in own.matrices}


class _Difference(NamedTuple):
    made_for: str
    first: str


def _difference(
    own: Fingerprint, other: Fingerprint, names: Mapping[str, str], what: str, subset: bool
) -> _Difference | None:
    """The first difference under an alignment `names`, or None."""

    def differ(first: str, made_for: str = _ANOTHER) -> _Difference:
        return _Difference(made_for, first)

    pairs = [(name, own.matrices[name], other.matrices.get(names[name])) for name in names]
    for name, a, b in pairs:
        if b is None:
            return differ(f"first difference: {name} is not in the {what}")
        if (a.n, a.k) != (b.n, b.k):
            line = f"first difference: {name} is [{a.n}, {a.k}], {_SAYS[what]} [{b.n}, {b.k}]"
            return differ(line)
    missing = [name for name in other.matrices if name not in set(names.values())]
    if missing and not subset:
        return differ(f"first difference: {_HAS[what]} {missing[0]}, the model does not")
    for name, a, b in pairs:
        if b is not None and a.dtype != b.dtype:
            line = f"first difference: {name} is {a.dtype}, {_SAYS[what]} {b.dtype}"
            return differ(line, _OTHER_WEIGHTS)
    changed = [name for name, a, b in pairs if b is not None and a.content != b.content]
    if changed:
        line = (
            f"names and shapes are equal, but {len(changed)} of {len(names)} matrices hold other "
            f"values, the first is {changed[0]}"
        )
        return differ(line, _OTHER_WEIGHTS)
    return _tie_difference(own, other, names, what)


def _tie_difference(
    own: Fingerprint, other: Fingerprint, names: Mapping[str, str], what: str
) -> _Difference | None:
    here = {theirs: name for name, theirs in names.items()}
    mine = {frozenset(group) for group in own.ties}
    # A piece of a model keeps of a tie what lies within it.
    pieces = (frozenset(here[name] for name in group if name in here) for group in other.ties)
    odd = mine ^ {piece for piece in pieces if len(piece) > 1}
    if not odd:
        return None
    group = min(odd, key=sorted)
    sides = ("model", what) if group in mine else (what, "model")
    names_of = " and ".join(sorted(group))
    line = f"first difference: {names_of} are one tensor in the {sides[0]}, not in the {sides[1]}"
    return _Difference(_ANOTHER, line)
