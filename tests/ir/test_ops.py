"""The semantic ops as torch sees them: schemas, fakes, errors. Their numbers are compared with
float64 formulas in tests/properties/test_ops_oracle.py."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mixllm_compiler.errors import OptionError
from mixllm_compiler.formats.layout import join_layouts, pack
from mixllm_compiler.ir.ops import (
    DEQUANTIZE,
    GROUPED_LINEAR,
    HADAMARD,
    MIXED_GEMM,
    QUANTIZE_ACTIVATION,
    SEMANTIC,
)
from mixllm_compiler.quantizers.rtn import quantize_rtn

WIDTHS = torch.tensor([4, 8, 4, 3, 2, 5, 6, 4], dtype=torch.uint8)


@pytest.fixture
def packed():
    return pack(quantize_rtn(torch.randn(8, 200), WIDTHS, 64), "plain.v1")


def operands(packed, lead=(3,), mode="token"):
    """(codes, scales, sums) for a packed weight."""
    return QUANTIZE_ACTIVATION(torch.randn(*lead, packed.layout.k), mode, packed.layout.group)


@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck_hadamard(lead, dtype):
    torch.library.opcheck(HADAMARD, (torch.randn(*lead, 64, dtype=dtype), 32))


@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck_quantize_activation(mode, lead, dtype):
    torch.library.opcheck(QUANTIZE_ACTIVATION, (torch.randn(*lead, 200, dtype=dtype), mode, 64))


@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("lead", [(), (1,), (2, 3)])
def test_opcheck_mixed_gemm(packed, mode, lead):
    args = (*operands(packed, lead, mode), packed.blob, str(packed.layout))
    torch.library.opcheck(MIXED_GEMM, args)


@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("bias", [None, torch.ones(8, dtype=torch.bfloat16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck_dequantize(packed, mode, bias, dtype):
    codes, scales, sums = operands(packed, (2, 3), mode)
    layout = str(packed.layout)
    acc = MIXED_GEMM(codes, scales, sums, packed.blob, layout)
    torch.library.opcheck(DEQUANTIZE, (acc, scales, sums, packed.blob, layout, bias, dtype))


@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("lead", [(), (0,), (2, 3)])
def test_fakes_say_what_the_ops_do(packed, mode, lead):
    x = torch.randn(*lead, 200)

    def linear(x, blob):
        rotated = HADAMARD(x, 8)
        codes, scales, sums = QUANTIZE_ACTIVATION(rotated, mode, 64)
        acc = MIXED_GEMM(codes, scales, sums, blob, str(packed.layout))
        y = DEQUANTIZE(acc, scales, sums, blob, str(packed.layout), None, torch.bfloat16)
        return rotated, codes, scales, sums, acc, y

    real = linear(x, packed.blob)
    with FakeTensorMode() as fake_mode:
        fake = linear(fake_mode.from_tensor(x), fake_mode.from_tensor(packed.blob))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


def experts(x, ends, mode="token", block=0, dtype=torch.float32):
    """Arguments of a product with three experts of other widths, group 64."""
    weights = [quantize_rtn(torch.randn(8, 256), WIDTHS.roll(i), 64) for i in range(3)]
    packed = [pack(w, "plain.v1") for w in weights]
    layouts, offsets = join_layouts(p.layout for p in packed), torch.tensor(ends, dtype=torch.int32)
    return x, offsets, [p.blob for p in packed], layouts, mode, 64, block, dtype


@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("block", [0, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_grouped_linear(mode, block, dtype):
    x = torch.randn(5, 256, dtype=dtype)
    torch.library.opcheck(GROUPED_LINEAR, experts(x, [2, 2, 5], mode, block, dtype))


@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("block", [0, 32])
def test_every_expert_is_the_linear_of_its_rows(mode, block):
    """Also one without rows; rows behind the last offset belong to nobody and become zero."""
    x = torch.randn(7, 256)
    args = experts(x, [3, 3, 6], mode, block)
    y = GROUPED_LINEAR(*args)
    for rows, blob, layout in zip(
        (slice(0, 3), slice(3, 3), slice(3, 6)), args[2], args[3].split("; "), strict=True
    ):
        turned = HADAMARD(x[rows], block) if block else x[rows]
        codes, scales, sums = QUANTIZE_ACTIVATION(turned, mode, 64)
        acc = MIXED_GEMM(codes, scales, sums, blob, layout)
        expected = DEQUANTIZE(acc, scales, sums, blob, layout, None, torch.float32)
        assert torch.equal(y[rows], expected)
    assert y[:6].abs().amax(1).min() > 0
    assert not y[6:].any()


def test_a_grouped_linear_without_rows():
    y = GROUPED_LINEAR(*experts(torch.randn(0, 256), [0, 0, 0]))
    assert y.shape == (0, 8)


def test_one_op_a_step_and_none_writes_its_arguments():
    assert len(SEMANTIC) == 5  # the last one for experts
    assert not any(op._schema.is_mutable for op in SEMANTIC)


def test_every_row_of_a_batch_gets_the_bits_it_gets_alone(packed):
    """Prefill and decode must see the same codes, so no op may depend on the batch size."""
    x = torch.randn(33, 256)
    assert torch.equal(HADAMARD(x, 128)[:1], HADAMARD(x[:1], 128))
    together, alone = (QUANTIZE_ACTIVATION(v, "group", 64) for v in (x, x[:1]))
    assert all(torch.equal(a[:1], b) for a, b in zip(together, alone, strict=True))
    codes, scales, sums = operands(packed, (33,), "group")
    layout = str(packed.layout)
    acc = MIXED_GEMM(codes, scales, sums, packed.blob, layout)
    first = MIXED_GEMM(codes[:1], scales[:1], sums[:1], packed.blob, layout)
    assert torch.equal(acc[:1], first)


def test_many_groups_of_one_sign_stay_within_a_millionth():
    """The sum over groups is where fp32 would lose most: 896 equal terms."""
    k, group = 14_336, 16
    w = torch.rand(4, 1).expand(4, k)
    weight = quantize_rtn(w, torch.full((4,), 8, dtype=torch.uint8), group)
    packed = pack(weight, "plain.v1")
    codes, scales, sums = QUANTIZE_ACTIVATION(torch.full((1, k), 1.1), "token", group)
    layout = str(packed.layout)
    acc = MIXED_GEMM(codes, scales, sums, packed.blob, layout)
    y = DEQUANTIZE(acc, scales, sums, packed.blob, layout, None, torch.float32)
    expected = 127 * scales.double() * weight.dequantize().sum(1)
    assert ((y - expected).abs() <= 1e-6 * expected).all()


@pytest.mark.parametrize("mode", ["token", "group"])
def test_a_zero_token_has_scale_one_and_code_zero(mode):
    codes, scales, sums = QUANTIZE_ACTIVATION(torch.zeros(2, 100), mode, 64)
    assert (codes == 0).all() and (scales == 1).all() and (sums == 0).all()


def test_a_tail_is_padded_with_zero_codes():
    codes, scales, sums = QUANTIZE_ACTIVATION(torch.ones(1, 70), "group", 64)
    assert codes.shape == (1, 128) and scales.shape == (1, 2)
    assert (codes[:, :70] == 127).all() and (codes[:, 70:] == 0).all()
    assert sums.tolist() == [[64 * 127, 6 * 127]]


def test_an_unknown_mode_names_those_there_are():
    with pytest.raises(OptionError, match="'token' and 'group'"):
        QUANTIZE_ACTIVATION(torch.ones(1, 64), "row", 64)


def test_a_block_that_does_not_divide_is_refused():
    with pytest.raises(OptionError, match="K = 100 is not a multiple of the Hadamard block 64"):
        HADAMARD(torch.ones(1, 100), 64)


def test_text_that_is_no_layout_is_refused(packed):
    with pytest.raises(OptionError, match="is no layout; one looks like"):
        MIXED_GEMM(*operands(packed), packed.blob, "w4 g128")
