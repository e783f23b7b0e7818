"""Quantizers behind norms and activations on a GPU, against their definitions there.

Activations are exact. A norm's mean may be added up in another order than torch's: of the codes
99.9 % are equal and none is off by more than one (`lowering.agreement`).
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from mixllm_compiler.backend import mixllm
from mixllm_compiler.errors import LoweringError
from mixllm_compiler.lowering import fused, lowered
from mixllm_compiler.lowering.agreement import disagreement
from mixllm_compiler.lowering.target import Target
from mixllm_compiler.options import Options
from mixllm_compiler.passes.context import Context
from mixllm_compiler.passes.pipeline import default_pipeline
from tests.helpers import W4, captured, causal_lm, token_ids
from tests.lowering.cases import watched_outputs

pytestmark = pytest.mark.gpu

KERNEL = "cuda.v1"
TYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 4096), (300, 1536), (70, 14336), (5, 28672), (1, 40960)]
FEW_SHAPES = [(1, 4096), (70, 14336), (5, 28672)]
ODD = [(9, 97), (3, 1001), (66, 300), (2, 31)]


@pytest.fixture(autouse=True)
def guarded(request, monkeypatch):
    """Outputs are poisoned before, and the bytes around them watched."""
    yield from watched_outputs("cuda", request, monkeypatch)


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda").to(dtype)


def norm_arguments(k, norm, dtype, weight=None, hadamard=128):
    w = randn(k, dtype=weight or dtype)
    b = randn(k, dtype=weight or dtype) if norm == "layer_norm" else None
    return (w, b, 1e-5, norm, "token", 128, hadamard, KERNEL)


def check_norm(x, residual, *args):
    if residual is None:
        found = fused.NORM_QUANTIZE(x, *args)
        expected = fused.expand_norm_quantize(x, *args)
    else:
        found = fused.ADD_NORM_QUANTIZE(x, residual, *args)
        expected = fused.expand_add_norm_quantize(x, residual, *args)
        assert torch.equal(found[3], expected[3])
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert [t.shape for t in found] == [t.shape for t in expected]
    assert disagreement(found[:3], expected[:3]) == ""
    return found


def check_activation(x, factor, *args, exact=True):
    found = fused.ACTIVATION_QUANTIZE(x, factor, *args)
    expected = fused.expand_activation_quantize(x, factor, *args)
    assert disagreement(found, expected) == ""
    if exact:
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("norm", fused.NORMS)
@pytest.mark.parametrize("m, k", FEW_SHAPES)
def test_norms(norm, dtype, m, k):
    args = norm_arguments(k, norm, dtype)
    check_norm(randn(m, k, dtype=dtype), None, *args)
    check_norm(randn(m, k, dtype=dtype) * 3, randn(m, k, dtype=dtype), *args)


@pytest.mark.parametrize("hadamard", fused.BLOCKS)
@pytest.mark.parametrize("m, k", [(5, 4096), (100, 28672)])
def test_norms_with_every_block(hadamard, m, k):
    args = norm_arguments(k, "rms", torch.bfloat16, hadamard=hadamard)
    check_norm(randn(m, k), randn(m, k), *args)


@pytest.mark.parametrize(
    "hadamard, dtype",
    [(block, torch.bfloat16) for block in fused.BLOCKS] + [(128, dtype) for dtype in TYPES[1:]],
)
@pytest.mark.parametrize("m, k", SHAPES)
def test_plain_is_exact_with_every_block(hadamard, dtype, m, k):
    x = randn(m, k, dtype=dtype)
    args = ("token", 128, hadamard, KERNEL)
    found = lowered.LOWERED_QUANTIZE(x, *args)
    for one, other in zip(found, lowered.expand_quantize_activation(x, *args), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("activation", fused.ACTIVATIONS)
@pytest.mark.parametrize("m, k", FEW_SHAPES)
def test_activations(activation, gated, dtype, m, k):
    x, factor = randn(m, k, dtype=dtype) * 4, randn(m, k, dtype=dtype) if gated else None
    args = (activation, "token", 128, 128 if gated else 0, KERNEL)
    check_activation(x, factor, *args, exact=activation == "silu")


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_silu_is_exact_everywhere(dtype):
    """Also where the exponential overflows, and for denominators without a normal reciprocal."""
    x = torch.linspace(-120, 120, 64 * 1024, device="cuda").to(dtype).reshape(64, 1024)
    x[0, :3] = torch.tensor([0.0, -0.0, -87.5])
    check_activation(x, None, "silu", "token", 128, 0, KERNEL)
    check_activation(x, torch.ones_like(x), "silu", "token", 128, 128, KERNEL)


@pytest.mark.parametrize("m, k", ODD)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_odd_lengths(m, k, dtype):
    for norm in fused.NORMS:
        args = norm_arguments(k, norm, dtype, hadamard=0)
        check_norm(randn(m, k, dtype=dtype), randn(m, k, dtype=dtype), *args)
    x, factor = randn(m, k, dtype=dtype), randn(m, k, dtype=dtype)
    check_activation(x, factor, "silu", "token", 128, 0, KERNEL)


def test_rows_that_lie_apart_or_begin_anywhere():
    """Halves of one tensor, as a merged gate and up projection gives them."""
    both = randn(2, 33, 2 * 1536)
    gate, up = both.chunk(2, dim=-1)
    check_activation(gate, up, "silu", "token", 128, 128, KERNEL)
    shifted = randn(9, 1 + 512)[:, 1:]
    check_activation(shifted, shifted, "silu", "token", 128, 128, KERNEL)
    check_norm(shifted, None, *norm_arguments(512, "rms", torch.bfloat16))
    across = randn(512, 9).t()
    check_norm(across, across, *norm_arguments(512, "layer_norm", torch.bfloat16))


@pytest.mark.parametrize("weight", TYPES, ids=str)
@pytest.mark.parametrize("norm", ["rms_plus_one", "rms_once"])
def test_weights_of_another_type(norm, weight):
    args = norm_arguments(1024, norm, torch.bfloat16, weight)
    check_norm(randn(20, 1024), randn(20, 1024), *args)


def test_norms_without_parameters():
    for norm in fused.NORMS:
        args = (None, None, 1e-5, norm, "token", 128, 64, KERNEL)
        check_norm(randn(20, 1024), None, *args)


def test_zeros_and_extremes():
    x = randn(5, 512, dtype=torch.float32)
    x[0] = 0
    x[1] *= 1e-30
    x[2] *= 1e15
    x[3] = 3.0  # no variance
    check_norm(x, None, *norm_arguments(512, "layer_norm", torch.float32, hadamard=0))
    check_norm(x, None, *norm_arguments(512, "rms", torch.float32, hadamard=0))


def test_leading_dimensions_and_no_tokens():
    args = norm_arguments(256, "rms", torch.bfloat16)
    check_norm(randn(2, 3, 4, 256), randn(2, 3, 4, 256), *args)
    check_norm(randn(256), None, *args)
    assert fused.NORM_QUANTIZE(randn(0, 256), *args)[0].shape == (0, 256)


def test_a_tokens_bits_do_not_depend_on_the_others():
    args = norm_arguments(4096, "rms", torch.bfloat16)
    x, residual = randn(300, 4096), randn(300, 4096)
    together = fused.ADD_NORM_QUANTIZE(x, residual, *args)
    for i in (0, 17, 299):
        alone = fused.ADD_NORM_QUANTIZE(x[i : i + 1], residual[i : i + 1], *args)
        for one, other in zip(alone, together, strict=True):
            assert torch.equal(one, other[i : i + 1])


@pytest.mark.parametrize("m", [1, 200])
def test_the_same_input_gives_the_same_bits_every_time(unguarded, m):
    args = norm_arguments(4096, "layer_norm", torch.bfloat16)
    x, residual = randn(m, 4096), randn(m, 4096)
    first = fused.ADD_NORM_QUANTIZE(x, residual, *args)
    for _ in range(50):
        again = fused.ADD_NORM_QUANTIZE(x, residual, *args)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("m", [1, 200])
def test_chains_with_foreign_kernels_between(unguarded, m):
    """Kernels begin before their predecessor has ended; whatever is between, results wait."""
    from mixllm_compiler.lowering.cuda import launch

    args = norm_arguments(1024, "rms", torch.bfloat16)

    def layers(x):
        total = x
        for i in range(8):
            codes, scales, _, total = fused.ADD_NORM_QUANTIZE(x, total, *args)
            x = (codes.float() * scales).bfloat16()
            if i % 2:
                codes, scales, _ = fused.ACTIVATION_QUANTIZE(x, total, "silu", *args[4:])
                codes, scales, _, total = fused.ADD_NORM_QUANTIZE(total, x, *args)
        return codes, scales, total

    x = randn(m, 1024)
    with launch.trying(programmatic=False):
        expected = layers(x)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(layers(x), expected, strict=True))


@pytest.mark.parametrize("m", [1, 100])
def test_cuda_graphs_replay_with_new_inputs(unguarded, m):
    args = norm_arguments(768, "layer_norm", torch.bfloat16)
    x, residual = randn(m, 768), randn(m, 768)

    def layer():
        return fused.ADD_NORM_QUANTIZE(x, residual, *args)

    layer()  # compiles outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        held = layer()
    for _ in range(5):
        x.normal_()
        residual.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(held, layer(), strict=True))


def test_the_ops_are_well_behaved(unguarded):
    args = norm_arguments(256, "layer_norm", torch.float32)
    x = randn(2, 3, 256, dtype=torch.float32)
    torch.library.opcheck(fused.NORM_QUANTIZE, (x, *args))
    torch.library.opcheck(fused.ADD_NORM_QUANTIZE, (x, x.clone(), *args))
    torch.library.opcheck(fused.ACTIVATION_QUANTIZE, (x, x.clone(), "silu", *args[4:]))


def test_what_cannot_run_is_refused(unguarded):
    args = norm_arguments(256, "rms", torch.bfloat16)
    with pytest.raises(LoweringError, match="one scale a token"):
        fused.NORM_QUANTIZE(randn(2, 256), *args[:4], "group", *args[5:])
    with pytest.raises(LoweringError, match="of one shape and type"):
        fused.ADD_NORM_QUANTIZE(randn(2, 256), randn(1, 256), *args)
    with pytest.raises(LoweringError, match="in blocks of 512"):
        fused.NORM_QUANTIZE(randn(2, 256), *args[:6], 512, KERNEL)
    with pytest.raises(LoweringError, match=r"not torch\.float64"):
        fused.NORM_QUANTIZE(randn(2, 256, dtype=torch.float64), *args)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_with_fused_quantizers(unguarded, kind):
    """Kernels against the definitions of the same graph."""
    model = causal_lm(kind).bfloat16().cuda()
    graph = captured(model, token_ids(2, 9).cuda(), use_cache=False)
    options = Options.parse({**W4, "family": "two-level", "rotate": 128, "bits": 5})
    ctx = dataclasses.replace(Context(options), target=Target.of("cuda"))
    with torch.no_grad():
        default_pipeline().run(graph, ctx)
    assert len(graph.calls(*fused.FUSED)) >= 5

    class Expanded(fx.Interpreter):
        def call_function(self, target, args, kwargs):
            return super().call_function(lowered.EXPANSIONS.get(target, target), args, kwargs)

    with torch.no_grad():
        found = graph.module(*graph.inputs)[0].double()
        expected = Expanded(graph.module).run(*graph.inputs)[0].double()
    assert float((found - expected).norm() / expected.norm()) < 0.02


def test_a_compiled_model_with_fused_quantizers(unguarded):
    """Through Inductor, in CUDA graphs, over several lengths."""
    model = causal_lm("llama").bfloat16().cuda()
    options = {**W4, "family": "two-level", "rotate": 128, "bits": 5, "lower": "inductor"}
    with torch.no_grad():
        compiled = torch.compile(model, backend=mixllm, options=options)
        plain = torch.compile(
            causal_lm("llama").bfloat16().cuda(),
            backend=mixllm,
            options={**options, "lower": "eager", "disable": ("fuse-quantizers",)},
        )
        for length in (5, 9, 17):
            ids = token_ids(1, length).cuda()
            found = F.softmax(compiled(ids, use_cache=False).logits.float(), -1)
            expected = F.softmax(plain(ids, use_cache=False).logits.float(), -1)
            assert float((found - expected).abs().max()) < 0.05
