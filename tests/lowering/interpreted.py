"""The generated kernels in Triton's interpreter. `test_interpreter.py` runs this file.

Triton decides when it is imported whether it interprets or compiles, so these tests have a process
of their own, with TRITON_INTERPRET=1. The file's name keeps them out of ordinary runs.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from mixllm_compiler.formats.layout import pack
from mixllm_compiler.ir import reference
from mixllm_compiler.lowering.lowered import (
    LOWERED_LINEAR,
    LOWERED_QUANTIZE,
    expand_linear,
    expand_quantize_activation,
)
from mixllm_compiler.lowering.spec import Bucket
from mixllm_compiler.lowering.target import Target
from mixllm_compiler.lowering.triton import launch
from mixllm_compiler.lowering.triton.schedule import schedule
from tests.lowering.cases import (
    ALL_WIDTHS,
    assert_close,
    mix,
    oracle,
    random_weight,
    unit_weight,
    watched_outputs,
)

KERNEL = "triton.v1"


@triton.jit
def _count(out, n):
    total = 0
    for _ in tl.range(0, n):
        total += 1
    tl.store(out, total)


try:
    _count[(1,)](torch.zeros(1, dtype=torch.int32), 2)
except Exception as error:  # noqa: BLE001  the interpreter wraps whatever happened
    why = f"this Triton's interpreter cannot run a loop to a bound that is an argument: {error}"
    pytest.skip(why, allow_module_level=True)


@pytest.fixture(autouse=True)
def guarded(request, monkeypatch):
    """Outputs are poisoned before, and the bytes around them watched."""
    yield from watched_outputs("triton", request, monkeypatch)


@pytest.fixture(autouse=True)
def gpu_schedule():
    """The schedule that GPUs get, unless a test tries another."""
    with launch.trying(schedule(Target("cuda"))):
        yield


@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("m, k, group", [(1, 128, 128), (7, 300, 64), (3, 1000, 32), (2, 31, 128)])
def test_quantizer_equals_its_definition(mode, dtype, m, k, group):
    x = torch.randn(m, k).to(dtype)
    x[0, : k // 2] = 0
    for one, other in zip(
        LOWERED_QUANTIZE(x, mode, group, 0, KERNEL),
        reference.quantize_activation(x, mode, group),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["token", "group"])
def test_quantizer_rounds_half_to_even_and_knows_extremes(mode):
    x = torch.randn(6, 256)
    x[0] = 0
    x[1] = torch.arange(256) % 254 - 127 + 0.5  # halves, after the division by 1
    x[1, ::128] = 127.0
    x[2] *= 1e-40  # subnormal
    x[3] *= 1e38
    x[4] = 1e-45  # the scale of it divides to zero
    x[5] = torch.where(x[5] > 0, 65504.0, -65504.0)
    for one, other in zip(
        LOWERED_QUANTIZE(x, mode, 128, 0, KERNEL),
        reference.quantize_activation(x, mode, 128),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_quantizer_lets_no_nan_disappear():
    x = torch.randn(3, 256)
    x[1, 200] = float("nan")
    x[2, 10] = float("inf")
    _, scales, _ = LOWERED_QUANTIZE(x, "group", 128, 0, KERNEL)
    assert scales.isfinite().tolist() == [[True, True], [True, False], [False, True]]


def test_quantizer_reads_rows_that_lie_apart():
    x = torch.full((4, 200), float("nan"))
    x[:, :150] = torch.randn(4, 150)
    found = LOWERED_QUANTIZE(x[:, :150], "token", 64, 0, KERNEL)
    across = LOWERED_QUANTIZE(x[:, :150].t().contiguous().t(), "token", 64, 0, KERNEL)
    expected = reference.quantize_activation(x[:, :150].contiguous(), "token", 64)
    for one, two, three in zip(found, across, expected, strict=True):
        assert torch.equal(one, three) and torch.equal(two, three)


def test_quantizer_transforms_first():
    x = torch.randn(2, 3, 128)
    for one, other in zip(
        LOWERED_QUANTIZE(x, "token", 64, 32, KERNEL),
        expand_quantize_activation(x, "token", 64, 32, KERNEL),
        strict=True,
    ):
        assert torch.equal(one, other)


def run_linear(weight, activation, dtype=torch.float32, bias=None):
    packed = pack(weight, "tiles64.v1")
    args = (packed.blob, bias, str(packed.layout), dtype, KERNEL)
    return LOWERED_LINEAR(*activation, *args), expand_linear(*activation, *args)


MIXES = {
    "all 4": ((4,), None),
    "all 8": ((8,), None),
    "1 % of 8": ((4, 8), 0.01),
    "71 % of 8": ((4, 8), 0.71),
    "every width": (ALL_WIDTHS, None),
}


@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("rows", MIXES)
@pytest.mark.parametrize(
    "m, n, k, group", [(1, 130, 384, 128), (21, 65, 300, 64), (41, 63, 97, 32)]
)
def test_linear_matches_the_oracle(mode, rows, m, n, k, group):
    weight = random_weight(n, k, mix(n, *MIXES[rows]), group)
    activation = reference.quantize_activation(torch.randn(m, k), mode, group)
    bias = torch.randn(n)
    y, expansion = run_linear(weight, activation, bias=bias)
    expected, magnitude = oracle(activation[0], activation[1], weight, bias)
    assert_close(y, expected, magnitude)
    assert_close(expansion, expected, magnitude)


@pytest.mark.parametrize("m", range(1, 71, 9))
def test_any_number_of_tokens(m):
    weight = random_weight(70, 150, mix(70, (4, 8)), 64)
    activation = reference.quantize_activation(torch.randn(m, 150), "token", 64)
    y, _ = run_linear(weight, activation)
    assert_close(y, *oracle(activation[0], activation[1], weight))


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("rows", MIXES)
def test_integers_are_exact(rows, extreme):
    m, n, k, group = 19, 71, 300, 128
    weight = unit_weight(n, k, mix(n, *MIXES[rows]), group, extreme)
    codes = torch.randint(-127, 128, (m, 384), dtype=torch.int8)
    if extreme:
        codes = torch.where(codes > 0, 127, -127).to(torch.int8)
    codes[:, k:] = 0
    sums = codes.view(m, 3, group).sum(-1, dtype=torch.int32)
    y, _ = run_linear(weight, (codes, torch.ones(m, 1), sums))
    exact = codes[:, :k].long() @ weight.dequantize().long().T
    assert exact.abs().max() < 2**24
    assert torch.equal(y.long(), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
def test_output_types_and_bias_types(dtype, bias):
    weight = random_weight(70, 130, mix(70, (4, 8)), 64)
    activation = reference.quantize_activation(torch.randn(2, 3, 130), "token", 64)
    b = None if bias is None else torch.randn(70).to(bias)
    y, _ = run_linear(weight, activation, dtype, b)
    assert y.dtype == dtype and y.shape == (2, 3, 70)
    codes, scales = activation[0].flatten(0, 1), activation[1].flatten(0, 1)
    # The interpreter cuts float32 off to bfloat16 where GPUs round.
    ulps = 1.0 if dtype == torch.bfloat16 else 0.5
    assert_close(y.flatten(0, 1), *oracle(codes, scales, weight, b), ulps)


def test_nan_in_one_token_stays_there():
    weight = random_weight(70, 128, mix(70, (4, 8)), 64)
    x = torch.randn(4, 128)
    x[2, 5] = float("nan")
    y = LOWERED_LINEAR(
        *LOWERED_QUANTIZE(x, "token", 64, 0, KERNEL),
        *((p := pack(weight, "tiles64.v1")).blob, None, str(p.layout), torch.float32, KERNEL),
    )
    assert y.isnan().all(1).tolist() == [False, False, True, False]
    assert y.isnan().any(1).tolist() == [False, False, True, False]


def test_no_tokens_give_an_empty_output():
    weight = random_weight(70, 128, mix(70, (4, 8)), 64)
    activation = LOWERED_QUANTIZE(torch.randn(0, 128), "token", 64, 0, KERNEL)
    y, _ = run_linear(weight, activation)
    assert y.shape == (0, 70)


@pytest.mark.parametrize("split, rows", [(1, 16), (2, 64), (4, 32), (8, 16), (16, 16)])
def test_every_split_of_k_and_of_tiles_gives_the_same_numbers(split, rows):
    weight = random_weight(70, 300, mix(70, (4, 8)), 64)  # 5 groups: not a multiple of any split
    activation = reference.quantize_activation(torch.randn(20, 300), "group", 64)
    with launch.trying((Bucket(16, rows=rows, split=split, warps=1, stages=1),)):
        y, _ = run_linear(weight, activation)
    assert_close(y, *oracle(activation[0], activation[1], weight))


def test_the_interpreters_own_schedule():
    weight = random_weight(70, 300, mix(70, (4, 8)), 64)
    for m in (1, 16, 40):
        activation = reference.quantize_activation(torch.randn(m, 300), "token", 64)
        with launch.trying(schedule(Target("cpu"))):
            y, _ = run_linear(weight, activation)
        assert_close(y, *oracle(activation[0], activation[1], weight))


def test_bands_cover_every_token_block_once():
    weight = random_weight(130, 64, mix(130, (4, 8)), 64)
    activation = reference.quantize_activation(torch.randn(310, 64), "token", 64)  # 20 blocks
    with launch.trying((Bucket(16, rows=64, split=1, warps=1, stages=1),)):
        y, _ = run_linear(weight, activation)
    assert_close(y, *oracle(activation[0], activation[1], weight))


OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def test_the_ops_are_well_behaved(unguarded):
    weight = random_weight(70, 130, mix(70, (4, 8)), 64)
    packed = pack(weight, "tiles64.v1")
    activation = reference.quantize_activation(torch.randn(2, 3, 130), "group", 64)
    quantize = (torch.randn(2, 3, 130), "group", 64, 0, KERNEL)
    linear = (*activation, packed.blob, torch.randn(70), str(packed.layout), torch.float32, KERNEL)
    torch.library.opcheck(LOWERED_QUANTIZE, quantize, test_utils=OPCHECKS)
    torch.library.opcheck(LOWERED_LINEAR, linear, test_utils=OPCHECKS)
