"""Norms and activations in Dynamo's graph, to the last rounding.

Two models' norms of one name may round in other places, so what is recognized is arithmetic, not
names of modules: a chain of pure calls that ends in a value, with the types that the example values
have. What is not exactly one of the forms of `lowering.fused` is not recognized.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..ir.graph import MixGraph
from ..lowering import fused

_FUNCTIONS: dict[Any, str] = {
    operator.mul: "mul",
    torch.mul: "mul",
    operator.add: "add",
    torch.add: "add",
    operator.pow: "pow",
    torch.pow: "pow",
    torch.square: "square",
    torch.mean: "mean",
    torch.rsqrt: "rsqrt",
    torch.tanh: "tanh",
    F.silu: "silu",
    F.gelu: "gelu",
    F.layer_norm: "layer_norm",
    torch.layer_norm: "layer_norm",
    F.rms_norm: "rms_norm",
    torch.rms_norm: "rms_norm",
}
_METHODS = {"mul", "add", "pow", "square", "mean", "rsqrt", "tanh"}
_CASTS = {"to", "float", "half", "bfloat16", "type_as"}


@dataclass(frozen=True)
class Match:
    """A norm or an activation that ends in a value.

    Attributes:
        name: one of `fused.NORMS` or `fused.ACTIVATIONS`.
        x: what it is of.
        nodes: the calls that make it, the last one first.
        other: the residual that is added first, or the factor of an activation.
        weight, bias, eps: of a norm.
        sum: the addition of the residual, whose result others may read as well.
    """

    name: str
    x: fx.Node
    nodes: tuple[fx.Node, ...]
    other: fx.Node | None = None
    weight: fx.Node | None = None
    bias: fx.Node | None = None
    eps: float | None = None
    sum: fx.Node | None = None

    def inputs(self) -> list[fx.Node]:
        """The nodes that it reads."""
        return [n for n in (self.x, self.other, self.weight, self.bias) if n is not None]


def match(graph: MixGraph, value: fx.Node) -> Match | None:
    """What makes a value [..., K], if that is a norm over K or an activation."""
    if tensor(value) is None:
        return None
    for find in (_torch_norm, _rms_norm):
        found = find(graph, value)
        if found is not None:
            return _with_residual(found) if _alike(found.x, value) else None
    found = _activation(value)
    return found if found is not None and _alike(found.x, value) else None


def tensor(node: Any) -> Tensor | None:
    """The example value of a node, if it is a float tensor."""
    found = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return found if isinstance(found, Tensor) and found.is_floating_point() else None


# -- nodes ---------------------------------------------------------------------------------------


def _is(node: Any, name: str) -> bool:
    if not isinstance(node, fx.Node) or tensor(node) is None:
        return False
    if node.op == "call_function":
        return _FUNCTIONS.get(node.target) == name
    return node.op == "call_method" and node.target == name and name in _METHODS


def _alike(a: Any, b: Any) -> bool:
    """Tensors of one shape, type and device; symbolic sizes are compared without a guard."""
    one, other = tensor(a), tensor(b)
    if one is None or other is None or one.device != other.device:
        return False
    return one.dtype == other.dtype and list(map(str, one.shape)) == list(map(str, other.shape))


def _both(node: Any, name: str) -> Iterator[tuple[Any, Any]]:
    """The operands of a commutative call in both orders."""
    if _is(node, name) and len(node.args) == 2 and not node.kwargs:
        yield node.args
        yield node.args[::-1]


def _only(node: Any, name: str) -> Any:
    """The one argument of a call."""
    return node.args[0] if _is(node, name) and len(node.args) == 1 and not node.kwargs else None


def _uncast(node: Any) -> Any:
    """What a node is, but for a change of its type."""
    if not isinstance(node, fx.Node) or node.op != "call_method" or node.target not in _CASTS:
        return node
    source, before, after = node.args[0], tensor(node.args[0]), tensor(node)
    if before is None or after is None or before.device != after.device:
        return node
    if node.target == "to":
        given = [*node.args[1:], *node.kwargs.values()]
        plain = len(given) == 1 and isinstance(given[0], torch.dtype)
    else:
        plain = len(node.args) == 1 + (node.target == "type_as") and not node.kwargs
    return source if plain else node


def _wide(node: Any) -> bool:
    found = tensor(node)
    return found is not None and found.dtype == torch.float32


def _is_float(value: Any) -> bool:
    if isinstance(value, fx.Node):
        return isinstance(value.meta.get("example_value"), torch.SymFloat)
    return isinstance(value, float)


def _float(value: Any) -> float:
    """A number; one that Dynamo made symbolic is fixed, and another one compiles again."""
    return float(value.meta["example_value"] if isinstance(value, fx.Node) else value)


# -- norms ---------------------------------------------------------------------------------------


def _torch_norm(graph: MixGraph, value: fx.Node) -> Match | None:
    name = next((n for n in ("layer_norm", "rms_norm") if _is(value, n)), None)
    if name is None:
        return None
    names = ["input", "normalized_shape", "weight", "bias", "eps"]
    if name == "rms_norm":
        names.remove("bias")
    given: dict[str, Any] = dict(zip(names, value.args, strict=False)) | value.kwargs
    x, eps = given.get("input"), given.get("eps", 1e-5 if name == "layer_norm" else None)
    found = tensor(value)
    assert found is not None
    if not isinstance(x, fx.Node) or tuple(given["normalized_shape"]) != (found.shape[-1],):
        return None
    weight, bias = given.get("weight"), given.get("bias")
    if not all(p is None or _is_parameter(graph, p, value) for p in (weight, bias)):
        return None
    if (weight is None and bias is not None) or not (eps is None or _is_float(eps)):
        return None
    return Match(
        name, x, (value,), weight=weight, bias=bias, eps=None if eps is None else _float(eps)
    )


def _rms_norm(graph: MixGraph, value: fx.Node) -> Match | None:
    """The forms of RMSNorm that models write out."""
    bare = _normalized(_uncast(value))
    if bare is not None:
        return replace(bare, name="rms", nodes=_chain(value, bare))
    for weight, factor in _both(value, "mul"):  # rounded in front of the weight
        norm = _normalized(_uncast(factor))
        if norm is None or not _alike(factor, value) or not _is_parameter(graph, weight, value):
            continue
        if weight.meta["example_value"].dtype == value.meta["example_value"].dtype:
            nodes = _chain(value, replace(norm, nodes=_chain(factor, norm)))
            return replace(norm, name="rms", weight=weight, nodes=nodes)
    product = _uncast(value)
    for weight, factor in _both(product, "mul"):  # all in fp32
        norm = _normalized(factor)
        if norm is None or not _wide(product):
            continue
        nodes, name = _chain(value, replace(norm, nodes=_chain(product, norm))), "rms_once"
        extra: tuple[fx.Node, ...] = ()
        for one, rest in _both(weight, "add"):
            if isinstance(one, int | float) and one == 1 and _wide(weight) and _wide(rest):
                name, extra, weight = "rms_plus_one", (weight,), rest
                break
        source = _uncast(weight)
        if source is not weight and _wide(weight):
            extra, weight = (*extra, weight), source
        if _is_parameter(graph, weight, value):
            return replace(norm, name=name, weight=weight, nodes=(*nodes, *extra))
    return None


def _normalized(node: Any) -> Match | None:
    """x · rsqrt(mean(x²) + eps), formed in fp32."""
    for base, root in _both(node, "mul"):
        x, shifted = _uncast(base), _only(root, "rsqrt")
        exact = base is x or _wide(base)  # not rounded to a narrower type
        if not (exact and _wide(node) and _wide(root) and isinstance(x, fx.Node)):
            continue
        for eps, mean in _both(shifted, "add"):
            square = _mean(mean)
            wide = _square(square)
            if _is_float(eps) and _wide(wide) and _uncast(wide) is x:
                made = [node, root, shifted, mean, square]
                casts = [n for n in dict.fromkeys((base, wide)) if n is not x]
                return Match("", x, (*made, *casts), eps=_float(eps))
    return None


def _mean(node: Any) -> Any:
    """What a mean over the last dimension, which stays, is of."""
    if not _is(node, "mean"):
        return None
    given = dict(zip(("input", "dim", "keepdim"), node.args, strict=False)) | node.kwargs
    last = given.get("dim") in (-1, (-1,), [-1]) and given.get("keepdim") is True
    return given.get("input") if last and len(given) == 3 else None


def _square(node: Any) -> Any:
    """What a square is of."""
    if _is(node, "square"):
        return _only(node, "square")
    if _is(node, "mul") and len(node.args) == 2 and node.args[0] is node.args[1]:
        return node.args[0]
    return node.args[0] if _is(node, "pow") and node.args[1:] == (2,) else None


def _is_parameter(graph: MixGraph, node: Any, value: fx.Node) -> bool:
    """A constant of the model with one number for each of a value's last dimension."""
    found, of = tensor(node), tensor(value)
    if node not in graph.bindings or found is None or of is None or found.dim() != 1:
        return False
    if found.dtype not in fused.TYPES:
        return False
    return str(found.shape[0]) == str(of.shape[-1]) and found.device == of.device


def _with_residual(found: Match) -> Match:
    """The addition in front of a norm belongs to it, if it is one of two equal tensors."""
    for a, b in _both(found.x, "add"):
        if _alike(a, found.x) and _alike(b, found.x):
            return replace(found, x=a, other=b, sum=found.x, nodes=(*found.nodes, found.x))
    return found


def _chain(last: fx.Node, found: Match) -> tuple[fx.Node, ...]:
    return tuple(dict.fromkeys((last, *found.nodes)))


# -- activations ---------------------------------------------------------------------------------


def _activation(value: fx.Node) -> Match | None:
    alone = _function(value)
    if alone is not None:
        return alone
    for made, factor in _both(value, "mul"):
        found = _function(made)
        if found is not None and _alike(made, value) and _alike(factor, value):
            return replace(found, other=factor, nodes=(value, *found.nodes))
    return None


def _function(node: Any) -> Match | None:
    if _is(node, "silu") and len(node.args) == 1 and not node.kwargs.get("inplace"):
        return Match("silu", node.args[0], (node,))
    if _is(node, "gelu") and len(node.args) == 1:
        form = node.kwargs.get("approximate", "none")
        return Match({"none": "gelu", "tanh": "gelu_tanh"}[form], node.args[0], (node,))
    return _written_out_gelu(node)


def _written_out_gelu(node: Any) -> Match | None:
    """0.5 · x · (1 + tanh(√(2/π) · (x + 0.044715 · x³))), every step rounded to the type of x."""
    for half, bracket in _both(node, "mul"):
        x, one = _times(half, 0.5), _plus(bracket, 1.0)
        inner = _only(one, "tanh")
        polynomial = _times(inner, math.sqrt(2.0 / math.pi))
        for first, cubic in _both(polynomial, "add"):
            cube = _times(cubic, 0.044715)
            third = _is(cube, "pow") and cube.args[0] is x and cube.args[1:] == (3.0,)
            nodes = (node, half, bracket, one, inner, polynomial, cubic, cube)
            if third and first is x and x is not None and all(_alike(n, x) for n in nodes):
                return Match("gelu_new", x, nodes)
    return None


def _number(name: str) -> Callable[[Any, float], Any]:
    def other(node: Any, number: float) -> Any:
        pairs = _both(node, name)
        return next((b for a, b in pairs if isinstance(a, int | float) and a == number), None)

    return other


_times, _plus = _number("mul"), _number("add")
