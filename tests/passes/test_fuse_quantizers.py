"""Quantizers that make their input themselves: which ones, and that not a bit changes.

Kernels are chosen for a GPU; on a CPU the graph runs through the definitions of the lowered ops.
"""

from __future__ import annotations

import dataclasses
import math
import operator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from mixllm_compiler.ir import ops
from mixllm_compiler.ir.text import render
from mixllm_compiler.ir.verify import verify
from mixllm_compiler.lowering import fused, lowered
from mixllm_compiler.lowering.cuda import compiling
from mixllm_compiler.lowering.target import Target
from mixllm_compiler.passes.fuse_quantizers import FuseQuantizers
from mixllm_compiler.passes.select_kernels import SelectKernels
from tests.helpers import HIDDEN, LlamaBlock, activations, captured, causal_lm, passed, token_ids

TYPES = [torch.float32, torch.bfloat16, torch.float16]
X = activations(2, 5)


@pytest.fixture(autouse=True)
def with_compiler(monkeypatch):
    monkeypatch.setattr(compiling, "available", lambda: "nvrtc 13.0")


def selected(graph, kernels=None, rotate=128, target="cuda sm_90"):
    """The graph after `select-kernels` for a GPU."""
    family = "asym" if kernels == "triton" else "two-level"
    ctx = passed(graph, "share-quantizers", family=family, rotate=rotate, bits=5)
    for quantizer in graph.calls(ops.QUANTIZE_ACTIVATION):
        quantizer.args = (quantizer.args[0], "token", quantizer.args[2])
    options = dataclasses.replace(ctx.options, kernels=kernels)
    ctx = dataclasses.replace(ctx, target=Target.parse(target), options=options)
    SelectKernels()(graph, ctx)
    return ctx


def run(graph):
    """All outputs on the graph's example inputs, lowered ops by their definitions."""

    class Expanded(fx.Interpreter):
        def call_function(self, target, args, kwargs):
            return super().call_function(lowered.EXPANSIONS.get(target, target), args, kwargs)

    inputs = [v.clone() if isinstance(v, torch.Tensor) else v for v in graph.inputs]
    with torch.no_grad():
        found = Expanded(graph.module).run(*inputs)
    return torch.utils._pytree.tree_leaves(found)


def fuse(graph, ctx):
    """Run the pass and check that nothing changes; its one-line reasons."""
    before = run(graph)
    changes = FuseQuantizers()(graph, ctx)
    verify(graph, "fuse-quantizers")
    after = run(graph)
    assert len(before) == len(after)
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    return [why for _, why in changes.lines]


def fused_in(model, *args, dtype=torch.float32, rotate=128, kernels=None, **kwargs):
    """What was fused in a model's graph, and the graph."""
    graph = captured(model.to(dtype).eval(), *args, **kwargs)
    return fuse(graph, selected(graph, kernels, rotate)), graph


# -- models --------------------------------------------------------------------------------------


def other_lm(name, **config):
    import transformers

    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    sizes |= {"max_position_embeddings": 512, "vocab_size": 96}
    sizes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    settings = getattr(transformers, name)(**{**sizes, **config})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


RMS = [
    "rms",
    "rms + residual",
    "silu · factor",
    "rms + residual",
    "rms + residual",
    "silu · factor",
]
GEMMA = [w.replace("rms", "rms_plus_one").replace("silu", "gelu_tanh") for w in RMS]
MODELS = {
    "llama": (lambda: causal_lm("llama"), RMS),
    "qwen2": (lambda: causal_lm("qwen2"), RMS),
    "mistral": (lambda: other_lm("MistralConfig"), RMS),
    "qwen3": (lambda: other_lm("Qwen3Config"), RMS),
    "phi3": (lambda: other_lm("Phi3Config"), RMS),
    "gemma": (lambda: other_lm("GemmaConfig"), GEMMA),
    "gpt2": (
        lambda: causal_lm("gpt2", layers=1),
        ["layer_norm", "layer_norm + residual", "gelu_new"],
    ),
    # The second sum is reshaped in front of its norm; ReLU has no fused form.
    "opt": (lambda: causal_lm("opt", layers=1), ["layer_norm + residual", "layer_norm"]),
    "neox": (
        lambda: other_lm("GPTNeoXConfig", num_hidden_layers=1),
        ["layer_norm", "layer_norm", "gelu"],
    ),
    # The norm feeds attention and the MLP at once, and one quantizer serves them all.
    "phi": (lambda: other_lm("PhiConfig", num_hidden_layers=1), ["layer_norm", "gelu_new"]),
    "starcoder2": (
        lambda: other_lm("Starcoder2Config", num_hidden_layers=1),
        ["layer_norm", "layer_norm + residual", "gelu_tanh"],
    ),
    # Norms of the branches' results stay; the one in front of the MLP is behind a sum.
    "gemma2": (
        lambda: other_lm("Gemma2Config", num_hidden_layers=1),
        ["rms_plus_one", "rms_plus_one + residual", "gelu_tanh · factor"],
    ),
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models_keep_every_bit(name, dtype):
    make, expected = MODELS[name]
    found, graph = fused_in(make(), token_ids(1, 6), dtype=dtype, use_cache=False)
    assert found == expected
    assert len(graph.calls(*fused.FUSED)) == len(expected)


@pytest.mark.parametrize("rotate", [0, 32, 128])
def test_the_transform_goes_with_the_quantizer(rotate):
    found, graph = fused_in(causal_lm("llama"), token_ids(1, 6), rotate=rotate, use_cache=False)
    assert found == RMS
    assert {n.args[-2] for n in graph.calls(*fused.FUSED)} == {rotate}
    assert not graph.calls(ops.HADAMARD)


def test_with_a_cache_and_symbolic_shapes():
    model, graphs = causal_lm("llama"), []

    def backend(gm, inputs):
        from mixllm_compiler.capture import capture

        graphs.append(capture(gm, inputs))
        return gm.forward

    with torch.no_grad():
        compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
        compiled(token_ids(2, 7), use_cache=True)
    graph = graphs[0]
    assert any(isinstance(v, torch.SymInt) for v in graph.inputs)
    sizes = {str(s) for v in graph.inputs if isinstance(v, torch.SymInt) for s in [v]}
    ctx = selected(graph)
    found = FuseQuantizers()(graph, ctx)
    assert [why for _, why in found.lines] == RMS
    verify(graph, "fuse-quantizers")
    assert {str(v) for v in graph.inputs if isinstance(v, torch.SymInt)} == sizes


def test_a_blocks_golden_ir(golden):
    graph = captured(LlamaBlock().bfloat16(), X.bfloat16())
    ctx = selected(graph)
    fuse(graph, ctx)
    golden.check("fuse-quantizers-cuda", render(graph, "after fuse-quantizers"))


# -- what is left alone --------------------------------------------------------------------------


class Behind(nn.Module):
    """Two linears behind whatever is given, which also gets the parameters."""

    def __init__(self, value, after=None, k=HIDDEN):
        super().__init__()
        torch.manual_seed(1)
        self.value, self.after = value, after or (lambda x, y, z: z)
        self.weight, self.bias = nn.Parameter(torch.randn(k)), nn.Parameter(torch.randn(k))
        self.wide = nn.Parameter(torch.randn(k))
        self.front, self.a = nn.Linear(HIDDEN, k), nn.Linear(k, HIDDEN)

    def forward(self, x):
        h = self.front(x)
        y = self.value(self, h)
        return self.after(h, y, self.a(y))


def llama(m, x, weight=None, eps=1e-6, to=None, dim=-1, power=2):
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(power).mean(dim, keepdim=True) + eps)
    return (m.weight if weight is None else weight) * h.to(to or x.dtype)


def gemma(m, x, one=1.0):
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
    return (h * (one + m.weight.float())).type_as(x)


def once(m, x):
    h = x.float()
    return (m.weight * (h * torch.rsqrt(torch.square(h).mean(-1, True) + 1e-6))).to(x.dtype)


def t5(m, x):
    variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
    return m.weight * (x * torch.rsqrt(variance + 1e-6)).to(x.dtype)


def without_weight(m, x):
    h = x.float()
    return (h * torch.rsqrt((h * h).mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


ROOT = math.sqrt(2 / math.pi)


def new_gelu(m, x, c=ROOT):
    return 0.5 * x * (1.0 + torch.tanh(c * (x + 0.044715 * torch.pow(x, 3.0))))


FUSIBLE = {
    "llama": (llama, "rms"),
    "weight on the right": (lambda m, x: llama(m, x, 1.0) * m.weight, None),  # 1.0 * h is no norm
    "gemma": (gemma, "rms_plus_one"),
    "rounded once": (once, "rms_once"),
    "t5": (t5, "rms"),
    "no weight": (without_weight, "rms"),
    "rms_norm": (lambda m, x: F.rms_norm(x, (HIDDEN,), m.weight, 1e-6), "rms_norm"),
    "rms_norm, no eps": (lambda m, x: F.rms_norm(x, (HIDDEN,), m.weight), "rms_norm"),
    "layer_norm": (lambda m, x: F.layer_norm(x, (HIDDEN,), m.weight, m.bias, 1e-6), "layer_norm"),
    "layer_norm, no bias": (lambda m, x: F.layer_norm(x, (HIDDEN,), m.weight), "layer_norm"),
    "layer_norm, bare": (lambda m, x: F.layer_norm(x, [HIDDEN]), "layer_norm"),
    "silu": (lambda m, x: F.silu(x), "silu"),
    "swapped gate": (lambda m, x: x.sigmoid() * F.silu(x), "silu · factor"),
    "gelu": (lambda m, x: F.gelu(x), "gelu"),
    "gelu with a gate": (lambda m, x: F.gelu(x, approximate="none") * (x + 1), "gelu · factor"),
    "gelu_new": (new_gelu, "gelu_new"),
    "gelu_new, swapped": (
        lambda m, x: (x * 0.5) * (torch.tanh((x + x.pow(3.0) * 0.044715) * ROOT) + 1),
        "gelu_new",
    ),
}


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", FUSIBLE)
def test_every_form_is_recognized_exactly(name, dtype):
    value, expected = FUSIBLE[name]
    found, _ = fused_in(Behind(value), X.to(dtype), dtype=dtype)
    assert found == [expected] if expected else found == []


def residual(m, x):
    s = x + x.sin()
    return llama(m, s)


def into(write):
    """Something is written between the norm's first call and its quantizer."""

    def value(m, x):
        s = x + x.sin()
        h = s.float() * 1 if write == "other" else s.to(torch.float32)
        root = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        if write == "sum":
            s.add_(1)
        elif write == "view":
            s.view(-1).mul_(2)
        elif write == "other":
            x.zero_()
        return m.weight * (h * root).to(x.dtype)

    return value


LEFT = {
    "relu": lambda m, x: F.relu(x),
    "sigmoid": lambda m, x: F.sigmoid(x),
    "silu in place": lambda m, x: F.silu(x, inplace=True),
    "a computed weight": lambda m, x: llama(m, x, m.weight * 2),
    "a computed layer norm": lambda m, x: F.layer_norm(x, (HIDDEN,), m.weight * 2, m.bias),
    "another constant": lambda m, x: gemma(m, x, 2.0),
    "another dimension": lambda m, x: llama(m, x, dim=0),
    "another power": lambda m, x: llama(m, x, power=4),
    "over two dimensions": lambda m, x: F.layer_norm(x, x.shape[-2:]),
    "another polynomial": lambda m, x: new_gelu(m, x, 0.8),
    "a gate that spreads": lambda m, x: F.silu(x) * x[..., :1],
    "eps that is a tensor": lambda m, x: llama(m, x, eps=m.bias[0]),
    "a sum in place": into("sum"),
    "a view in place": into("view"),
    "an operand in place": into("other"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_something_else_stays(name):
    found, graph = fused_in(Behind(LEFT[name]), X)
    assert found == []
    assert not graph.calls(*fused.FUSED)


@pytest.mark.parametrize("wide", [torch.bfloat16, torch.float16])
def test_other_roundings_are_not_mistaken(wide):
    """In bf16 and fp16, where a value is rounded is visible."""
    wrong = {
        "one added in the narrow type": lambda m, x: (
            (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6))
            * (1 + m.weight)
        ).to(x.dtype),
        "the mean in the narrow type": lambda m, x: (
            m.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
        ),
        "x rounded again": lambda m, x: llama(m, (x.float() * 1.1).to(x.dtype).float()).to(x.dtype),
    }
    for name, value in wrong.items():
        found, _ = fused_in(Behind(value), X.to(wide), dtype=wide)
        assert found == [], name


def test_a_weight_of_another_type_stays():
    """Its product would be fp32."""
    model = Behind(lambda m, x: llama(m, x).to(x.dtype)).bfloat16()
    model.weight.data = model.weight.data.float()
    graph = captured(model.eval(), X.bfloat16())
    assert fuse(graph, selected(graph)) == []


def test_a_weight_of_another_type_is_read_where_the_form_allows():
    model = Behind(gemma).bfloat16()
    model.weight.data = model.weight.data.float()
    graph = captured(model.eval(), X.bfloat16())
    assert fuse(graph, selected(graph)) == ["rms_plus_one"]


READ_ELSEWHERE = {
    "by another op": lambda h, y, z: z + y,
    "by the result": lambda h, y, z: (z, y),
    "through a view": lambda h, y, z: (z, y.view(-1)),
    "by a write": lambda h, y, z: (z, y.add_(1)),
}


@pytest.mark.parametrize("name", READ_ELSEWHERE)
def test_a_value_that_others_read_stays(name):
    found, _ = fused_in(Behind(llama, READ_ELSEWHERE[name]), X)
    assert found == []


def test_a_value_that_a_float_linear_reads_stays():
    model = Behind(llama)
    graph = captured(model.eval(), X)
    ctx = passed(graph, "share-quantizers", family="two-level", bits=5, exclude=("a",), rotate=128)
    ctx = dataclasses.replace(ctx, target=Target.parse("cuda sm_90"))
    SelectKernels()(graph, ctx)
    assert fuse(graph, ctx) == []


@pytest.mark.parametrize("kernels", ["triton", "reference"])
def test_other_lowerings_keep_the_float_result(kernels):
    found, graph = fused_in(LlamaBlock(), X, kernels=kernels)
    assert found == []
    assert not graph.calls(*fused.FUSED)


def test_the_sum_may_be_read_before_and_after():
    def value(m, x):
        m.seen = x + x.sin()
        return llama(m, m.seen)

    def after(h, y, z):
        return z

    class Model(Behind):
        def forward(self, x):
            h = self.front(x)
            s = h + x
            early = s.cos()
            y = self.a(llama(self, s))
            return y + s, early, s

    model = Model(value, after)
    found, graph = fused_in(model, X)
    assert found == ["rms + residual"]
    assert len(graph.calls(fused.ADD_NORM_QUANTIZE)) == 1


def test_a_write_to_the_sum_afterwards_stays_a_write():
    class Model(Behind):
        def forward(self, x):
            s = self.front(x) + x
            y = self.a(llama(self, s))
            s.add_(y)
            return s, s.view(-1)

    found, _ = fused_in(Model(None), X)
    assert found == ["rms + residual"]


@pytest.mark.parametrize("wide", [False, True])
def test_a_sum_of_unequal_tensors_is_only_read(wide):
    class Model(Behind):
        def forward(self, x):
            s = self.front(x) + (x[:, :1] if wide else self.bias)
            return self.a(llama(self, s)) + s

    found, _ = fused_in(Model(None), X)
    assert found == ["rms"]


def test_two_settings_are_two_ops_and_one_sum():
    class Model(Behind):
        def __init__(self):
            super().__init__(None)
            self.b = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x):
            s = self.front(x) + x
            y = llama(self, s)
            return self.a(y) + self.b(y) + s

    graph = captured(Model().eval(), X)
    ctx = selected(graph, rotate=0)
    shared = next(
        q
        for q in graph.calls(lowered.LOWERED_QUANTIZE)
        if len(q.users) == 3
        and q.args[0].target is not None
        and len({r for g in q.users for r in g.users}) == 2
    )
    linears = list(dict.fromkeys(r for g in shared.users for r in g.users))
    with graph.graph.inserting_before(linears[1]):
        twin = graph.graph.call_function(shared.target, (*shared.args[:3], 64, shared.args[4]))
        parts = [graph.graph.call_function(operator.getitem, (twin, i)) for i in range(3)]
    linears[1].args = (*parts, *linears[1].args[3:])
    graph.settle()
    assert fuse(graph, ctx) == ["rms + residual"]
    (first,), (second,) = graph.calls(fused.ADD_NORM_QUANTIZE), graph.calls(fused.NORM_QUANTIZE)
    assert (first.args[-2], second.args[-2]) == (0, 64)
    assert second.args[0].args == (first, 3)


def test_a_shared_cast_stays_for_its_other_reader():
    class Model(Behind):
        def forward(self, x):
            h = self.front(x)
            wide = h.to(torch.float32)
            n = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
            return self.a(self.weight * n.to(h.dtype)) + wide

    found, _ = fused_in(Model(None), X.bfloat16(), dtype=torch.bfloat16)
    assert found == ["rms"]


def test_views_between_move_in_front():
    class Model(Behind):
        def forward(self, x):
            s = self.front(x) + x
            y = llama(self, s).view(-1, HIDDEN).contiguous()
            return self.a(y).view(x.shape) + s

    found, graph = fused_in(Model(None), X)
    assert found == ["rms + residual"]
    (op,) = graph.calls(fused.ADD_NORM_QUANTIZE)
    assert [a.target for a in op.args[:2]] == ["reshape", "reshape"]


def test_a_view_that_cuts_rows_stays():
    class Model(Behind):
        def forward(self, x):
            y = llama(self, self.front(x)).view(2, -1, HIDDEN // 2)
            return self.narrow(y)

    model = Model(None)
    model.narrow = nn.Linear(HIDDEN // 2, HIDDEN)
    graph = captured(model.eval(), X)
    assert fuse(graph, selected(graph, rotate=0)) == []


def test_rows_too_long_for_registers_stay():
    k = 40_000
    found, _ = fused_in(Behind(lambda m, x: F.silu(x), k=k), X, rotate=0)
    assert found == []
    assert fused.reason("cuda.v1", torch.float32, fused.MAX_K, "token", 128) is None


@settings(max_examples=12)
@given(
    st.sampled_from([name for name, (_, expected) in FUSIBLE.items() if expected]),
    st.sampled_from(TYPES),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(), (3,), (2, 1), (1, 2, 2)]),
)
def test_any_mixture_keeps_every_bit(name, dtype, adds, views, lead):
    """Forms, types, sums, views and leading dimensions together."""

    class Model(Behind):
        def forward(self, x):
            h = self.front(x)
            s = h + x if adds else h
            y = self.value(self, s)
            y = y.reshape(-1, HIDDEN) if views else y
            z = self.a(y).reshape(x.shape)
            return z + s, s

    torch._dynamo.reset()
    x = activations(*lead).to(dtype)
    found, graph = fused_in(Model(FUSIBLE[name][0]), x, dtype=dtype)
    assert len(found) == 1
    norm = FUSIBLE[name][1] in fused.NORMS
    assert bool(graph.calls(fused.ADD_NORM_QUANTIZE)) == (adds and norm)
