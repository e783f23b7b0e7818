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
from mixllm_compiler.allocation.plan import Plan, SitePlan
from mixllm_compiler.formats.layout import Layout
from mixllm_compiler.ir import ops
from mixllm_compiler.ir.annotations import quantized_experts_of, quantized_of
from mixllm_compiler.ir.graph import MixGraph
from mixllm_compiler.lowering.cpp.native import NATIVE_LINEAR
from mixllm_compiler.lowering.lowered import LOWERED_LINEAR
from mixllm_compiler.quantizers.rtn import quantize_rtn
from mixllm_compiler.transforms.hadamard import block_for, block_hadamard, hadamard_matrix
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
MIXTURES = {"mixtral": {"num_local_experts": 4}, "qwen2_moe": {}}  # of experts


def build(kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    """A tiny model of one of `ARCHITECTURES` or `MIXTURES`."""
    architecture = "llama" if kind == "untied" else kind
    settings = {**ARCHITECTURES.get(kind, {}), **MIXTURES.get(kind, {}), **config}
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


def experts(model: nn.Module) -> dict[str, Tensor]:
    """Every expert: name → its matrix [N, K], by walking parameters."""
    return {
        f"{name}.{e}": w.detach()[e]
        for name, w in model.named_parameters()
        if w.dim() == 3
        for e in range(len(w))
    }


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
    """Name of the matrix → layout, for every mixed GEMM of a graph and every expert."""
    found: dict[str, Layout] = {}
    for node in graph.module.graph.nodes:
        if node.target in (ops.MIXED_GEMM, LOWERED_LINEAR, NATIVE_LINEAR):
            site = quantized_of(node)
            assert site is not None and site.matrix not in found
            found[site.matrix] = graph.matrices[site.matrix].packed.layout
        if node.target is ops.GROUPED_LINEAR:
            many = quantized_experts_of(node)
            assert many is not None and found.keys().isdisjoint(many.matrices)
            layouts = Layout.parse_all(node.args[3])
            found |= dict(zip(many.matrices, layouts, strict=True))
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

    def __init__(self, module: Any, site: SitePlan, plan: Plan) -> None:
        super().__init__()
        weight = module.weight.detach()
        weight = weight if isinstance(module, nn.Linear) else weight.t()
        assert weight.shape == (site.n, site.k)
        self.mode, self.group = plan.activation_mode, site.group
        self.block = block_for(site.k, plan.rotation)
        if self.block:
            weight = turned_weight(weight, self.block)
        self.exact = rounded(weight, site)
        self.bias = None if module.bias is None else module.bias.detach().double()

    def forward(self, x: Tensor) -> Tensor:
        turned = x
        if self.block:
            turned = (x.double() @ turn(x.shape[-1], self.block)).to(x.dtype)
        y = quantized_input(turned, self.mode, self.group) @ self.exact.t()
        return (y if self.bias is None else y + self.bias).to(x.dtype)


class OracleExperts(nn.Module):
    """Experts of transformers in float64, each for the tokens that chose it, from Ŵ and x̂."""

    def __init__(self, module: Any, sites: dict[str, list[SitePlan]], plan: Plan) -> None:
        super().__init__()
        self.mode, self.rotation = plan.activation_mode, plan.rotation
        self.group, self.act_fn = sites["down_proj"][0].group, module.act_fn
        self.exact: dict[str, list[Tensor]] = {}
        for part, own in sites.items():
            stack = getattr(module, part).detach()
            if block := block_for(stack.shape[-1], self.rotation):
                stack = turned_weight(stack, block)
            self.exact[part] = [rounded(w, site) for w, site in zip(stack, own, strict=True)]

    def product(self, x: Tensor, part: str, expert: int) -> Tensor:
        if block := block_for(x.shape[-1], self.rotation):
            x = (x.double() @ turn(x.shape[-1], block)).to(x.dtype)
        y = quantized_input(x, self.mode, self.group) @ self.exact[part][expert].t()
        return y.to(x.dtype)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for expert in range(len(self.exact["down_proj"])):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up = self.product(x[token], "gate_up_proj", expert).chunk(2, -1)
            out = self.product(self.act_fn(gate) * up, "down_proj", expert)
            y[token] += out * weights[token, place, None]  # a token goes to an expert once
        return y


def rounded(w: Tensor, site: SitePlan) -> Tensor:
    """Ŵ of a matrix that is rounded to nearest, float64."""
    two_level = site.family == "two-level"
    made = quantize_rtn(
        w, site.widths, site.group, family=site.family, clip=two_level, spans=site.spans
    )
    return made.dequantize(torch.float64)


def turned_weight(w: Tensor, block: int) -> Tensor:
    """W T in fp32, in the package's order of sums: a row's integers can hang on its last bit."""
    turned = block_hadamard(w.float(), block)
    exact = w.double() @ turn(w.shape[-1], block)
    assert (turned.double() - exact).abs().max() <= 1e-6 * exact.abs().max()
    return turned


def turn(k: int, block: int) -> Tensor:
    """The rotation of K inputs, float64."""
    return torch.block_diag(*[hadamard_matrix(block)] * (k // block))


def oracle_of(model: Any, plan: Plan) -> Any:
    """A copy of a float model with the planned modules replaced by the oracle's."""
    twin = copy.deepcopy(model)
    homes, many = linear_modules(twin), experts(twin)
    large = {name for name, (_, n, k) in homes.items() if min(n, k) >= 64}  # no gates
    assert large | many.keys() == plan.sites.keys() | plan.float_sites.keys()
    for name in {name.rpartition(".")[0].rpartition(".")[0] for name in many}:
        parts = {
            part: [
                plan.sites[f"{name}.{part}.{e}"]
                for e in range(len(twin.get_parameter(f"{name}.{part}")))
            ]
            for part in ("gate_up_proj", "down_proj")
        }
        parent, _, leaf = name.rpartition(".")
        module = twin.get_submodule(name)
        setattr(twin.get_submodule(parent), leaf, OracleExperts(module, parts, plan))
    for name in plan.sites.keys() - many.keys():
        parent, _, leaf = name.rpartition(".")
        exact = OracleLinear(homes[name][0], plan.sites[name], plan)
        setattr(twin.get_submodule(parent), leaf, exact)
    return twin


def plan_of(model: Any, ids: Tensor, bits: float = 4.6, **options: Any) -> Plan:
    """A mix of widths that costs no gradients."""
    scores = mixllm_compiler.score(model, ids, kind="weight-error", **options)
    return mixllm_compiler.plan(scores, bits=bits, **options)
