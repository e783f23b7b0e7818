"""What passes know about a node or a matrix, as typed records instead of loose dictionaries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

META_KEY = "mixllm"


@dataclass(frozen=True)
class LinearSite:
    """One use of a constant matrix: y = x Wᵀ + b.

    Attributes:
        matrix: name of the matrix in `MixGraph.matrices`.
        module: path of the calling module, "" if there is none (functional use).
        n, k: output and input features.
        kept_float: why this linear is not quantized, "" if it is.
    """

    matrix: str
    module: str
    n: int
    k: int
    kept_float: str = ""


@dataclass(frozen=True)
class GroupedSite:
    """One product of sorted rows with a stack of constant matrices (`ir.experts`).

    Attributes:
        matrices: names in `MixGraph.matrices`, in the order of the experts.
        module: path of the calling module, "" if there is none.
        n, k: output and input features of each.
        kept_float: why this product is not quantized, "" if it is.
    """

    matrices: tuple[str, ...]
    module: str
    n: int
    k: int
    kept_float: str = ""


@dataclass(frozen=True)
class QuantizedExperts:
    """The op that a product with a stack of matrices became."""

    matrices: tuple[str, ...]
    kernel: str = "reference"


@dataclass(frozen=True)
class QuantizedSite:
    """One of the ops that a linear became."""

    matrix: str
    role: str  # "hadamard", "quantize_activation", "mixed_gemm", "dequantize", "linear"
    kernel: str = "reference"


def annotate(
    node: fx.Node, record: LinearSite | GroupedSite | QuantizedSite | QuantizedExperts
) -> None:
    """Attach a record to a node, replacing the one before."""
    node.meta[META_KEY] = record


def site_of(node: fx.Node) -> LinearSite | None:
    """The linear that this node is, if it is one of a constant matrix."""
    record = node.meta.get(META_KEY)
    return record if isinstance(record, LinearSite) else None


def grouped_of(node: fx.Node) -> GroupedSite | None:
    """The product with a stack of constant matrices that this node is, if it is one."""
    record = node.meta.get(META_KEY)
    return record if isinstance(record, GroupedSite) else None


def quantized_experts_of(node: fx.Node) -> QuantizedExperts | None:
    """The quantized product with a stack of matrices that this node is, if it is one."""
    record = node.meta.get(META_KEY)
    return record if isinstance(record, QuantizedExperts) else None


def quantized_of(node: fx.Node) -> QuantizedSite | None:
    """Which part of a quantized linear this node is, if it is one."""
    record = node.meta.get(META_KEY)
    return record if isinstance(record, QuantizedSite) else None
