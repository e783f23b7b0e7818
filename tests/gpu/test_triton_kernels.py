"""The generated kernels on a GPU: integers equal, floats within 1e-6, always the same bits.

References are computed from the quantizers' results in float64. Activations are quantized on the
CPU for comparison: on a GPU, torch divides by a number as it multiplies with its reciprocal.
"""

from __future__ import annotations

import pytest
import torch

from mixllm_compiler.formats.layout import pack, unpack
from mixllm_compiler.ir import reference
from mixllm_compiler.lowering.lowered import LOWERED_LINEAR, LOWERED_QUANTIZE, expand_linear
from tests.lowering.cases import (
    ALL_WIDTHS,
    assert_close,
    mix,
    oracle,
    random_weight,
    unit_weight,
    watched_outputs,
)

pytestmark = pytest.mark.gpu

KERNEL = "triton.v1"
MIXES = {
    "all 4": ((4,), None),
    "all 8": ((8,), None),
    "1 % of 8": ((4, 8), 0.01),
    "71 % of 8": ((4, 8), 0.71),
}


@pytest.fixture(autouse=True)
def guarded(request, monkeypatch):
    """Outputs are poisoned before, and the bytes around them watched."""
    yield from watched_outputs("triton", request, monkeypatch)


class Linear:
    """A weight, packed on the GPU, and its oracle there."""

    def __init__(self, weight):
        self.weight = weight
        packed = pack(weight, "tiles64.v1")
        self.blob, self.layout = packed.blob.cuda(), str(packed.layout)

    def run(self, activation, dtype=torch.float32, bias=None):
        return LOWERED_LINEAR(*activation, self.blob, bias, self.layout, dtype, KERNEL)

    def check(self, activation, dtype=torch.float32, bias=None):
        codes, scales, _ = activation
        y = self.run(activation, dtype, bias)
        assert_close(y, *oracle(codes, scales, self.weight, bias))
        return y


def quantize(x, mode, group):
    """The definition, computed on the CPU, for a tensor on the GPU."""
    return tuple(t.cuda() for t in reference.quantize_activation(x.cpu(), mode, group))


def assert_all_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "m, k, group",
    [(1, 128, 128), (7, 300, 64), (33, 1000, 32), (300, 4096, 128), (5, 14336, 128), (2, 31, 64)],
)
def test_quantizer_equals_its_definition(mode, dtype, m, k, group):
    x = torch.randn(m, k, device="cuda").to(dtype)
    x[0, : k // 2] = 0
    assert_all_equal(LOWERED_QUANTIZE(x, mode, group, 0, KERNEL), quantize(x, mode, group))


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
    x = x.cuda()
    assert_all_equal(LOWERED_QUANTIZE(x, mode, 128, 0, KERNEL), quantize(x, mode, 128))


def test_quantizer_lets_no_nan_disappear():
    x = torch.randn(3, 256, device="cuda")
    x[1, 200] = float("nan")
    x[2, 10] = float("inf")
    _, scales, _ = LOWERED_QUANTIZE(x, "group", 128, 0, KERNEL)
    assert scales.isfinite().tolist() == [[True, True], [True, False], [False, True]]


def test_quantizer_reads_rows_that_lie_apart():
    x = torch.full((9, 500), float("nan"), device="cuda")
    x[:, :333] = torch.randn(9, 333, device="cuda")
    for view in (x[:, :333], x[:, :333].t().contiguous().t()):
        assert_all_equal(
            LOWERED_QUANTIZE(view, "token", 64, 0, KERNEL), quantize(view, "token", 64)
        )


@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("rows", MIXES)
def test_linear_matches_the_oracle_for_every_odd_number_of_tokens(mode, rows):
    linear = Linear(random_weight(333, 700, mix(333, *MIXES[rows]), 128))
    bias = torch.randn(333, device="cuda")
    for m in range(1, 301, 2):
        linear.check(quantize(torch.randn(m, 700), mode, 128), bias=bias)


@pytest.mark.parametrize("n, k", [(1, 128), (63, 97), (64, 128), (65, 129), (1000, 1001)])
@pytest.mark.parametrize("m", [1, 16, 17, 32, 33, 64, 65, 128, 129, 1100])
def test_tails_of_n_and_k_at_the_borders_of_every_bucket(n, k, m):
    linear = Linear(random_weight(n, k, mix(n, (4, 8)), 64))
    linear.check(quantize(torch.randn(m, k), "token", 64))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("m", [1, 20, 50, 200])
def test_every_width_in_one_matrix(group, m):
    linear = Linear(random_weight(700, 900, mix(700, ALL_WIDTHS), group))
    linear.check(quantize(torch.randn(m, 900), "group", group))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [3, 130])
def test_output_types_and_bias_types(dtype, bias, m):
    linear = Linear(random_weight(200, 256, mix(200, (4, 8)), 128))
    b = None if bias is None else torch.randn(200, device="cuda").to(bias)
    y = linear.check(quantize(torch.randn(m, 256), "token", 128), dtype, b)
    assert y.dtype == dtype


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("rows", MIXES)
@pytest.mark.parametrize("m", [1, 19, 64, 200])
def test_integers_are_exact(rows, extreme, m):
    n, k, group = 130, 1000, 128  # 1000 · 127 · 127 < 2²⁴
    linear = Linear(unit_weight(n, k, mix(n, *MIXES[rows]), group, extreme))
    codes = torch.randint(-127, 128, (m, 1024), dtype=torch.int8)
    if extreme:
        codes = torch.where(codes > 0, 127, -127).to(torch.int8)
    codes[:, :group] = 0  # a group of zeros
    codes[:, k:] = 0
    sums = codes.view(m, 8, group).sum(-1, dtype=torch.int32)
    y = linear.run((codes.cuda(), torch.ones(m, 1, device="cuda"), sums.cuda()))
    exact = codes[:, :k].long() @ linear.weight.dequantize().long().T
    assert torch.equal(y.long().cpu(), exact)


@pytest.mark.parametrize("value", [127, -127])
def test_the_largest_sums_do_not_overflow(value):
    """All codes at ±127 over a long K: float32 holds the sum of groups only approximately."""
    n, k, m = 128, 14336, 40
    linear = Linear(unit_weight(n, k, mix(n, (4, 8)), 128, extreme=True))
    codes = torch.full((m, k), value, dtype=torch.int8, device="cuda")
    sums = codes.view(m, -1, 128).sum(-1, dtype=torch.int32)
    linear.check((codes, torch.ones(m, 1, device="cuda"), sums))


def test_zero_activations_give_the_bias():
    linear = Linear(random_weight(200, 512, mix(200, (4, 8)), 128))
    bias = torch.randn(200, device="cuda")
    y = linear.run(
        LOWERED_QUANTIZE(torch.zeros(5, 512, device="cuda"), "token", 128, 0, KERNEL), bias=bias
    )
    assert torch.equal(y, bias.expand(5, 200))


def test_nan_in_one_token_stays_there():
    linear = Linear(random_weight(70, 128, mix(70, (4, 8)), 64))
    x = torch.randn(40, 128, device="cuda")
    x[2, 5] = float("nan")
    y = linear.run(LOWERED_QUANTIZE(x, "token", 64, 0, KERNEL))
    assert y.isnan().all(1).nonzero().flatten().tolist() == [2]
    assert y.isnan().any(1).nonzero().flatten().tolist() == [2]


@pytest.mark.parametrize("m", [1, 24, 64, 500])
def test_the_same_input_gives_the_same_bits_every_time(unguarded, m):
    linear = Linear(random_weight(4096, 4096, mix(4096, (4, 8), share=0.1), 128))
    x = torch.randn(m, 4096, device="cuda")
    first = LOWERED_QUANTIZE(x, "token", 128, 0, KERNEL)
    y = linear.run(first)
    for _ in range(30):
        again = LOWERED_QUANTIZE(x, "token", 128, 0, KERNEL)
        assert_all_equal(again, first)
        assert torch.equal(linear.run(again), y)


def test_fresh_random_inputs():
    """Other shapes and numbers on every run of the tests."""
    seed = torch.seed()
    for _ in range(30):
        n, k, m = (int(torch.randint(1, top, ())) for top in (600, 1500, 300))
        group, mode = 32 << int(torch.randint(3, ())), ("token", "group")[int(torch.randint(2, ()))]
        linear = Linear(random_weight(n, k, mix(n, (4, 8)), min(group, 128)))
        try:
            linear.check(quantize(torch.randn(m, k), mode, group))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: N={n} K={k} M={m} g{group} {mode}") from error


def test_a_real_shape_agrees_with_the_expansion(unguarded):
    linear = Linear(random_weight(4096, 4096, mix(4096, (4, 8), share=0.1), 128))
    for m in (1, 100):
        activation = quantize(torch.randn(m, 4096), "token", 128)
        y = linear.check(activation)
        args = (linear.blob, None, linear.layout, torch.float32, KERNEL)
        assert_close(
            y, expand_linear(*activation, *args).double(), oracle(*activation[:2], linear.weight)[1]
        )


def test_packing_on_the_gpu_gives_the_same_bytes(unguarded):
    weight = random_weight(333, 700, mix(333, ALL_WIDTHS), 128)
    packed = pack(weight, "tiles64.v1")
    there = type(packed)(packed.blob.cuda(), packed.layout)
    assert torch.equal(pack(unpack(there), "tiles64.v1").blob.cpu(), packed.blob)


def test_cuda_graphs_replay_with_new_inputs(unguarded):
    linear = Linear(random_weight(333, 700, mix(333, (4, 8)), 128))
    x = torch.randn(5, 700, device="cuda")

    def layer():
        return linear.run(LOWERED_QUANTIZE(x, "token", 128, 0, KERNEL))

    layer()  # compiles outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    for _ in range(3):
        x.normal_()
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, layer())


def test_another_stream_is_respected(unguarded):
    linear = Linear(random_weight(333, 700, mix(333, (4, 8)), 128))
    x = torch.randn(5, 700, device="cuda")
    expected = linear.run(LOWERED_QUANTIZE(x, "token", 128, 0, KERNEL))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = linear.run(LOWERED_QUANTIZE(x, "token", 128, 0, KERNEL))
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)


def test_the_ops_are_well_behaved(unguarded):
    linear = Linear(random_weight(70, 130, mix(70, (4, 8)), 64))
    activation = quantize(torch.randn(2, 3, 130), "group", 64)
    bias = torch.randn(70, device="cuda")
    x = torch.randn(2, 3, 130, device="cuda")
    torch.library.opcheck(LOWERED_QUANTIZE, (x, "group", 64, 0, KERNEL))
    args = (*activation, linear.blob, bias, linear.layout, torch.float32, KERNEL)
    torch.library.opcheck(LOWERED_LINEAR, args)
