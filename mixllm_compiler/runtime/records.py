"""What was compiled in this process: one record per graph, for `explain`, dumps and tests."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True)
class LinearRecord:
    """One matrix of a compiled graph.

    Attributes:
        name, n, k: which matrix.
        rows: rows per width, empty if it stayed float.
        true_bits: bits per weight of the stored form, None if float.
        resident_bits: bits per weight of the device blob, None if float.
        kernel: kernel name, "" if float.
        kept_float: why it stayed float.
        float_bits: bits per weight of the float parameter.
        tokens: M of this graph, 0 if unknown.
        seconds, float_seconds: predicted for M tokens, None for an unknown device.
    """

    name: str
    n: int
    k: int
    rows: dict[int, int] = field(default_factory=dict)
    true_bits: float | None = None
    resident_bits: float | None = None
    kernel: str = ""
    kept_float: str = ""
    float_bits: int = 32
    tokens: int = 0
    seconds: float | None = None
    float_seconds: float | None = None


@dataclass(frozen=True)
class GraphRecord:
    """One compiled graph.

    Attributes:
        linears: every constant matrix, in order of first use.
        passes: (name, stage, changes, seconds) of every pass that ran.
        plan_digest: digest of the plan in force, "" without one.
        asked: the budget as asked.
        score: how features were scored, and on how much.
        predicted_loss: nats per token, None if no loss was predicted.
        gap: the allocation's certificate, None if it was not allocated here.
        broken: why a graph break ended the graph, None if none did.
        planned_before: whether an earlier graph's plan was reused.
        root: the model.
        code: the final graph as text.
    """

    linears: tuple[LinearRecord, ...]
    passes: tuple[tuple[str, str, int, float], ...]
    plan_digest: str
    asked: str
    score: str
    note: str
    predicted_loss: float | None
    gap: float | None
    broken: str | None
    planned_before: bool
    root: weakref.ref[nn.Module] | None
    code: str

    @property
    def quantized(self) -> list[LinearRecord]:
        return [line for line in self.linears if not line.kept_float]

    def true_bits(self) -> float:
        """True bits per quantized weight of this graph."""
        weights = sum(r.n * r.k for r in self.quantized)
        return sum((r.true_bits or 0) * r.n * r.k for r in self.quantized) / max(weights, 1)

    def headline(self) -> str:
        """`mixllm: 84 linears, 4.40 true bits (asked 4.40 bits), predicted KL 0.021, …`."""
        if not self.quantized:
            return f"mixllm: nothing quantized, {len(self.linears)} linears kept float"
        bits = self.true_bits()
        weights = sum(r.n * r.k for r in self.quantized)
        was = sum(r.float_bits * r.n * r.k for r in self.quantized) / max(weights, 1)
        asked = f" (asked {self.asked})" if self.asked else ""
        parts = [f"{len(self.quantized)} linears", f"{bits:.2f} true bits{asked}"]
        if self.predicted_loss is not None and self.score != "weight-error":
            parts.append(f"predicted KL {self.predicted_loss:.3g}")
        parts.append(f"{was / bits:.1f}x smaller")
        kept = len(self.linears) - len(self.quantized)
        if kept:
            parts.append(f"{kept} kept float")
        return "mixllm: " + ", ".join(parts)


_RECORDS: deque[GraphRecord] = deque(maxlen=1024)
_COLLECTORS: list[list[GraphRecord]] = []
_count = 0


def add(record: GraphRecord) -> None:
    """Keep the record of a graph that was just compiled."""
    global _count
    _count += 1
    _RECORDS.append(record)
    for collector in _COLLECTORS:
        collector.append(record)


def count() -> int:
    """Graphs compiled since the process began."""
    return _count


def recent() -> list[GraphRecord]:
    """The last graphs compiled, oldest first."""
    return list(_RECORDS)


@contextmanager
def collect() -> Iterator[list[GraphRecord]]:
    """Records of the graphs compiled inside the block."""
    found: list[GraphRecord] = []
    _COLLECTORS.append(found)
    try:
        yield found
    finally:
        _COLLECTORS.remove(found)
