"""Tiny models, graphs captured from them, and the quantized result by another way.

The oracle shares no line with the package's ops: it never sees a packed blob. Ŵ comes from the
quantizer, x̂ from the formula, and both are multiplied in float64.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixllm_compiler.capture import capture
from mixllm_compiler.errors import MixLLMError
from mixllm_compiler.ir.graph import MixGraph
from mixllm_compiler.options import Options
from mixllm_compiler.passes.context import Context
from mixllm_compiler.passes.instruments import Verifier
from mixllm_compiler.passes.pipeline import Pipeline, default_pipeline
from mixllm_compiler.quantizers.rtn import quantize_rtn
from mixllm_compiler.transforms.hadamard import hadamard_matrix

HIDDEN = 128
VOCABULARY = 96
EAGER = {"lower": "eager", "quiet": True, "verify": True}
PLAIN = {"family": "asym", "rotate": 0}
"""Rows and inputs as they are: one linear is three ops, and graphs stay short."""
W4 = {"widths": (4,), **PLAIN, **EAGER}
"""Every row has 4 bits: the oracle needs no plan."""

Widths = int | Tensor | Mapping[str, int | Tensor]


# -- models --------------------------------------------------------------------------------------


def mlp(seed: int = 0, wide: int = 192) -> nn.Sequential:
    """Two linears; the second one's K is no multiple of the group."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(HIDDEN, wide), nn.ReLU(), nn.Linear(wide, HIDDEN)).eval()


def activations(*lead: int, k: int = HIDDEN, seed: int = 1) -> Tensor:
    return torch.randn(*lead, k, generator=torch.Generator().manual_seed(seed))


def token_ids(batch: int = 2, length: int = 9, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCABULARY, (batch, length), generator=draw)


def causal_lm(kind: str, layers: int = 2, seed: int = 0, **config: Any) -> Any:
    """A transformers model of the given architecture, with weights that are not all alike.

    Args:
        kind: "llama", "qwen2", "mixtral", "qwen2_moe", "gpt2" or "opt".
        config: fields of its configuration.
    """
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
    }
    if kind == "gpt2":
        sizes = {"n_embd": HIDDEN, "n_layer": layers, "n_head": 4, "n_positions": 2048}
    elif kind == "opt":
        sizes |= {"ffn_dim": 2 * HIDDEN, "word_embed_proj_dim": HIDDEN}
        del sizes["intermediate_size"], sizes["num_key_value_heads"]
    elif kind == "qwen2_moe":
        sizes |= {"moe_intermediate_size": HIDDEN, "shared_expert_intermediate_size": HIDDEN}
        sizes |= {"num_experts": 4, "num_experts_per_tok": 2}
    sizes |= {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
    names = {"llama": "Llama", "qwen2": "Qwen2", "mixtral": "Mixtral", "gpt2": "GPT2", "opt": "OPT"}
    names |= {"qwen2_moe": "Qwen2Moe"}
    settings = getattr(transformers, names[kind] + "Config")(**{**sizes, **config})
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)  # initial weights are so small that the blocks do nothing
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def tiny_llama(layers: int = 2, seed: int = 0, **config: Any) -> Any:
    return causal_lm("llama", layers, seed, **config)


class Attention(nn.Module):
    """Two heads of queries, one of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k_proj = nn.Linear(HIDDEN, HIDDEN // 2, bias=False)
        self.v_proj = nn.Linear(HIDDEN, HIDDEN // 2, bias=False)
        self.o_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (2, -1)).transpose(1, 2)
        k, v = self.k_proj(x).unsqueeze(1), self.v_proj(x).unsqueeze(1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.up_proj = nn.Linear(HIDDEN, 2 * HIDDEN, bias=False)
        self.down_proj = nn.Linear(2 * HIDDEN, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class LlamaBlock(nn.Module):
    """A decoder block in few nodes, the same ones in every torch and transformers."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(HIDDEN), nn.RMSNorm(HIDDEN)
        self.self_attn, self.mlp = Attention(), MLP()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


# -- compiling -----------------------------------------------------------------------------------


def compiled(model: Any, *, dynamic: bool | None = None, **options: Any) -> Any:
    """`torch.compile` with our backend, 4 bits a row, without Inductor unless asked."""
    return torch.compile(model, backend="mixllm", options={**W4, **options}, dynamic=dynamic)


def captured(model: Any, *args: Any, **kwargs: Any) -> MixGraph:
    """The one graph that Dynamo makes of this call, before any pass."""
    found: list[MixGraph] = []

    def backend(gm: Any, inputs: Any) -> Any:
        found.append(capture(gm, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(model, backend=backend, fullgraph=True, dynamic=False)(*args, **kwargs)
    (graph,) = found
    return graph


def passed(graph: MixGraph, until: str | Pipeline, **options: Any) -> Context:
    """Run the default pipeline up to and including a pass (or another pipeline), verified."""
    ctx = Context(Options.parse({**W4, **options}))
    pipeline = default_pipeline().until(until) if isinstance(until, str) else until
    with torch.no_grad():
        pipeline.run(graph, ctx, [Verifier()])
    return ctx


def outputs(graph: MixGraph) -> Tensor:
    """The first output of the graph on its own example inputs."""
    with torch.no_grad():
        result = graph.module(*graph.inputs)
    return result[0] if isinstance(result, tuple | list) else result


def refusal(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Exception:
    """The exception that a call raises, taken out of Dynamo's `BackendCompilerFailed`."""
    try:
        call(*args, **kwargs)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return error.inner_exception
    except Exception as error:  # noqa: BLE001
        return error
    raise AssertionError("the call succeeded, and it should have been refused")


# -- the oracle ----------------------------------------------------------------------------------


def quantized_input(x: Tensor, mode: str = "group", group: int = 128) -> Tensor:
    """x̂ in float64: symmetric int8 with one scale a token or a group of it."""
    k = x.shape[-1]
    rounded = []
    for part in x.float().split(k if mode == "token" else group, -1):
        amax = part.abs().amax(-1, keepdim=True)
        scale = torch.where(amax > 0, amax / 127, torch.ones_like(amax))
        rounded.append((part / scale).round().double() * scale.double())
    return torch.cat(rounded, -1)


def oracle_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    widths: int | Tensor = 4,
    mode: str = "group",
    block: int = 0,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """x̂ Ŵᵀ + b; with `block`, both factors are rotated before they are quantized."""
    n, k = weight.shape
    dtype = dtype or x.dtype
    weight = weight.detach()
    if block:
        turn = torch.block_diag(*[hadamard_matrix(block)] * (k // block))
        x, weight = (x.double() @ turn).to(x.dtype), (weight.double() @ turn).float()
    rows = widths if isinstance(widths, Tensor) else torch.full((n,), widths, dtype=torch.uint8)
    y = quantized_input(x, mode) @ quantize_rtn(weight, rows).dequantize().t()
    return (y if bias is None else y + bias.detach().double()).to(dtype)


def oracle(
    model: Any, widths: Widths = 4, mode: str = "group", block: int = 0, keep: tuple[str, ...] = ()
) -> Any:
    """A copy of the model whose Linear and Conv1D modules compute by the oracle.

    Args:
        widths: bits per row, for all modules or by module name.
        keep: ends of module names that stay float.
    """
    twin = copy.deepcopy(model)
    for name, module in twin.named_modules():
        conv = type(module).__name__ == "Conv1D"
        if not (isinstance(module, nn.Linear) or conv) or name.endswith(("lm_head", *keep)):
            continue
        n, k = module.weight.shape[::-1] if conv else module.weight.shape
        if k < 128 or min(n, k) < 64:
            continue
        rows = widths[name] if isinstance(widths, Mapping) else widths
        module.forward = types.MethodType(_forward(rows, mode, block, conv), module)
    return twin


def _forward(
    rows: int | Tensor, mode: str, block: int, conv: bool
) -> Callable[[nn.Module, Tensor], Tensor]:
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        weight: Any = self.weight.t() if conv else self.weight
        bias: Any = self.bias
        return oracle_linear(x, weight, bias, rows, mode, block)

    return forward


def assert_quantized(got: Tensor, exact: Tensor, expected: Tensor) -> None:
    """`got` is the oracle's result (`expected`) and not the float one (`exact`).

    Codes may differ where a value lies between two of them, so the distance is measured in
    quantization errors.
    """
    got, exact, expected = (t.detach().double() for t in (got, exact, expected))
    effect = (exact - expected).norm()
    assert effect > 1e-3 * exact.norm(), "quantization changes nothing here: a useless test"
    assert (got - exact).norm() > 0.5 * effect, "the float model ran"
    off = float((got - expected).norm() / effect)
    assert off < 0.05, f"{off:.1%} of the quantization error away from the oracle"


# -- bad input -----------------------------------------------------------------------------------


def refused(model: Any, x: Any, **options: Any) -> MixLLMError:
    """The error of a call through the backend, after which the float model is as it was."""
    before = bytes_of(model)
    error = refusal(compiled(model, **options), x)
    assert isinstance(error, MixLLMError), error
    assert bytes_of(model) == before
    return error


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    state = model.state_dict().items()
    return {
        name: value.flatten().view(torch.uint8).numpy().tobytes()
        for name, value in state
        if value.device.type != "meta"
    }


def assert_still_works(model: Any, x: Any) -> None:
    """In float by itself, and quantized as soon as the mistake is mended."""
    assert model(x).isfinite().all()
    torch._dynamo.reset()
    assert_quantized(compiled(model)(x), model(x), oracle(model)(x))
