"""The quantizers' generated CUDA source, compiled as C++ and run a thread at a time.

It shows that indices, exchanges between lanes, tails and roundings are right. What only a GPU shows
(its own exponential, overlap, speed) is left to `tests/gpu`.
"""

from __future__ import annotations

import ctypes
import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from mixllm_compiler.lowering import fused, lowered
from mixllm_compiler.lowering.agreement import disagreement
from mixllm_compiler.lowering.cuda import launch, quantizers

KERNEL = "cuda.v1"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
KERNELS = quantizers.CudaKernels()

PTX = {  # the two instructions that the sources name themselves
    r'asm\("max\.NaN\.f32 %0, %0, %1;" : "\+f"\((\w+)\) : "f"\((.*?)\)\);': (
        r"\1 = larger_or_nan(\1, \2);"
    ),
    r'asm\("rcp\.approx\.ftz\.f32 %0, %1;" : "=f"\((\w+)\) : "f"\((.*?)\)\);': r"\1 = 1.f / \2;",
}
RUN = """
extern "C" void run(const Inputs* in, const Codes* out, int grid, int threads) {
    run_grid([=] { quantize_rows(*in, *out); }, grid, threads);
}
"""


def compiler_of_half() -> bool:
    """Whether there is a C++ compiler that knows fp16."""
    if shutil.which("g++") is None:
        return False
    program = "_Float16 half(float x) { return (_Float16)x; }"
    command = ["g++", "-std=c++17", "-fsyntax-only", "-x", "c++", "-"]
    return subprocess.run(command, input=program, text=True, capture_output=True).returncode == 0


pytestmark = pytest.mark.skipif(not compiler_of_half(), reason="needs a g++ that knows fp16")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp()

    @functools.cache
    def build(spec):
        text = quantizers.generate(spec)
        text = text[text.index("constexpr float HADAMARD_SCALE") :]  # without the header in PTX
        for pattern, plain in PTX.items():
            text = re.sub(pattern, plain, text)
        assert "asm" not in text
        name = re.sub(r"\W+", "-", str(spec))
        source, product = folder / f"{name}.cpp", folder / f"{name}.so"
        if not product.exists():
            source.write_text('#include "cta.h"\n' + text + RUN)
            options = ["-std=c++17", "-O1", "-w", "-ffp-contract=off", "-fPIC", "-shared"]
            options += ["-I", str(Path(__file__).parent), "-o", str(product), str(source)]
            subprocess.run(["g++", *options], check=True)
        return ctypes.CDLL(str(product))

    def start(library, where, device, inputs, out):
        library.run(ctypes.byref(inputs), ctypes.byref(out), where.grid, where.block)

    def poisoned(shape, dtype, device):
        return torch.full(shape, float("nan") if dtype.is_floating_point else 77, dtype=dtype)

    monkeypatch.setattr(quantizers, "_kernel", lambda spec, device: build(spec))
    monkeypatch.setattr(launch, "start", start)
    monkeypatch.setattr(launch, "allocate", poisoned)


def randn(*shape, dtype=BF16):
    return torch.randn(*shape).to(dtype)


def same(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    "dtype, k, hadamard, m",
    [
        (BF16, 4096, 128, 1),
        (BF16, 1024, 256, 7),
        (BF16, 10240, 128, 20),  # 32 elements a thread: four of its runs in a block
        (BF16, 28672, 128, 1),
        (FP32, 512, 32, 3),
        (FP16, 512, 16, 3),
        (BF16, 10240, 16, 20),  # and here two
        (BF16, 256, 8, 2),
        (BF16, 256, 2, 2),
        (BF16, 97, 0, 3),
        (FP32, 1001, 0, 2),
    ],
)
def test_plain(dtype, k, hadamard, m):
    x = randn(m, k, dtype=dtype)
    x[0, : k // 2] = 0
    found = KERNELS.quantize_activation(x, "token", 128, hadamard)
    assert same(found, lowered.expand_quantize_activation(x, "token", 128, hadamard, KERNEL))


def test_halves_and_extremes():
    x = torch.randn(6, 256)
    x[0] = 0
    x[1] = torch.arange(256) % 254 - 127 + 0.5  # halves, after the division by 1
    x[1, ::128] = 127.0
    x[2] *= 1e-40  # subnormal
    x[3] *= 1e38
    x[4] = 1e-45  # the scale of it divides to zero
    x[5, 9] = float("nan")
    found = KERNELS.quantize_activation(x, "token", 128, 0)
    expected = lowered.expand_quantize_activation(x, "token", 128, 0, KERNEL)
    assert same((t[:5] for t in found), (t[:5] for t in expected))
    assert found[1][5].isnan() and (found[0][5] == 0).all()


@pytest.mark.parametrize("norm", fused.NORMS)
@pytest.mark.parametrize("dtype, k, hadamard", [(BF16, 1024, 128), (FP32, 512, 32), (FP16, 97, 0)])
def test_norms(norm, dtype, k, hadamard):
    x, residual, weight = (
        randn(20, k, dtype=dtype),
        randn(20, k, dtype=dtype),
        randn(k, dtype=dtype),
    )
    bias = randn(k, dtype=dtype) if norm == "layer_norm" else None
    args = (weight, bias, 1e-5, norm, "token", 128, hadamard)
    found, expected = KERNELS.norm_quantize(x, *args), fused.expand_norm_quantize(x, *args, KERNEL)
    assert disagreement(found, expected) == ""
    found = KERNELS.add_norm_quantize(x, residual, *args)
    expected = fused.expand_add_norm_quantize(x, residual, *args, KERNEL)
    assert disagreement(found[:3], expected[:3]) == ""
    assert torch.equal(found[3], expected[3])


@pytest.mark.parametrize(
    "k, weight, norm",
    [
        (20480, BF16, "rms"),  # too long to have the weight beside it
        (1024, FP32, "rms_plus_one"),
        (1024, None, "layer_norm"),
    ],
)
def test_parameters_of_norms(k, weight, norm):
    x, w = randn(2, k), None if weight is None else randn(k, dtype=weight)
    args = (w, None, 1e-5, norm, "token", 128, 128)
    expected = fused.expand_norm_quantize(x, *args, KERNEL)
    assert disagreement(KERNELS.norm_quantize(x, *args), expected) == ""


def test_a_tokens_bits_do_not_depend_on_the_others():
    x = randn(66, 1024)
    args = (randn(1024), None, 1e-5, "rms", "token", 128, 128)
    together = KERNELS.norm_quantize(x, *args)
    assert same(KERNELS.norm_quantize(x[5:6], *args), (t[5:6] for t in together))


@pytest.mark.parametrize("activation", fused.ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype, k, hadamard", [(BF16, 1536, 128), (FP16, 300, 0)])
def test_activations(activation, gated, dtype, k, hadamard):
    """x and its gate are halves of one tensor, so rows lie apart."""
    x, factor = (4 * randn(3, 2 * k, dtype=dtype)).chunk(2, -1)
    args = (factor if gated else None, activation, "token", 128, hadamard)
    found = KERNELS.activation_quantize(x, *args)
    expected = fused.expand_activation_quantize(x, *args, KERNEL)
    assert disagreement(found, expected) == ""


def test_silu_of_everything():
    x = torch.linspace(-120, 120, 4096).reshape(4, 1024).bfloat16()
    args = (None, "silu", "token", 128, 0)
    expected = fused.expand_activation_quantize(x, *args, KERNEL)
    assert disagreement(KERNELS.activation_quantize(x, *args), expected) == ""
