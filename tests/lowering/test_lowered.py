"""Lowered ops: their fakes, their definitions, and what they say where no kernel can run."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode

from mixllm_compiler.errors import LoweringError, OptionError
from mixllm_compiler.formats.layout import pack
from mixllm_compiler.ir import reference
from mixllm_compiler.lowering.fused import FUSED
from mixllm_compiler.lowering.lowered import (
    EXPANSIONS,
    LOWERED,
    LOWERED_LINEAR,
    LOWERED_QUANTIZE,
    expand_linear,
    expand_quantize_activation,
)
from tests.lowering.cases import ALL_WIDTHS, assert_close, mix, oracle, random_weight

KERNEL = "triton.v1"


@pytest.fixture
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def packed_case(n=70, k=300, m=5, mode="token", widths=ALL_WIDTHS):
    weight = random_weight(n, k, mix(n, widths), 64)
    packed = pack(weight, "tiles64.v1")
    activation = reference.quantize_activation(torch.randn(m, k), mode, 64)
    return weight, packed, activation


def test_every_lowered_op_has_a_definition():
    assert set(EXPANSIONS) == {*LOWERED, *FUSED}
    for op, expansion in EXPANSIONS.items():
        names = [argument.name for argument in op._schema.arguments]
        assert list(expansion.__code__.co_varnames[: len(names)]) == names


@pytest.mark.parametrize("mode", ["token", "group"])
def test_the_definition_of_a_linear_reads_the_lowered_blob(mode):
    weight, packed, activation = packed_case(mode=mode)
    bias = torch.randn(weight.n)
    args = (bias, str(packed.layout), torch.float32)
    y = expand_linear(*activation, packed.blob, *args, KERNEL)
    plain = pack(weight, "plain.v1")
    same = expand_linear(*activation, plain.blob, bias, str(plain.layout), torch.float32, KERNEL)
    assert torch.equal(y, same)
    assert_close(y, *oracle(activation[0], activation[1], weight, bias))


@pytest.mark.parametrize("hadamard", [0, 32])
def test_the_definition_of_a_quantizer_transforms_first(hadamard):
    x = torch.randn(3, 96)
    found = expand_quantize_activation(x, "token", 32, hadamard, KERNEL)
    rotated = reference.hadamard(x, hadamard) if hadamard else x
    for one, other in zip(found, reference.quantize_activation(rotated, "token", 32), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("lead", [(5,), (2, 3), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fakes_have_the_shapes_and_types_of_the_definition(mode, lead, dtype):
    _, packed, _ = packed_case()
    x = torch.randn(*lead, 300)
    real = expand_quantize_activation(x, mode, 64, 0, KERNEL)
    y = expand_linear(*real, packed.blob, None, str(packed.layout), dtype, KERNEL)
    with FakeTensorMode() as fakes:
        fake = LOWERED_QUANTIZE(fakes.from_tensor(x), mode, 64, 0, KERNEL)
        blob = fakes.from_tensor(packed.blob)
        fake_y = LOWERED_LINEAR(*fake, blob, None, str(packed.layout), dtype, KERNEL)
    for one, other in zip((*fake, fake_y), (*real, y), strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype


def test_on_a_cpu_the_quantizer_says_what_it_needs(no_interpreter):
    with pytest.raises(LoweringError, match="needs a CUDA device, this is cpu"):
        LOWERED_QUANTIZE(torch.randn(2, 64), "token", 64, 0, KERNEL)


def test_on_a_cpu_the_linear_says_what_it_needs(no_interpreter):
    _, packed, activation = packed_case()
    with pytest.raises(LoweringError, match="needs a CUDA device, this is cpu"):
        LOWERED_LINEAR(*activation, packed.blob, None, str(packed.layout), torch.float32, KERNEL)


def test_an_unknown_kernel_names_the_nearest():
    with pytest.raises(OptionError, match=r"Did you mean 'triton\.v1'"):
        LOWERED_QUANTIZE(torch.randn(2, 64), "token", 64, 0, "triton.v2")


def test_activations_of_another_width_are_refused():
    _, packed, _ = packed_case()
    other = reference.quantize_activation(torch.randn(2, 500), "token", 64)
    with pytest.raises(LoweringError, match="do not fit layout"):
        LOWERED_LINEAR(*other, packed.blob, None, str(packed.layout), torch.float32, KERNEL)


def test_a_blob_of_another_layout_is_refused():
    _, packed, activation = packed_case()
    blob = packed.blob[:-256]
    with pytest.raises(LoweringError, match="packed for another layout"):
        LOWERED_LINEAR(*activation, blob, None, str(packed.layout), torch.float32, KERNEL)
