"""Generated CUDA sources: the same spec gives the same text, and nvcc makes clean code of it."""

from __future__ import annotations

import re
import shutil

import pytest
import torch

from mixllm_compiler.errors import LoweringError, OptionError
from mixllm_compiler.formats.row_format import WIDTHS
from mixllm_compiler.lowering.cuda import compiling, quantizers
from mixllm_compiler.lowering.cuda.generate import LinearSpec, generate
from mixllm_compiler.lowering.cuda.quantizers import QuantizeSpec
from mixllm_compiler.lowering.cuda.variants import Variant

BF16 = torch.bfloat16


def linear(variant: str, widths=WIDTHS, out=BF16) -> LinearSpec:
    return LinearSpec(tuple(widths), out, Variant.parse(variant))


@pytest.mark.parametrize("text", ["decode:1,2,16,2", "mma:64,4", "prefill:256,3,4"])
def test_variants_have_a_text(text):
    assert str(Variant.parse(text)) == text


@pytest.mark.parametrize("text", ["decode:1,2", "decode", "fast:1", "middle:64,4,1,0,2,2,1 "])
def test_other_texts_are_refused(text):
    with pytest.raises(OptionError, match="no variant of the CUDA kernels"):
        Variant.parse(text)


def test_a_kernel_has_code_for_its_own_widths_only():
    source = generate(linear("decode:1,1,8,4", (3, 8)))
    assert re.findall(r"struct Code<(\d)>", source) == ["3", "8"]
    assert source == generate(linear("decode:1,1,8,4", (3, 8)))
    assert "#include" not in source


def test_types_without_kernels_are_refused():
    with pytest.raises(LoweringError, match=r"bf16, fp16 and fp32, not torch\.float64"):
        generate(linear("mma:64,4", out=torch.float64))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    "spec, architecture",
    [
        (linear("decode:1,2,16,2"), "sm_80"),
        (linear("staged:2,2,8,2,4", out=torch.float16), "sm_90a"),
        (linear("mma:64,4", out=torch.float32), "sm_80"),
        (linear("middle:64,6,2,0,2,1,2"), "sm_90a"),
        (linear("middle:128,6,1,1,1,2,1", out=torch.float32), "sm_90a"),
        (linear("prefill:256,3,4"), "sm_90a"),
    ],
    ids=str,
)
def test_nvcc_makes_clean_code(spec, architecture, tmp_path):
    """No serialized matrix instructions (an error of `compile_with_nvcc`), no spills."""
    file = tmp_path / "kernel.cu"
    file.write_text(generate(spec))
    code, report = compiling.compile_with_nvcc(file, architecture)
    assert len(code) > 1000
    assert re.findall(r"(\d+) bytes spill stores", report) == ["0"]


def quantizer(source, dtype=BF16, other=False, parameters=(), shape=(2, 1, 256), hadamard=128):
    return QuantizeSpec(dtype, source, other, parameters, *shape, hadamard, True)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(
    "spec, architecture",
    [
        (quantizer("plain", hadamard=256), "sm_80"),
        (quantizer("plain", shape=(4, 1, 1024)), "sm_90a"),
        (quantizer("rms", other=True, parameters=(BF16,)), "sm_90a"),
        (
            quantizer("layer_norm", torch.float32, True, (torch.float32,) * 2, (4, 1, 1024)),
            "sm_90a",
        ),
        (quantizer("silu", other=True, shape=(4, 1, 512)), "sm_90a"),
        (quantizer("silu", torch.float32, True, shape=(4, 1, 1024)), "sm_90a"),
        (quantizer("gelu_new", torch.float16, shape=(2, 1, 1024)), "sm_80"),
    ],
    ids=str,
)
def test_quantizers_stay_in_registers(spec, architecture, tmp_path):
    """Up to K = 32,768, of which a thread holds 32 values."""
    file = tmp_path / "kernel.cu"
    file.write_text(quantizers.generate(spec))
    _, report = compiling.compile_with_nvcc(file, architecture)
    assert re.findall(r"(\d+) bytes spill stores", report) == ["0"]


def test_a_quantizers_source_names_its_spec():
    spec = quantizer("rms", other=True, parameters=(BF16,))
    source = quantizers.generate(spec)
    assert str(spec) in source and "#include" not in source
    assert source == quantizers.generate(spec)
    assert "Norm<0, true, 0, true, 0, -1>" in source


@pytest.mark.parametrize("length", [128, 384, 4096, 5120, 14336, 16384, 28672, 32768, 65536])
def test_every_element_of_a_row_has_its_thread(length):
    dealt = quantizers.split(length)
    elements = 8 * dealt.runs * dealt.each
    assert dealt.threads % 32 == 0 and dealt.threads <= 1024
    assert length <= dealt.threads * elements < length + 32 * elements
    assert elements <= 32 or length > 32_768


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_what_nvcc_refuses_is_an_error_with_its_reason(tmp_path):
    file = tmp_path / "kernel.cu"
    file.write_text("nonsense")
    with pytest.raises(LoweringError, match="nvcc refused"):
        compiling.compile_with_nvcc(file, "sm_80")
