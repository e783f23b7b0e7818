"""Real architectures, a walk over their modules, and what the backend hands over for them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import mixllm_compiler
from mixllm_compiler import backend
from mixllm_compiler.allocation.plan import Plan
from mixllm_compiler.formats.layout import Layout
from mixllm_compiler.ir import ops
from mixllm_compiler.ir.annotations import quantized_of
from mixllm_compiler.ir.graph import MixGraph
from mixllm_compiler.lowering.cpp.native import NATIVE_LINEAR
from mixllm_compiler.lowering.lowered import LOWERED_LINEAR
from mixllm_compiler.quantizers.rtn import quantize_rtn
from tests.helpers import causal_lm, quantized_input

ARCHITECTURES = {
    "llama": {"tie_word_embeddings": True},  # grouped-query attention
    "qwen2": {"tie_word_embeddings": True},  # biases in q, k, v
    "gpt2": {},  # Conv1D
    "opt": {},  # biases everywhere
    "untied": {},  # a head of its own
}
LINEARS_PER_LAYER = {"llama": 7, "qwen2": 7, "gpt2": 4, "opt": 6, "untied": 7}
LAYERS = 2


def build(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A tiny model of one of `ARCHITECTURES` (or "mixtral")."""
    architecture = "llama" if kind == "untied" else kind
    settings = {**ARCHITECTURES.get(kind, {}), **config}
    return causal_lm(architecture, LAYERS, seed, **settings).to(dtype)


def linear_modules(model: nn.Module) -> dict[str, tuple[nn.Module, int, int]]:
    """Every Linear and Conv1D but the output head: name → (module, N, K), by walking modules."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    found = {}
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, nn.Linear):
            found[name] = (module, *module.weight.shape)
        elif type(module).__name__ == "Conv1D":
            found[name] = (module, *module.weight.shape[::-1])
    return found


@contextlib.contextmanager
def handed_over() -> Iterator[list[MixGraph]]:
    """The graphs that leave our backend inside the block, as they will run."""
    found: list[MixGraph] = []
    original = backend._hand_over

    def spy(graph: MixGraph, *args: Any) -> Any:
        found.append(graph)
        return original(graph, *args)

    backend._hand_over = spy
    try:
        yield found
    finally:
        backend._hand_over = original


def mixed_ops(graph: MixGraph) -> dict[str, Layout]:
    """Name of the matrix → layout, for every mixed product of a graph."""
    found = {}
    for node in graph.module.graph.nodes:
        if node.target in (ops.MIXED_GEMM, LOWERED_LINEAR, NATIVE_LINEAR):
            site = quantized_of(node)
            assert site is not None and site.matrix not in found
            found[site.matrix] = graph.matrices[site.matrix].packed.layout
    return found


def float_linears(graph: MixGraph) -> int:
    """Matrix products with a constant weight that a graph still computes in float."""
    products = (torch._C._nn.linear, nn.functional.linear, torch.addmm, torch.mm)
    constants = {n for n in graph.module.graph.nodes if n in graph.bindings}
    return sum(
        node.target in products and bool(constants & set(node.all_input_nodes))
        for node in graph.module.graph.nodes
    )


def storages(graph: MixGraph) -> set[int]:
    """Where the tensors lie that a graph can read: its inputs and its own constants."""
    tensors = [v for v in graph.inputs if isinstance(v, Tensor)]
    tensors += [*graph.module.parameters(), *graph.module.buffers()]
    return {t.untyped_storage().data_ptr() for t in tensors}


def kl(p: Tensor, q: Tensor) -> float:
    """KL(p ‖ q) of two sets of logits, nats per token, in float64."""
    log_p, log_q = (logits.double().log_softmax(-1) for logits in (p, q))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


class OracleLinear(nn.Module):
    """y = x̂ Ŵᵀ + b in float64: Ŵ from the quantizer, x̂ from the formula, no packed blob."""

    def __init__(self, module: Any, n: int, widths: Tensor, mode: str) -> None:
        super().__init__()
        weight = module.weight.detach()
        weight = weight if isinstance(module, nn.Linear) else weight.t()
        assert weight.shape[0] == n
        self.mode = mode
        self.exact = quantize_rtn(weight, widths).dequantize(torch.float64)
        self.bias = None if module.bias is None else module.bias.detach().double()

    def forward(self, x: Tensor) -> Tensor:
        y = quantized_input(x, self.mode) @ self.exact.t()
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def oracle_of(model: Any, plan: Plan) -> Any:
    """A copy of a float model with the planned modules replaced by the oracle's."""
    twin = copy.deepcopy(model)
    homes = linear_modules(twin)
    assert homes.keys() == plan.sites.keys() | plan.float_sites.keys()
    for name in plan.sites:
        module, n, _ = homes[name]
        parent, _, leaf = name.rpartition(".")
        exact = OracleLinear(module, n, plan.sites[name].widths, plan.activation_mode)
        setattr(twin.get_submodule(parent), leaf, exact)
    return twin


def plan_of(model: Any, ids: Tensor, bits: float = 4.6, **options: Any) -> Plan:
    """A mix of widths that costs no gradients."""
    scores = mixllm_compiler.score(model, ids, kind="weight-error", **options)
    return mixllm_compiler.plan(scores, bits=bits, **options)
