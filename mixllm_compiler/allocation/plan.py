"""`Plan`: which format every output feature of a model gets, and why. No codes, no weights."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError, PlanMismatch, nearest
from ..formats.files import load_tensors, save_tensors
from ..formats.fingerprint import Fingerprint, match
from ..formats.row_format import DEFAULT_GROUP, RowFormat, width_bytes
from . import plan_text

VERSION = 1
_NEWEST = 2  # of the file: rows may have spans
_SPANS = "spans of "  # before a matrix's name, in the file
ACTIVATION_MODES = ("token", "group")


@dataclass(frozen=True, eq=False)
class SitePlan:
    """The rows of one matrix W [N, K].

    Attributes:
        n, k: its shape.
        widths: uint8 [N] on the CPU, bits of every row in model order; never changed.
        group: group size along K.
        family: format family.
        spans: uint8 [N] on the CPU, how many neighbouring groups of a row share a step and an
            offset (`formats.spans`); None if none do.
    """

    n: int
    k: int
    widths: Tensor = field(repr=False)
    group: int = DEFAULT_GROUP
    family: str = "asym"
    spans: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, t in (("widths", self.widths), ("spans", self.spans)):
            if t is None:
                continue
            if t.dtype != torch.uint8 or t.shape != (self.n,) or t.device.type != "cpu":
                raise ValueError(
                    f"{name} of {self.n} rows are {t.dtype} {list(t.shape)} on {t.device}, "
                    f"not uint8 [{self.n}] on the CPU"
                )
        _ = self.rows_per_format()

    @cached_property
    def raw(self) -> bytes:
        """Widths and spans as bytes: read once, for tensors cannot be read while torch traces."""
        widths = self.widths.numpy().tobytes()
        return widths if self.spans is None else widths + self.spans.numpy().tobytes()

    def rows_per_width(self) -> dict[int, int]:
        """Bits → rows, ascending."""
        counts = np.bincount(np.frombuffer(self.raw[: self.n], np.uint8)).tolist()
        return {bits: count for bits, count in enumerate(counts) if count}

    def rows_per_format(self) -> dict[RowFormat, int]:
        """Format → rows, narrow ones first."""
        if self.spans is None:
            counted = {(bits, 1): count for bits, count in self.rows_per_width().items()}
        else:
            both = np.frombuffer(self.raw, np.uint8).reshape(2, self.n)
            pairs, counts = np.unique(both, axis=1, return_counts=True)
            counted = {
                (b, s): c for (b, s), c in zip(pairs.T.tolist(), counts.tolist(), strict=True)
            }
        return {
            RowFormat(bits, self.group * span, self.family): count
            for (bits, span), count in counted.items()
        }

    @property
    def true_bytes(self) -> int:
        """Bytes of the stored rows and of the table of their widths."""
        rows = sum(count * fmt.row_bytes(self.k) for fmt, count in self.rows_per_format().items())
        return rows + width_bytes(self.n)

    @property
    def true_bits(self) -> float:
        return 8 * self.true_bytes / (self.n * self.k)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SitePlan) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[int, int, int, str, bytes]:
        return self.n, self.k, self.group, self.family, self.raw


@dataclass(frozen=True)
class Certificate:
    """How far from the best allocation a plan can be (see `knapsack.Solution`).

    Attributes:
        objective: predicted loss of the plan, nats per token, with the price of its time if one
            was given. For a plan that was asked for by its KL, its bytes.
        bound: no plan of the same tiles within the same bytes is predicted to lose less; none
            within the same loss takes fewer bytes.
        gap: (objective − bound) / objective.
        of: what was minimized, "loss" or "bytes".
    """

    objective: float
    bound: float
    gap: float
    of: str = "loss"


@dataclass(frozen=True, eq=False)
class Plan:
    """Formats for a whole model. Frozen; plans that quantize alike are equal.

    Attributes:
        fingerprint: of the model it was made for.
        sites: matrix name → its rows; names of one tied tensor have the same rows.
        float_sites: matrix name → why it stays float. With `sites` they cover the fingerprint;
            matrices that were never candidates may be listed, too.
        activation_mode: `"token"` or `"group"`: what one activation scale is for.
        rotation: Hadamard block of every linear's input, 0 for none.
        asked: what the user asked for, e.g. `"4.40 bits"` or `"paper 10 %"`.
        score_kind: kind of the scores it was made from, `""` without scores.
        predicted_loss: expected increase of the loss in nats per token, None without scores.
        certificate: for plans of the knapsack.
        constant, floor: predicted KL = constant · predicted loss + floor. Scores are of another
            rounding than the one that follows, and activations cost something, too; both are
            measured once per model and recipe.
        version: of the meaning of these fields.
    """

    fingerprint: Fingerprint = field(repr=False)
    sites: Mapping[str, SitePlan] = field(repr=False)
    float_sites: Mapping[str, str] = field(default_factory=dict, repr=False)
    activation_mode: str = "group"
    rotation: int = 0
    asked: str = ""
    score_kind: str = ""
    predicted_loss: float | None = None
    certificate: Certificate | None = None
    constant: float = 1.0
    floor: float = 0.0
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.activation_mode not in ACTIVATION_MODES:
            raise OptionError(
                f"unknown activation mode {self.activation_mode!r}."
                f"{nearest(self.activation_mode, ACTIVATION_MODES)}"
            )
        if self.rotation < 0 or self.rotation & (self.rotation - 1):
            raise OptionError(f"a Hadamard block is a power of two or 0, not {self.rotation}")
        shapes = self.fingerprint.shapes
        for name, site in self.sites.items():
            if shapes.get(name) != (site.n, site.k):
                raise ValueError(f"{name} is {shapes.get(name)}, its rows say {(site.n, site.k)}")
            if name in self.float_sites:
                raise ValueError(f"{name} is planned both as quantized and as float")
            first = next(twin for twin in self.fingerprint.twins(name) if twin in self.sites)
            if self.sites[first] != site:
                raise ValueError(f"{first} and {name} are one tensor with two plans")
        open_names = shapes.keys() - self.sites.keys() - self.float_sites.keys()
        if open_names:
            raise ValueError(f"the plan says nothing about {', '.join(sorted(open_names))}")

    @cached_property
    def digest(self) -> str:
        """16 hex digits over all that changes what a quantized model computes: the fingerprint,
        the rows, the activation mode and the rotation; not over how the plan came about.
        """
        state = hashlib.sha256()
        keys = (self.version, self.fingerprint.digest, self.activation_mode, self.rotation)
        state.update(json.dumps(keys).encode())
        for name, site in sorted(self.sites.items()):
            state.update(f"\n{name} {site.n} {site.k} {site.group} {site.family} ".encode())
            state.update(site.raw)
        return state.hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def predicted_kl(self) -> float | None:
        """Expected KL to the float model in nats per token, None without scores."""
        if self.predicted_loss is None:
            return None
        return self.constant * self.predicted_loss + self.floor

    # A compiler's options are copied on the way; a copy that is the same object costs no guard.
    def __copy__(self) -> Plan:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Plan:
        return self

    def distinct(self) -> dict[str, SitePlan]:
        """Sites without the further names of tied tensors: what is stored once."""
        return {
            name: site
            for name, site in self.sites.items()
            if name == next(t for t in self.fingerprint.twins(name) if t in self.sites)
        }

    @property
    def true_bytes(self) -> int:
        """Bytes of all quantized matrices as they are stored; tied ones count once."""
        return sum(site.true_bytes for site in self.distinct().values())

    @property
    def true_bits(self) -> float:
        """Bits per quantized weight, equal to `formats.bits.true_bits` of the weights.

        Raises:
            ValueError: no matrix is quantized.
        """
        weights = sum(site.n * site.k for site in self.distinct().values())
        if not weights:
            raise ValueError("true_bits of a plan that quantizes nothing")
        return 8 * self.true_bytes / weights

    def rows_per_width(self) -> dict[int, int]:
        """Bits → rows of the whole model, ascending; tied matrices count once."""
        rows: Counter[int] = Counter()
        for site in self.distinct().values():
            rows.update(site.rows_per_width())
        return dict(sorted(rows.items()))

    def match(self, model: Fingerprint, *, subset: bool = False) -> dict[str, str]:
        """Name in the model → name in this plan (see `formats.fingerprint.match`).

        Raises:
            PlanMismatch: the plan was made for another model.
        """
        return match(model, self.fingerprint, what="plan", subset=subset)

    def site_for(self, name: str, names: Mapping[str, str] | None = None) -> SitePlan | None:
        """The rows of a matrix, None if it stays float.

        Args:
            name: of the matrix, in the model at hand.
            names: what `match` returned, if the model's names may differ from the plan's.

        Raises:
            PlanMismatch: the plan knows no such matrix.
        """
        known = name if names is None else names.get(name, name)
        if known not in self.sites and known not in self.float_sites:
            raise PlanMismatch(
                f"the plan knows no matrix {name!r}.{nearest(name, self.fingerprint.matrices)}"
            )
        return self.sites.get(known)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, a byte a row; it is there whole or not at all."""
        c = self.certificate
        document = {
            "plan": self.version,
            "fingerprint": self.fingerprint.to_json(),
            "sites": {name: [s.n, s.k, s.group, s.family] for name, s in self.sites.items()},
            "float_sites": dict(self.float_sites),
            "activation_mode": self.activation_mode,
            "rotation": self.rotation,
            "asked": self.asked,
            "score_kind": self.score_kind,
            "predicted_loss": self.predicted_loss,
            "certificate": None if c is None else [c.objective, c.bound, c.gap, c.of],
            "constant": self.constant,
            "floor": self.floor,
        }
        rows = {name: site.widths for name, site in self.sites.items()}
        spans = {_SPANS + n: s.spans for n, s in self.sites.items() if s.spans is not None}
        # Files without spans stay readable for versions that know none.
        save_tensors(path, "plan", _NEWEST if spans else VERSION, {**rows, **spans}, document)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            OptionError: the file is damaged or holds no plan.
        """
        tensors, document = load_tensors(path, "plan", _NEWEST)
        if document["sites"].keys() != {n for n in tensors if not n.startswith(_SPANS)}:
            raise OptionError(f"{os.fspath(path)!r} is damaged: it lacks rows that it lists")
        certificate = document["certificate"]
        return cls(
            fingerprint=Fingerprint.from_json(document["fingerprint"]),
            sites={
                name: SitePlan(n, k, tensors[name], group, family, tensors.get(_SPANS + name))
                for name, (n, k, group, family) in document["sites"].items()
            },
            float_sites=document["float_sites"],
            activation_mode=document["activation_mode"],
            rotation=document["rotation"],
            asked=document["asked"],
            score_kind=document["score_kind"],
            predicted_loss=document["predicted_loss"],
            certificate=None if certificate is None else Certificate(*certificate),
            constant=document.get("constant", 1.0),  # older files have neither
            floor=document.get("floor", 0.0),
            version=document["plan"],
        )

    def summary(self) -> str:
        """The plan as a plain text table, alike matrices of all layers in one line."""
        return plan_text.summary(self)

    def diff(self, other: Plan) -> str:
        """Plain text: what changes from this plan to `other`; `""` if nothing does."""
        return plan_text.diff(self, other)
