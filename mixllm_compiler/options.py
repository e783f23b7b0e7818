"""Everything `torch.compile(model, backend="mixllm", options={…})` understands."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .allocation.paper import PAPER_WIDTHS
from .allocation.tiling import TILE, WINDOW, Tiling
from .errors import OptionError, nearest
from .formats.row_format import DEFAULT_GROUP, MAX_GROUP, WIDTHS, RowFormat
from .formats.spans import SPANS

if TYPE_CHECKING:
    from .allocation.plan import Plan

LOWERS = ("inductor", "eager")
DEFAULT_BITS = 4.4

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # What loses least at equal true bits, and what the fastest kernels run.
    "best": {"family": "two-level", "widths": WIDTHS, "rotate": 256, "spans": (1, 2)},
    # MixLLM's own formats; one activation scale a group follows from inputs as they are.
    "paper": {"family": "asym", "widths": PAPER_WIDTHS, "rotate": 0, "spans": (1,)},
}
"""Preset → its formats and its transform: every door's defaults, where nothing else is asked for.

Blocks of 256 lose 1 % less than blocks of 128; where 256 does not divide K, the
largest power of two that does is taken.
"""

OF_PRESET: Any = None
"""The value of an option that is not given: what its preset says."""


@dataclass(frozen=True)
class Options:
    """Options of one compilation; every field can be a key of `options={…}`.

    Attributes:
        plan: a `Plan` or the path of a saved one; nothing is scored then.
        bits: budget in true bits per quantized weight (default 4.4; preset "paper": 10 % of
            the features at 8 bits unless a budget is given).
        preset: "best" (loss-aware scores, byte-true knapsack over rows of 2 to 8 bits in two
            levels, rotated inputs, one activation scale a token) or "paper" (MixLLM's scores and
            rule over asymmetric rows of 4 and 8 bits, one activation scale a group).
        widths: candidate bits per row; None, as for the next three, is what the preset has.
        family: of formats, "two-level" or "asym"; all rows share one.
        rotate: largest block of the Hadamard transform of every linear's input, 0 for none.
        spans: how many neighbouring groups of a row may share a step and an offset: (1, 2) lets
            every row have groups of `group` or of twice that. Only two-level rows in groups can;
            for others the preset's becomes (1,).
        group: group size along K.
        lm_head: whether the output head is quantized too.
        exclude: name patterns of matrices that stay float.
        pins: name pattern → width for whole matrices.
        tile: rows that share one width, 1 for free rows (preset "paper" always has those).
        window: rows among which those of a tile are found, 0 for whole matrices.
        siblings: whether tiles may cross matrices that read the same activation.
        tp: devices that share each matrix by rows; tiles stay within a share.
        formats_per_layer: most widths in one matrix (or siblings), None for any number.
        partial: allow a plan per piece when a graph break splits the model.
        pipeline: spec text (or a `Pipeline`) to run instead of the default one.
        disable: names of passes to leave out.
        dump: folder for the IR after every pass, the plan and the kernels.
        verify: check the graph after every pass.
        lower: "inductor" compiles the rest of the graph, "eager" interprets it.
        release: free the float weights after packing; they cannot be read again.
        kernels: force one lowering by name ("reference", "triton", "cuda"), None picks the fastest.
        inductor: extra Inductor settings for the hand-over.
        quiet: no summary line.
    """

    plan: Plan | str | Path | None = None
    bits: float | None = None
    preset: str = "best"
    widths: tuple[int, ...] = OF_PRESET
    family: str = OF_PRESET
    rotate: int = OF_PRESET
    spans: tuple[int, ...] = OF_PRESET
    group: int = DEFAULT_GROUP
    lm_head: bool = False
    exclude: tuple[str, ...] = ()
    pins: Mapping[str, int] = dataclasses.field(default_factory=dict)
    tile: int = TILE
    window: int = WINDOW
    siblings: bool = True
    tp: int = 1
    formats_per_layer: int | None = None
    partial: bool = False
    pipeline: Any = None
    disable: tuple[str, ...] = ()
    dump: str | Path | None = None
    verify: bool = False
    lower: str = "inductor"
    release: bool = False
    kernels: str | None = None
    inductor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    quiet: bool = False

    def __post_init__(self) -> None:
        _one_of("preset", self.preset, tuple(PRESETS))
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is OF_PRESET:
                if name == "spans" and not self._may_share(max(value)):
                    value = (1,)
                object.__setattr__(self, name, value)
        _one_of("lower", self.lower, LOWERS)
        for name in ("widths", "spans", "exclude", "disable"):
            value = getattr(self, name)
            listed = (value,) if isinstance(value, str | int) else tuple(value)
            object.__setattr__(self, name, listed)
        for bits in (*self.widths, *self.pins.values()):
            RowFormat(bits, self.group, self.family)
        self._check_spans()
        if not self.widths:
            raise OptionError(f"widths is empty; choose from {WIDTHS}")
        if self.bits is not None and not 1 < float(self.bits) <= 16:
            raise OptionError(f"bits = {self.bits} is no budget in bits per weight (1 to 16)")
        _ = self.tiling
        limit = self.formats_per_layer
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise OptionError(f"formats_per_layer = {limit!r} leaves rows no width; give 1 or more")
        if self.rotate and (self.rotate < 2 or self.rotate & (self.rotate - 1)):
            raise OptionError(f"rotate = {self.rotate}: a Hadamard block is a power of two, or 0")

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None) -> Options:
        """Options from a dictionary.

        Raises:
            OptionError: an unknown key (names the nearest one) or an impossible value.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for key in given or {}:
            if key not in known:
                raise OptionError(f"unknown option {key!r}.{nearest(str(key), known)}")
        return cls(**dict(given or {}))

    def resolved_plan(self) -> Plan | None:
        """The plan object, loaded if a path was given."""
        return self._plan

    @cached_property
    def _plan(self) -> Plan | None:
        from .allocation.plan import Plan

        if self.plan is None or isinstance(self.plan, Plan):
            return self.plan
        if isinstance(self.plan, str | Path):
            return Plan.load(Path(self.plan))
        raise OptionError(f"plan must be a Plan or a path, not {type(self.plan).__name__}")

    @property
    def tiling(self) -> Tiling:
        """What gets one width.

        Raises:
            OptionError: windows that cannot be cut into tiles.
        """
        return Tiling(self.tile, self.window, self.siblings, self.tp)

    @property
    def formats(self) -> tuple[RowFormat, ...]:
        """Candidate formats of a row, narrow ones first, then those of small groups."""
        return tuple(
            RowFormat(b, self.group * span, self.family)
            for b in sorted(self.widths)
            for span in sorted(self.spans)
            if span == 1 or b < 8  # rows of 8 bits have the row's scale only
        )

    def _check_spans(self) -> None:
        if 1 not in self.spans or not set(self.spans) <= set(SPANS):
            raise OptionError(f"spans = {self.spans}: choose 1 and others of {SPANS}")
        if not self._may_share(max(self.spans)):
            raise OptionError(
                f"spans = {self.spans} need two-level rows, whose longest groups have at most "
                f"{MAX_GROUP} weights, not family {self.family!r} in groups of {self.group}"
            )

    def _may_share(self, span: int) -> bool:
        """Whether rows may have groups of `span` times `group`."""
        longer = self.family == "two-level" and 0 < self.group * span <= MAX_GROUP
        return span == 1 or longer

    def planning_digest(self) -> str:
        """Hash of everything that decides which rows get which width."""
        plan = self.resolved_plan()
        keys: Sequence[object] = (
            plan.digest if plan is not None else None,
            self.bits,
            self.preset,
            self.widths,
            self.group,
            self.spans,
            self.family,
            self.rotate,
            self.lm_head,
            self.exclude,
            sorted(self.pins.items()),
            self.tile,
            self.window,
            self.siblings,
            self.tp,
            self.formats_per_layer,
        )
        return hashlib.sha256(repr(keys).encode()).hexdigest()[:16]


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise OptionError(f"unknown {name} {value!r}.{nearest(str(value), known)}")
