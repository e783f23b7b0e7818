"""What of a model would be quantized, what stays float and why: before anything is done."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text
from torch import nn

from ..formats.tables import same_place
from .bits_map import common_prefix
from .terminal import linears_of, plain_table

if TYPE_CHECKING:
    from ..runtime.records import GraphRecord, LinearRecord


@dataclass(frozen=True)
class Coverage:
    """The linears of a model and what would become of them.

    Attributes:
        model: name of its class.
        matrices: linears of the captured graph, in order.
        sizes: name of a matrix → bytes it takes now (fused experts are many matrices).
        unseen: linear modules that the captured graph does not contain.
        total_bytes: of all parameters and persistent tensors, each once.
        breaks: why the model was captured in pieces, where it was.
    """

    model: str
    matrices: tuple[LinearRecord, ...]
    sizes: Mapping[str, int]
    unseen: tuple[str, ...]
    total_bytes: int
    breaks: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, graphs: Iterable[GraphRecord]) -> Coverage:
        """From graphs that were captured from one call of the model."""
        graphs = list(graphs)
        matrices = {line.name: line for graph in graphs for line in graph.linears}
        linears = {
            name: module.weight
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        }
        # A tied weight has one name in the graph and may have two modules.
        seen = {id(weight) for name, weight in linears.items() if name in matrices}
        unseen = tuple(name for name, weight in linears.items() if id(weight) not in seen)
        return cls(
            type(model).__name__,
            tuple(matrices.values()),
            _sizes(model, matrices.values()),
            unseen,
            sum(t.numel() * t.element_size() for t in model.state_dict(keep_vars=True).values())
            - _tied_bytes(model),
            tuple(graph.broken for graph in graphs if graph.broken),
        )

    @property
    def quantized(self) -> list[LinearRecord]:
        return [line for line in self.matrices if not line.kept_float]

    @property
    def weights(self) -> int:
        """How many weights would be quantized."""
        return sum(line.n * line.k for line in self.quantized)

    @property
    def quantized_float_bytes(self) -> int:
        """What these weights take now."""
        return sum(line.n * line.k * line.float_bits // 8 for line in self.quantized)

    def bytes_at(self, bits: float) -> float:
        """What the whole model would take with that budget."""
        return self.total_bytes - self.quantized_float_bytes + self.weights * bits / 8

    def data(self, bits: float) -> dict[str, Any]:
        """For `--json`."""
        return {
            "model": self.model,
            "quantized": len(self.quantized),
            "float": len(self.matrices) - len(self.quantized),
            "weights": self.weights,
            "bytes": self.total_bytes,
            "bits": bits,
            "bytes_at_bits": round(self.bytes_at(bits)),
            "linears": [
                {"name": line.name, "n": line.n, "k": line.k, "float": line.kept_float}
                for line in self.matrices
            ],
            "unseen": list(self.unseen),
            "graph_breaks": list(self.breaks),
        }


def _sizes(model: nn.Module, matrices: Iterable[LinearRecord]) -> dict[str, int]:
    named = dict(model.named_parameters(remove_duplicate=False))
    sizes = {}
    for line in matrices:
        weight = named.get(line.name, named.get(f"{line.name}.weight"))
        alone = line.n * line.k * line.float_bits // 8
        sizes[line.name] = alone if weight is None else weight.numel() * weight.element_size()
    return sizes


def _tied_bytes(model: nn.Module) -> int:
    """Bytes that a state dict lists more than once."""
    seen: set[int] = set()
    twice = 0
    for tensor in model.state_dict(keep_vars=True).values():
        if id(tensor) in seen:
            twice += tensor.numel() * tensor.element_size()
        seen.add(id(tensor))
    return twice


def coverage_table(found: Coverage, bits: float, each: bool = False) -> list[RenderableType]:
    """The coverage for people; alike matrices of all layers in one line unless `each`."""
    numbers = ("count", "shape", "MB")
    prefix = "" if each else common_prefix(line.name for line in found.matrices)
    table = plain_table(linears_of(prefix), *numbers, "becomes", numbers=numbers)
    groups: dict[tuple[str, int, int, str], list[LinearRecord]] = {}
    for line in found.matrices:
        name = line.name if each else same_place(line.name)
        groups.setdefault((name, line.n, line.k, line.kept_float), []).append(line)
    for (name, n, k, reason), lines in groups.items():
        size = sum(found.sizes[line.name] for line in lines) / 1e6
        becomes = Text(f"float: {reason}", style="yellow") if reason else Text("quantized")
        table.add_row(
            name.removeprefix(prefix), str(len(lines)), f"{n}×{k}", f"{size:.2f}", becomes
        )
    return [Text(_headline(found), style="bold"), table, *_remarks(found, bits)]


def _headline(found: Coverage) -> str:
    count, of = len(found.quantized), len(found.matrices)
    share = found.quantized_float_bytes / found.total_bytes
    return f"{found.model}: {count} of {of} linears would be quantized, {share:.0%} of all bytes"


def _remarks(found: Coverage, bits: float) -> Sequence[RenderableType]:
    now, then = found.total_bytes / 1e6, found.bytes_at(bits) / 1e6
    rest = (found.total_bytes - found.quantized_float_bytes) / 1e6
    remarks: list[RenderableType] = [
        f"The whole model: {now:.1f} MB now, {then:.1f} MB with {bits:g} true bits per quantized "
        f"weight; {rest:.1f} MB of both are float (embeddings, norms, what is listed as float)."
    ]
    if found.unseen:
        names = ", ".join(dict.fromkeys(map(same_place, found.unseen)))
        remarks.append(
            Text(
                f"{len(found.unseen)} linear modules are not in the captured graph and stay "
                f"float: {names}",
                style="yellow",
            )
        )
    remarks += [Text(f"A graph break splits the model: {why}", style="red") for why in found.breaks]
    return remarks
