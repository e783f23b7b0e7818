"""`Scores`: the expected increase of the loss, per output feature and format, of a whole model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import OptionError, WeightError
from ..formats.files import load_tensors, save_tensors
from ..formats.fingerprint import Fingerprint
from ..formats.row_format import DEFAULT_GROUP, RowFormat
from ..formats.tables import same_place, table

VERSION = 1
_CURVATURE = "curvature of "  # before a matrix's name, in the file


@dataclass(frozen=True, eq=False)
class Scores:
    """What scoring a model found; the input of every allocation.

    Attributes:
        kind: how rows were scored, e.g. `"fisher-sequence"` or `"paper"`.
        formats: candidate formats, all of one family, with groups of the least size or of a
            multiple of it; F of them.
        loss: matrix name → fp32 [N, F], nats per token by which the loss is expected to grow if
            that row is stored in that format. Infinite where a row cannot have a format.
        shapes: matrix name → (N, K), the same names as `loss`.
        fingerprint: of the model that was scored; it may hold matrices that were not scored.
        tokens, sequences: how much text the scores come from.
        settings: whatever else decided the numbers, as text (data, seed, rotation, …).
        group: the least group size along K.
        siblings: matrix name → name of the group of matrices that read the same activation value
            (q, k and v; gate and up); a matrix that reads one alone may be missing.
        curvature: matrix name → fp32 [N], E[δ²] of the output features per supervised token; empty
            for kinds without gradients.
    """

    kind: str
    formats: tuple[RowFormat, ...]
    loss: Mapping[str, Tensor] = field(repr=False)
    shapes: Mapping[str, tuple[int, int]] = field(repr=False)
    fingerprint: Fingerprint = field(repr=False)
    tokens: int = 0
    sequences: int = 0
    settings: Mapping[str, str] = field(default_factory=dict)
    group: int = DEFAULT_GROUP
    siblings: Mapping[str, str] = field(default_factory=dict, repr=False)
    curvature: Mapping[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.formats or len(set(self.formats)) < len(self.formats):
            raise ValueError("scores need at least one format, and each one once")
        groups, families = {f.group for f in self.formats}, {f.family for f in self.formats}
        uneven = any(g % self.group if self.group else g for g in groups)
        if min(groups) != self.group or uneven or len(families) > 1:
            raise ValueError(
                f"formats of scores share one family and groups of {self.group} or multiples of it"
            )
        if self.loss.keys() != self.shapes.keys():
            odd = sorted(self.loss.keys() ^ self.shapes.keys())
            raise ValueError(f"scores and shapes name other matrices: {', '.join(odd)}")
        known = self.fingerprint.shapes
        for name, (n, k) in self.shapes.items():
            if known.get(name) != (n, k):
                raise ValueError(f"{name} is [{n}, {k}], its fingerprint says {known.get(name)}")
            self._check(name, n)
        self._check_siblings()
        for name, curvature in self.curvature.items():
            if name not in self.shapes or curvature.shape != (self.shapes[name][0],):
                raise ValueError(f"{name} has a curvature {list(curvature.shape)} but no such rows")

    def _check_siblings(self) -> None:
        """One activation value has one length, so siblings share K."""
        first: dict[str, str] = {}
        for name, group in self.siblings.items():
            if name not in self.shapes:
                raise ValueError(f"{name} has siblings but no scores")
            other = first.setdefault(group, name)
            if self.shapes[name][1] != self.shapes[other][1]:
                raise ValueError(
                    f"{other} {list(self.shapes[other])} and {name} {list(self.shapes[name])} "
                    f"cannot read the same activation: they are siblings ({group}) of different K"
                )

    def _check(self, name: str, n: int) -> None:
        loss, expected = self.loss[name], (n, len(self.formats))
        if loss.shape != expected or loss.dtype != torch.float32:
            found = f"{loss.dtype} {list(loss.shape)}"
            raise ValueError(f"the scores of {name} are {found}, not float32 {list(expected)}")
        wrong = ~(loss >= 0)
        if bool(wrong.any()):
            row, f = wrong.nonzero()[0].tolist()
            raise WeightError(
                f"the score of {name}, row {row}, {self.formats[f]} is {loss[row, f].item()} (with "
                f"{int(wrong.sum())} of {loss.numel()} scores of this matrix): an increase of the "
                "loss is a number from 0 on. Check that the float model's loss is finite on this "
                "text, and score in bf16 or fp32, not in fp16."
            )
        stuck = loss.isinf().all(1)
        if bool(stuck.any()):
            raise WeightError(
                f"row {int(stuck.nonzero()[0])} of {name} has an infinite score in every format; "
                "exclude the matrix or check that the float model's loss is finite on this text"
            )

    @property
    def family(self) -> str:
        return self.formats[0].family

    @property
    def rotation(self) -> int:
        """Hadamard block of the inputs that were scored, 0 for none."""
        return int(self.settings.get("rotate", 0))  # older files had none and did not say so

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of the candidate formats, in their order."""
        return tuple(dict.fromkeys(f.bits for f in self.formats))

    @property
    def columns(self) -> list[str]:
        """Short names of the formats: `"w4"`, or `"w4 g256"` where groups are longer than most."""
        return [_short(f, self.group) for f in self.formats]

    @property
    def unreached(self) -> dict[str, int]:
        """Matrix name → rows that no gradient reached: the text says nothing about them."""
        dead = {name: int((found == 0).sum()) for name, found in self.curvature.items()}
        return {name: rows for name, rows in dead.items() if rows}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file; it is there whole or not at all."""
        document = {
            "kind": self.kind,
            "formats": [str(f) for f in self.formats],
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "fingerprint": self.fingerprint.to_json(),
            "tokens": self.tokens,
            "sequences": self.sequences,
            "settings": dict(self.settings),
            "siblings": dict(self.siblings),
        }
        curvature = {_CURVATURE + name: found for name, found in self.curvature.items()}
        save_tensors(path, "scores", VERSION, {**self.loss, **curvature}, document)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Scores:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            OptionError: the file is damaged or holds no scores.
        """
        tensors, document = load_tensors(path, "scores", VERSION)
        formats = tuple(RowFormat.parse(text) for text in document["formats"])
        # The document keeps the model's order, the tensors come back sorted by name.
        shapes = {name: (n, k) for name, (n, k) in document["shapes"].items()}
        curvature = {n: tensors[_CURVATURE + n] for n in shapes if _CURVATURE + n in tensors}
        if shapes.keys() != {n for n in tensors if not n.startswith(_CURVATURE)}:
            raise OptionError(f"{os.fspath(path)!r} is damaged: it lacks scores that it lists")
        return cls(
            kind=document["kind"],
            formats=formats,
            loss={name: tensors[name] for name in shapes},
            shapes=shapes,
            fingerprint=Fingerprint.from_json(document["fingerprint"]),
            tokens=document["tokens"],
            sequences=document["sequences"],
            settings=document["settings"],
            group=min(f.group for f in formats),
            siblings=document.get("siblings", {}),  # older files have none, nor curvature
            curvature=curvature,
        )

    def totals(self) -> dict[str, Tensor]:
        """Matrix name → float64 [F], the sum over its rows; infinities are left out."""
        return {
            name: torch.where(loss.isinf(), 0, loss).sum(0, dtype=torch.float64).cpu()
            for name, loss in self.loss.items()
        }

    def summary(self) -> str:
        """Plain text: where the scores come from and the summed loss per format."""
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        head = (
            f"scores {self.kind}: {self.tokens:,} tokens in {self.sequences} sequences, "
            f"{self.fingerprint}" + (f"\n{settings}" if settings else "")
        )
        if self.unreached:
            listed = ", ".join(f"{name} ({rows} rows)" for name, rows in self.unreached.items())
            head += f"\nno gradient reached {listed}"
        places: dict[str, list[Tensor]] = {}
        for name, total in self.totals().items():
            places.setdefault(same_place(name), []).append(total)
        rows = [(name, len(found), torch.stack(found).sum(0)) for name, found in places.items()]
        everything = torch.stack([total for *_, total in rows]).sum(0) if rows else torch.empty(0)
        body = table(
            ("nats per token, all rows in", "matrices", *self.columns),
            [
                (name, count, *(f"{value:.3g}" for value in total.tolist()))
                for name, count, total in [*rows, ("all", len(self.loss), everything)]
            ],
        )
        return f"{head}\n{body}"

    def diff(self, other: Scores) -> str:
        """Plain text: what changes from these scores to `other`; `""` if nothing does."""
        lines = []
        for key in ("kind", "widths", "group", "family", "tokens", "sequences", "fingerprint"):
            mine, theirs = getattr(self, key), getattr(other, key)
            if mine != theirs:
                lines.append(f"{key}: {mine} → {theirs}")
        for key in sorted(self.settings.keys() | other.settings.keys()):
            before, after = self.settings.get(key, "–"), other.settings.get(key, "–")
            if before != after:
                lines.append(f"{key}: {before} → {after}")
        lines += [f"{name}: only in the first" for name in self.loss if name not in other.loss]
        lines += [f"{name}: only in the second" for name in other.loss if name not in self.loss]
        common = [f for f in self.formats if f in other.formats]
        totals = self.totals(), other.totals()
        rows = []
        for name in self.loss:
            if name in other.loss and not _equal(self, other, name, common):
                a, b = (total[name].tolist() for total in totals)
                pairs = [(a[self.formats.index(f)], b[other.formats.index(f)]) for f in common]
                rows.append((name, *(f"{x:.3g} → {y:.3g}" for x, y in pairs)))
        if rows:
            lines.append(table(("matrix", *(_short(f, self.group) for f in common)), rows))
        return "\n".join(lines)


def _short(fmt: RowFormat, group: int) -> str:
    return f"w{fmt.bits}" if fmt.group == group else f"w{fmt.bits} g{fmt.group}"


def _equal(a: Scores, b: Scores, name: str, formats: list[RowFormat]) -> bool:
    """Whether both have the same scores for these formats."""
    mine = a.loss[name][:, [a.formats.index(f) for f in formats]]
    theirs = b.loss[name][:, [b.formats.index(f) for f in formats]]
    return torch.equal(mine.cpu(), theirs.cpu())
