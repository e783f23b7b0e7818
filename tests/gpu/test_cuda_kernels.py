"""The CUDA kernels on a GPU: the bits of the definition, in every regime, every time.

The oracle multiplies the stored integers in float64, where every sum is exact, and applies the
scales in the definition's order. Outputs are filled with NaN before, and the bytes around watched.
"""

from __future__ import annotations

import pytest
import torch

from mixllm_compiler.errors import LoweringError
from mixllm_compiler.formats.layout import pack, unpack
from mixllm_compiler.formats.row_format import WIDTHS
from mixllm_compiler.ir import reference
from mixllm_compiler.lowering.lowered import (
    LOWERED_LINEAR,
    LOWERED_QUANTIZE,
    expand_linear,
    expand_quantize_activation,
)
from tests.lowering.cases import mix, watched_outputs
from tests.lowering.two_level import extreme_weight, random_weight

pytestmark = pytest.mark.gpu

KERNEL = "cuda.v1"
MIXES = {
    "all 4": ((4,), None),
    "all 8": ((8,), None),
    "1 % of 8": ((4, 8), 0.01),
    "71 % of 8": ((4, 8), 0.71),
    "all widths": (WIDTHS, None),
}
HOPPER = ["staged:1,2,16,2,2", "staged:2,2,8,2,4", "prefill:128,5,4"]
PORTABLE = ["decode:1,1,8,4", "decode:1,2,16,2", "decode:2,2,8,1", "mma:32,4", "mma:64,4"]


def variants() -> list[str]:
    """Those that the dispatcher may choose on this GPU, and the portable ones."""
    from mixllm_compiler.lowering.cuda.dispatch import shipped
    from mixllm_compiler.lowering.target import Target

    if not torch.cuda.is_available():
        return PORTABLE
    target = Target.of("cuda")
    found = {str(v) for v in shipped(target)} | set(PORTABLE)
    return sorted(found | set(HOPPER if target.capability == (9, 0) else ()))


@pytest.fixture(autouse=True)
def guarded(request, monkeypatch):
    """Outputs are poisoned before, and the bytes around them watched."""
    yield from watched_outputs("cuda", request, monkeypatch)


class Linear:
    """A weight, packed on the GPU, its integers and scales there."""

    def __init__(self, weight):
        packed = pack(weight, "cuda64.v1")
        self.weight, self.blob, self.layout = weight, packed.blob.cuda(), str(packed.layout)
        self.integers = torch.empty(weight.n, weight.k, dtype=torch.float64, device="cuda")
        self.scales = torch.empty(weight.n, device="cuda")
        for bits in weight.rows:
            rows, at = weight.row_codes(bits), weight.model_rows(bits).cuda()
            self.integers[at] = rows.integers().cuda().double()
            self.scales[at] = rows.scales.cuda()

    def run(self, activation, dtype=torch.bfloat16, bias=None):
        return LOWERED_LINEAR(*activation, self.blob, bias, self.layout, dtype, KERNEL)

    def expected(self, activation, dtype, bias):
        codes, scales, _ = activation
        acc = codes[..., : self.weight.k].double() @ self.integers.T
        y = acc.to(torch.int64).float() * (self.scales * scales)
        return (y if bias is None else y + bias.float()).to(dtype)

    def check(self, activation, dtype=torch.bfloat16, bias=None):
        y = self.run(activation, dtype, bias)
        expected = self.expected(activation, dtype, bias)
        assert y.dtype == dtype
        wrong = (y != expected).nonzero()
        assert len(wrong) == 0, f"{len(wrong)} of {y.numel()} differ, the first at {wrong[0]}"
        return y


def activation(m, k, seed=None):
    """Codes, scales and sums of random tokens."""
    generator = None if seed is None else torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(m, k, device="cuda", generator=generator)
    return expand_quantize_activation(x, "token", 128, 0, KERNEL)


def trying(variant, **options):
    from mixllm_compiler.lowering.cuda import launch
    from mixllm_compiler.lowering.cuda.variants import Variant

    return launch.trying(Variant.parse(variant), **options)


@pytest.mark.parametrize("rows", MIXES)
@pytest.mark.parametrize("variant", variants())
def test_every_variant_gives_the_bits_of_the_definition(variant, rows):
    linear = Linear(random_weight(333, 700, mix(333, *MIXES[rows])))
    bias = torch.randn(333, device="cuda").bfloat16()
    regime, sizes = variant.split(":")
    top = 8 * int(sizes[0]) if regime in ("decode", "staged") else 600
    with trying(variant):
        for m in [m for m in (1, 2, 7, 8, 9, 16, 17, 33, 64, 129, 255, 257, 520) if m <= top]:
            linear.check(activation(m, 700), bias=bias)


@pytest.mark.parametrize("rows", MIXES)
def test_every_odd_number_of_tokens(rows):
    linear = Linear(random_weight(333, 700, mix(333, *MIXES[rows])))
    bias = torch.randn(333, device="cuda")
    for m in range(1, 301, 2):
        linear.check(activation(m, 700), bias=bias)


@pytest.mark.parametrize("n, k", [(1, 128), (63, 97), (64, 128), (65, 129), (1000, 1001), (70, 1)])
@pytest.mark.parametrize("m", [1, 16, 17, 32, 33, 64, 65, 128, 129, 1100])
def test_tails_of_n_and_k_at_the_borders_of_every_regime(n, k, m):
    Linear(random_weight(n, k, mix(n, (4, 8)))).check(activation(m, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [3, 40, 130, 1000])
def test_output_types_and_bias_types(dtype, bias, m):
    linear = Linear(random_weight(200, 256, mix(200, WIDTHS)))
    b = None if bias is None else torch.randn(200, device="cuda").to(bias)
    linear.check(activation(m, 256), dtype, b)


@pytest.mark.parametrize("m", [20, 300, 2000])
@pytest.mark.parametrize("n", [512, 520, 513])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_of_neighbouring_rows(n, m, dtype):
    """They are written in words of 16 bytes where N allows."""
    Linear(random_weight(n, 256, torch.arange(n) // 128 % 2 * 4 + 4)).check(
        activation(m, 256), dtype
    )


@pytest.mark.parametrize("tokens", ["128,5,4", "256,3,4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_persistent_ctas_come_to_odd_tiles_more_than_once(tokens, dtype):
    linear = Linear(random_weight(150, 200, mix(150, (4,))))  # three tiles, two pairs
    with trying(f"prefill:{tokens}"):
        linear.check(activation(90_000, 200), dtype)


@pytest.mark.parametrize("value", [127, -127, None])
@pytest.mark.parametrize("m", [1, 16, 40, 200, 700])
def test_the_largest_sums_do_not_overflow(m, value):
    n, k = 192, 65_536
    linear = Linear(extreme_weight(n, k, mix(n, WIDTHS)))
    codes = torch.randint(0, 2, (m, k), device="cuda") * 254 - 127
    if value is not None:
        codes.fill_(value)
    codes = codes.to(torch.int8)
    sums = codes.sum(-1, keepdim=True, dtype=torch.int32)
    linear.check((codes, torch.rand(m, 1, device="cuda"), sums), torch.float32)


@pytest.mark.parametrize("m", [1, 9, 40, 200, 600])
def test_sums_of_groups_do_too(m):
    """Activations that the definition quantized, because another kernel reads them as well."""
    linear = Linear(random_weight(200, 512, mix(200, WIDTHS)))
    x = torch.randn(m, 512, device="cuda")
    linear.check(reference.quantize_activation(x, "token", 128))


@pytest.mark.parametrize("m", [1, 9, 40, 200, 600])
def test_the_expansion_agrees_bit_for_bit(unguarded, m):
    linear = Linear(random_weight(700, 900, mix(700, WIDTHS)))
    bias = torch.randn(700, device="cuda")
    args = (linear.blob, bias, linear.layout, torch.bfloat16, KERNEL)
    x = activation(m, 900)
    assert torch.equal(LOWERED_LINEAR(*x, *args), expand_linear(*x, *args))


@pytest.mark.parametrize("m", [1, 8, 16, 24, 64, 100, 256, 1000])
@pytest.mark.parametrize("programmatic", [True, False])
def test_the_same_input_gives_the_same_bits_every_time(unguarded, m, programmatic):
    from mixllm_compiler.lowering.cuda import launch

    linear = Linear(random_weight(4096, 4096, mix(4096, WIDTHS)))
    x = torch.randn(m, 4096, device="cuda").bfloat16()
    with launch.trying(programmatic=programmatic):
        first = LOWERED_QUANTIZE(x, "token", 128, 128, KERNEL)
        y = linear.check(first)
        for _ in range(50):
            again = LOWERED_QUANTIZE(x, "token", 128, 128, KERNEL)
            assert torch.equal(linear.run(again), y)


def test_fresh_random_inputs():
    """Other shapes and numbers on every run of the tests."""
    seed = torch.seed()
    for _ in range(40):
        n, k, m = (int(torch.randint(1, top, ())) for top in (1500, 3000, 600))
        linear = Linear(random_weight(n, k, mix(n, WIDTHS), seed=seed))
        try:
            linear.check(activation(m, k))
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: N={n} K={k} M={m}") from error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("hadamard", [0, 32, 64, 128, 256, 16, 512])
@pytest.mark.parametrize("m, k", [(1, 512), (7, 4096), (300, 1536), (2, 14336), (65, 14336)])
def test_quantizer_equals_its_definition(dtype, hadamard, m, k):
    x = torch.randn(m, k, device="cuda").to(dtype)
    x[0, : k // 2] = 0
    found = LOWERED_QUANTIZE(x, "token", 128, hadamard, KERNEL)
    expected = expand_quantize_activation(x.cpu(), "token", 128, hadamard, KERNEL)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("k", [1, 31, 97, 300, 1001])
def test_quantizer_of_odd_lengths_and_rows_that_lie_apart(k):
    x = torch.full((9, 2 * k), float("nan"), device="cuda").bfloat16()
    x[:, k:] = torch.randn(9, k, device="cuda").bfloat16()
    for view in (x[:, k:], x[:, k:].t().contiguous().t()):
        found = LOWERED_QUANTIZE(view, "token", 128, 0, KERNEL)
        expected = expand_quantize_activation(view.cpu(), "token", 128, 0, KERNEL)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one.cpu(), other)


def test_quantizer_rounds_half_to_even_and_knows_extremes():
    x = torch.randn(6, 256)
    x[0] = 0
    x[1] = torch.arange(256) % 254 - 127 + 0.5  # halves, after the division by 1
    x[1, ::128] = 127.0
    x[2] *= 1e-40  # subnormal
    x[3] *= 1e38
    x[4] = 1e-45  # the scale of it divides to zero
    x[5] = torch.where(x[5] > 0, 65504.0, -65504.0)
    found = LOWERED_QUANTIZE(x.cuda(), "token", 128, 0, KERNEL)
    for one, other in zip(
        found, expand_quantize_activation(x, "token", 128, 0, KERNEL), strict=True
    ):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("m", [12, 40, 600])
def test_nan_in_one_token_stays_there(m):
    linear = Linear(random_weight(70, 128, mix(70, WIDTHS)))
    x = torch.randn(m, 128, device="cuda")
    x[2, 5] = float("nan")
    y = linear.run(LOWERED_QUANTIZE(x, "token", 128, 0, KERNEL))
    assert y.isnan().all(1).nonzero().flatten().tolist() == [2]
    assert y.isnan().any(1).nonzero().flatten().tolist() == [2]


def test_packing_on_the_gpu_gives_the_same_bytes(unguarded):
    packed = pack(random_weight(333, 700, mix(333, WIDTHS)), "cuda64.v1")
    there = type(packed)(packed.blob.cuda(), packed.layout)
    assert torch.equal(pack(unpack(there), "cuda64.v1").blob.cpu(), packed.blob)


@pytest.mark.parametrize("m", [1, 30, 200, 600])
def test_cuda_graphs_replay_with_new_inputs(unguarded, m):
    linear = Linear(random_weight(333, 768, mix(333, WIDTHS)))
    x = torch.randn(m, 768, device="cuda").bfloat16()

    def layer():
        return linear.run(LOWERED_QUANTIZE(x, "token", 128, 128, KERNEL))

    layer()  # compiles outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer()
    for _ in range(5):
        x.normal_()
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, layer())


@pytest.mark.parametrize("m", [1, 40, 300])
def test_chains_with_foreign_kernels_between(unguarded, m):
    """Kernels start before their predecessor has ended; whatever is between, results wait."""
    a = Linear(random_weight(512, 512, mix(512, WIDTHS)))
    x = torch.randn(m, 512, device="cuda").bfloat16()

    def layers(x):
        for _ in range(8):
            y = a.run(LOWERED_QUANTIZE(x, "token", 128, 128, KERNEL))
            x = torch.nn.functional.layer_norm(y.float(), (512,)).bfloat16()
        return x

    from mixllm_compiler.lowering.cuda import launch

    with launch.trying(programmatic=False):
        expected = layers(x)
    for _ in range(20):
        assert torch.equal(layers(x), expected)


def test_another_stream_is_respected(unguarded):
    linear = Linear(random_weight(333, 700, mix(333, WIDTHS)))
    x = torch.randn(5, 700, device="cuda")
    expected = linear.run(LOWERED_QUANTIZE(x, "token", 128, 0, KERNEL))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = linear.run(LOWERED_QUANTIZE(x, "token", 128, 0, KERNEL))
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(found, expected)


def test_too_much_shared_memory_is_refused():
    linear = Linear(random_weight(64, 128, mix(64, (4,))))
    with trying("prefill:256,5,4"), pytest.raises(LoweringError, match="bytes of shared memory"):
        linear.run(activation(300, 128))


def test_a_launch_that_fails_is_an_error():
    from mixllm_compiler.lowering.cuda import launch

    linear = Linear(random_weight(64, 128, mix(64, (4,))))
    x = activation(1, 128)
    linear.run(x)
    made = launch._linear(pack(linear.weight, "cuda64.v1").layout, torch.bfloat16, x[0].device)
    loaded, _ = made.kernel(1, made.variant(1))
    with pytest.raises(LoweringError, match="could not launch"):
        loaded.launch(1, 2048, 0, 0, [made.template, launch._Activations(), launch._Output()])


def test_the_ops_are_well_behaved(unguarded):
    linear = Linear(random_weight(70, 130, mix(70, (4, 8))))
    x = torch.randn(2, 3, 130, device="cuda")
    torch.library.opcheck(LOWERED_QUANTIZE, (x, "token", 128, 0, KERNEL))
    bias = torch.randn(70, device="cuda")
    args = (*expand_quantize_activation(x, "token", 128, 0, KERNEL), linear.blob, bias)
    torch.library.opcheck(LOWERED_LINEAR, (*args, linear.layout, torch.float32, KERNEL))
