"""The C++ kernels on every instruction set of this machine, against the reference."""

from __future__ import annotations

import pytest
import torch

from mixllm_compiler.errors import LoweringError
from mixllm_compiler.formats.layout import pack
from mixllm_compiler.ir import reference
from mixllm_compiler.lowering.cpp import isa, launch
from mixllm_compiler.lowering.lowered import (
    LOWERED_LINEAR,
    LOWERED_QUANTIZE,
    expand_linear,
    expand_quantize_activation,
)
from tests.lowering.cases import (
    ALL_WIDTHS,
    Guarded,
    assert_close,
    mix,
    oracle,
    random_weight,
    unit_weight,
)

KERNEL = "cpp.v1"
PACKING = "panels64.v1"
EXACT = ("two-level", "token")  # one meaning, to the last bit
SCHEMES = [(family, mode) for family in ("asym", "two-level") for mode in ("token", "group")]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=list(isa.ISAS))
def instructions(request):
    """Every instruction set; those that this machine lacks are skipped."""
    if isa.ISAS[request.param] not in isa.available():
        pytest.skip(f"this CPU has no {request.param}")
    with launch.using(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Outputs are poisoned before, and the bytes around them watched."""
    allocate = Guarded()
    monkeypatch.setattr(launch, "allocate", allocate)
    yield
    allocate.check()


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def run(weight, activation, dtype=torch.float32, bias=None):
    packed = pack(weight, PACKING)
    args = (packed.blob, bias, str(packed.layout), dtype, KERNEL)
    return LOWERED_LINEAR(*activation, *args), expand_linear(*activation, *args)


def check(weight, activation, mode, dtype=torch.float32, bias=None):
    y, expansion = run(weight, activation, dtype, bias)
    codes, scales = activation[0].flatten(0, -2), activation[1].flatten(0, -2)
    assert_close(y.flatten(0, -2), *oracle(codes, scales, weight, bias))
    if (weight.family, mode) == EXACT:
        assert torch.equal(y, expansion)
    return y


@pytest.mark.parametrize("family, mode", SCHEMES)
@pytest.mark.parametrize("widths", [(4,), (8,), (4, 8), ALL_WIDTHS])
def test_linear_matches_the_oracle(instructions, threads, family, mode, widths):
    for m, n, k, group in [
        (1, 200, 384, 128),
        (7, 130, 300, 64),
        (14, 65, 97, 32),
        (3, 66, 600, 256),
    ]:
        weight = random_weight(n, k, mix(n, widths), group, family)
        activation = reference.quantize_activation(torch.randn(m, k), mode, group)
        check(weight, activation, mode, bias=torch.randn(n))


@pytest.mark.parametrize("family, mode", SCHEMES)
def test_any_number_of_tokens(instructions, family, mode):
    weight = random_weight(200, 224, mix(200, ALL_WIDTHS), 32, family)
    packed = pack(weight, PACKING)
    all_of_them = reference.quantize_activation(torch.randn(200, 224), mode, 32)
    args = (packed.blob, None, str(packed.layout), torch.float32, KERNEL)
    expected, magnitude = oracle(*all_of_them[:2], weight)
    for m in (*range(1, 27), *range(92, 100), 192, 193, 200):
        y = LOWERED_LINEAR(*(part[:m] for part in all_of_them), *args)
        assert_close(y, expected[:m], magnitude[:m])


def test_more_tokens_than_are_tiled_at_a_time(instructions):
    weight = random_weight(70, 64, mix(70, (3, 8)), 64, "two-level")
    activation = reference.quantize_activation(torch.randn(1000, 64), "token", 64)
    check(weight, activation, "token")


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("mode", ["token", "group"])
def test_integers_are_exact(instructions, mode, extreme):
    m, n, k, group = 13, 150, 300, 128
    weight = unit_weight(n, k, mix(n, ALL_WIDTHS), group, extreme)
    codes = torch.randint(-127, 128, (m, 384), dtype=torch.int8)
    if extreme:
        codes = torch.where(codes > 0, 127, -127).to(torch.int8)
    codes[:, k:] = 0
    sums = codes.view(m, 3, group).sum(-1, dtype=torch.int32)
    y, _ = run(weight, (codes, torch.ones(m, 1 if mode == "token" else 3), sums))
    exact = codes[:, :k].long() @ weight.dequantize().long().T
    assert exact.abs().max() < 2**24
    assert torch.equal(y.long(), exact)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [None, *DTYPES, torch.float64])
@pytest.mark.parametrize("family, mode", [("asym", "group"), ("two-level", "token")])
def test_output_types_and_bias_types(instructions, family, mode, dtype, bias):
    weight = random_weight(300, 130, mix(300, (4, 8)), 64, family)
    activation = reference.quantize_activation(torch.randn(2, 3, 130), mode, 64)
    b = None if bias is None else torch.randn(300).to(bias)
    y = check(weight, activation, mode, dtype, b)
    assert y.dtype == dtype and y.shape == (2, 3, 300)


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_beyond_the_ordinary_are_rounded_as_torch_does(instructions, dtype):
    """Subnormal, overflowing, infinite and NaN results."""
    weight = random_weight(70, 64, mix(70, (4,)), 64, "two-level")
    codes, _, sums = reference.quantize_activation(torch.randn(9, 64), "token", 64)
    scales = torch.tensor([1e-45, 1e-38, 1e-9, 1e-6, 1e-4, 1e4, 1e38, torch.inf, torch.nan])
    y, expected = run(weight, (codes, scales.unsqueeze(1), sums), dtype)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(7, 1e5, -1e5), expected.nan_to_num(7, 1e5, -1e5))


def test_no_tokens_give_an_empty_output(instructions):
    weight = random_weight(70, 128, mix(70, (4, 8)), 64)
    activation = LOWERED_QUANTIZE(torch.randn(0, 128), "token", 64, 0, KERNEL)
    assert run(weight, activation)[0].shape == (0, 70)


def test_nan_in_one_token_stays_there(instructions):
    weight = random_weight(70, 128, mix(70, (4, 8)), 64)
    packed = pack(weight, PACKING)
    x = torch.randn(4, 128)
    x[2, 5] = float("nan")
    activation = LOWERED_QUANTIZE(x, "token", 64, 0, KERNEL)
    y = LOWERED_LINEAR(*activation, packed.blob, None, str(packed.layout), torch.float32, KERNEL)
    assert y.isnan().all(1).tolist() == [False, False, True, False]
    assert y.isnan().any(1).tolist() == [False, False, True, False]


def assert_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_quantizer_equals_its_definition(instructions, threads, mode, dtype):
    for m, k, group in [
        (1, 128, 128),
        (7, 300, 64),
        (3, 1000, 32),
        (2, 31, 128),
        (40, 700, 0),
        (1, 48, 16),
    ]:
        x = torch.randn(m, k).to(dtype)
        x[0, : k // 2] = 0
        found = LOWERED_QUANTIZE(x, mode, group, 0, KERNEL)
        assert_same(found, reference.quantize_activation(x, mode, group))


@pytest.mark.parametrize("block", [2, 8, 16, 32, 128])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_quantizer_transforms_first_to_the_last_bit(instructions, dtype, block):
    x = (torch.randn(5, 3, 384) * torch.logspace(-3, 3, 384)).to(dtype)
    found = LOWERED_QUANTIZE(x, "group", 64, block, KERNEL)
    assert_same(found, expand_quantize_activation(x, "group", 64, block, KERNEL))


@pytest.mark.parametrize("mode", ["token", "group"])
def test_quantizer_rounds_half_to_even_and_knows_extremes(instructions, mode):
    x = torch.randn(6, 256)
    x[0] = 0
    x[1] = torch.arange(256) % 254 - 127 + 0.5  # halves, after the division by 1
    x[1, ::128] = 127.0
    x[2] *= 1e-40  # subnormal
    x[3] *= 1e38
    x[4] = 1e-45  # the scale of it divides to zero
    x[5] = torch.where(x[5] > 0, 65504.0, -65504.0)
    found = LOWERED_QUANTIZE(x, mode, 128, 0, KERNEL)
    assert_same(found, reference.quantize_activation(x, mode, 128))


def test_quantizer_lets_no_nan_disappear(instructions):
    x = torch.randn(3, 256)
    x[1, 200] = float("nan")
    x[2, 10] = float("inf")
    codes, scales, _ = LOWERED_QUANTIZE(x, "group", 128, 0, KERNEL)
    assert scales.isfinite().tolist() == [[True, True], [True, False], [False, True]]
    assert codes[1, 200] == 0 and codes[2, 10] == 0


def test_quantizer_reads_rows_that_lie_apart(instructions):
    x = torch.full((4, 200), float("nan"))
    x[:, :150] = torch.randn(4, 150)
    found = LOWERED_QUANTIZE(x[:, :150], "token", 64, 0, KERNEL)
    across = LOWERED_QUANTIZE(x[:, :150].t().contiguous().t(), "token", 64, 0, KERNEL)
    expected = reference.quantize_activation(x[:, :150].contiguous(), "token", 64)
    assert_same(found, expected)
    assert_same(across, expected)


def test_all_instruction_sets_give_the_same_bits():
    weight = random_weight(130, 300, mix(130, ALL_WIDTHS), 128, "two-level")
    x, found = torch.randn(9, 300), []
    for one in isa.available():
        with launch.using(one.name):
            activation = LOWERED_QUANTIZE(x, "token", 128, 0, KERNEL)
            found.append(run(weight, activation, torch.bfloat16)[0])
    assert all(torch.equal(found[0], other) for other in found)


def test_arguments_that_do_not_fit_are_refused():
    weight = random_weight(70, 128, mix(70, (4, 8)), 64)
    packed = pack(weight, PACKING)
    layout = str(packed.layout)
    fits = LOWERED_QUANTIZE(torch.randn(2, 128), "token", 64, 0, KERNEL)
    longer = LOWERED_QUANTIZE(torch.randn(2, 192), "token", 64, 0, KERNEL)
    with pytest.raises(LoweringError, match="do not fit layout"):
        LOWERED_LINEAR(*longer, packed.blob, None, layout, torch.float32, KERNEL)
    with pytest.raises(LoweringError, match="packed for another layout"):
        LOWERED_LINEAR(*fits, packed.blob[:-64], None, layout, torch.float32, KERNEL)
    with pytest.raises(LoweringError, match=r"not torch\.float64"):
        LOWERED_LINEAR(*fits, packed.blob, None, layout, torch.float64, KERNEL)
