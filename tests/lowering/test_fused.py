"""Ops of quantizers that make their input: fakes, definitions, and what they refuse."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses import FakeTensorMode

from mixllm_compiler.errors import LoweringError, OptionError
from mixllm_compiler.lowering import fused
from mixllm_compiler.lowering.cuda import quantizers
from mixllm_compiler.lowering.lowered import expand_quantize_activation

KERNEL = "cuda.v1"
QUANTIZER = ("token", 128, 32, KERNEL)


@pytest.mark.parametrize("lead", [(5,), (2, 3), ()])
@pytest.mark.parametrize("dtype", fused.TYPES, ids=str)
def test_fakes_have_the_shapes_and_types_of_the_definition(lead, dtype):
    x, other, w = (torch.randn(s).to(dtype) for s in ((*lead, 320), (*lead, 320), (320,)))
    calls = [
        (fused.NORM_QUANTIZE, fused.expand_norm_quantize, (x, w, w, 1e-5, "layer_norm")),
        (fused.ADD_NORM_QUANTIZE, fused.expand_add_norm_quantize, (x, other, w, None, 1e-5, "rms")),
        (fused.ACTIVATION_QUANTIZE, fused.expand_activation_quantize, (x, other, "silu")),
    ]
    for op, expansion, args in calls:
        real = expansion(*args, *QUANTIZER)
        with FakeTensorMode() as fakes:
            faked = [fakes.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            fake = op(*faked, *QUANTIZER)
        assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]


@pytest.mark.parametrize("hadamard", [0, 32])
def test_the_definition_quantizes_what_the_model_computes(hadamard):
    x, residual, w = torch.randn(3, 96).bfloat16(), torch.randn(3, 96).bfloat16(), torch.randn(96)
    w = w.bfloat16()
    args = ("token", 32, hadamard, KERNEL)
    *found, total = fused.expand_add_norm_quantize(x, residual, w, w, 1e-6, "layer_norm", *args)
    assert torch.equal(total, x + residual)
    y = F.layer_norm(total, (96,), w, w, 1e-6)
    for one, other in zip(found, expand_quantize_activation(y, *args), strict=True):
        assert torch.equal(one, other)


def test_norms_differ_in_where_they_round():
    x, w = torch.randn(50, 128).bfloat16(), torch.randn(128).bfloat16()
    found = {n: fused.normalized(x, w, None, 1e-6, n) for n in fused.NORMS}
    assert all(y.dtype == torch.bfloat16 for y in found.values())
    assert not torch.equal(found["rms"], found["rms_once"])
    assert torch.equal(found["rms_norm"], found["rms_once"])
    ones = fused.normalized(x, torch.zeros_like(w), None, 1e-6, "rms_plus_one")
    assert torch.equal(ones, fused.normalized(x, None, None, 1e-6, "rms"))


@pytest.mark.parametrize("activation", fused.ACTIVATIONS)
def test_activations_are_rounded_before_the_gate(activation):
    x, factor = torch.randn(50, 128).bfloat16(), torch.randn(50, 128).bfloat16()
    alone = fused.activated(x, None, activation)
    assert alone.dtype == torch.bfloat16
    assert torch.equal(fused.activated(x, factor, activation), alone * factor)


def test_unknown_names_are_refused_with_the_known_ones():
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="norms are rms, rms_once"):
        fused.normalized(x, None, None, 1e-5, "rmsnorm")
    with pytest.raises(ValueError, match="silu, gelu, gelu_tanh, gelu_new are"):
        fused.activated(x, None, "relu")
    with pytest.raises(ValueError, match="has no bias"):
        fused.normalized(x, x[0], x[0], 1e-5, "rms")
    with pytest.raises(ValueError, match="needs a number for eps"):
        fused.normalized(x, None, None, None, "rms")


@pytest.mark.parametrize(
    "change, says",
    [
        ({"kernel": "triton.v1"}, "has no fused quantizers"),
        ({"dtype": torch.float64}, r"not torch\.float64"),
        ({"k": 40_000}, "in registers, not 40000"),
        ({"mode": "group"}, "not mode 'group'"),
        ({"hadamard": 512}, "in blocks up to 256, not 512"),
    ],
)
def test_what_cannot_be_fused_has_a_reason(change, says):
    fits = {"kernel": KERNEL, "dtype": torch.bfloat16, "k": 4096, "mode": "token", "hadamard": 128}
    assert fused.reason(**fits) is None
    with pytest.raises(AssertionError, match=says):
        raise AssertionError(fused.reason(**{**fits, **change}))


def test_the_cuda_kernels_know_all_that_may_be_fused():
    assert set(quantizers.NORMS) == set(fused.NORMS)
    assert {*quantizers.HADAMARD_BLOCKS, 0} == set(fused.BLOCKS)
    dealt = quantizers.split(fused.MAX_K)
    assert 8 * dealt.runs * dealt.each == 32  # values of a thread: more would leave the registers


def test_on_a_cpu_the_ops_say_what_they_need():
    x = torch.randn(2, 64)
    with pytest.raises(LoweringError, match="needs a CUDA device, this is cpu"):
        fused.NORM_QUANTIZE(x, None, None, 1e-5, "rms", *QUANTIZER)
    with pytest.raises(LoweringError, match="needs a CUDA device, this is cpu"):
        fused.ACTIVATION_QUANTIZE(x, None, "silu", *QUANTIZER)
    with pytest.raises(OptionError, match="unknown kernel"):
        fused.ACTIVATION_QUANTIZE(x, None, "silu", *QUANTIZER[:3], "cuda.v0")


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda k, x: k.norm_quantize(x, None, x[0], 1e-5, "rms", *QUANTIZER[:3]), "no weight"),
        (
            lambda k, x: k.norm_quantize(x, x[0, :9], None, 1e-5, "rms", *QUANTIZER[:3]),
            "over K = 64",
        ),
        (
            lambda k, x: k.activation_quantize(x, x[:1], "silu", *QUANTIZER[:3]),
            "one shape and type",
        ),
        (
            lambda k, x: k.activation_quantize(x, None, "relu", *QUANTIZER[:3]),
            "or activation 'relu'",
        ),
        (lambda k, x: k.activation_quantize(x, None, "silu", "group", 128, 0), "not mode 'group'"),
        (
            lambda k, x: k.activation_quantize(x, None, "silu", "token", 128, 512),
            "in blocks of 512",
        ),
        (lambda k, x: k.quantize_activation(x, "token", 65, 0), "groups of whole eights"),
        (lambda k, x: k.activation_quantize(x.double(), None, "silu", *QUANTIZER[:3]), "float64"),
    ],
)
def test_the_cuda_kernels_refuse_what_they_do_not_know(call, says):
    with pytest.raises(LoweringError, match=says):
        call(quantizers.CudaKernels(), torch.randn(2, 64))
