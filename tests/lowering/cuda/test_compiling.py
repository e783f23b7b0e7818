"""From source to machine code: which compiler, the cache, and what is said where one is missing."""

from __future__ import annotations

import ctypes.util

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mixllm_compiler.errors import LoweringError
from mixllm_compiler.formats.layout import pack
from mixllm_compiler.lowering import sources
from mixllm_compiler.lowering.cuda import compiling, driver
from mixllm_compiler.lowering.lowered import (
    LOWERED_LINEAR,
    LOWERED_QUANTIZE,
    expand_linear,
    expand_quantize_activation,
)
from mixllm_compiler.runtime import build
from tests.lowering.two_level import random_weight

KERNEL = "cuda.v1"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Sources and products of a test stay its own."""
    monkeypatch.setenv("MIXLLM_CACHE_DIR", str(tmp_path))
    sources.use_store(build.materialize, build.build)


def test_a_source_is_compiled_once(monkeypatch):
    compiled = []

    def nvcc(source, architecture):
        compiled.append((source.read_text(), architecture))
        return b"machine code"

    monkeypatch.setattr(compiling, "available", lambda: "nvcc 13.0.88")
    monkeypatch.setattr(compiling, "_with_nvcc", nvcc)
    for _ in range(2):
        assert compiling.cubin("// one", "linear", "sm_80").read_bytes() == b"machine code"
    compiling.cubin("// one", "linear", "sm_90a")
    monkeypatch.setattr(compiling, "available", lambda: "nvcc 13.1.0")
    compiling.cubin("// one", "linear", "sm_90a")
    assert compiled == [("// one", "sm_80"), ("// one", "sm_90a"), ("// one", "sm_90a")]


def test_without_a_compiler_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compiling, "available", lambda: None)
    with pytest.raises(LoweringError, match=r"install the extra 'cuda'.*or put nvcc into PATH"):
        compiling.cubin("// one", "linear", "sm_80")


def test_a_server_that_must_not_build_says_so(monkeypatch):
    monkeypatch.setattr(compiling, "available", lambda: "nvcc 13.0.88")
    monkeypatch.setenv("MIXLLM_NO_BUILD", "1")
    with pytest.raises(LoweringError, match="MIXLLM_NO_BUILD forbids"):
        compiling.cubin("// one", "linear", "sm_80")


@pytest.mark.skipif(
    ctypes.util.find_library("cuda") is not None, reason="asks what happens without a driver"
)
def test_without_a_driver_loading_is_an_error(tmp_path):
    driver._library.cache_clear()
    file = tmp_path / "kernel.cubin"
    file.write_bytes(b"")
    with pytest.raises(LoweringError, match="the CUDA driver cannot be loaded"):
        driver.load(file, "linear")


def test_on_a_cpu_both_ops_say_what_they_need():
    packed = pack(random_weight(64, 128, torch.full((64,), 4)), "cuda64.v1")
    x = torch.randn(2, 128)
    with pytest.raises(LoweringError, match="needs a CUDA device, this is cpu"):
        LOWERED_QUANTIZE(x, "token", 128, 0, KERNEL)
    activation = expand_quantize_activation(x, "token", 128, 0, KERNEL)
    with pytest.raises(LoweringError, match="needs a CUDA device, this is cpu"):
        LOWERED_LINEAR(*activation, packed.blob, None, str(packed.layout), torch.float32, KERNEL)
    with pytest.raises(LoweringError, match="one scale a token, not mode 'group'"):
        LOWERED_QUANTIZE(x, "group", 128, 0, KERNEL)


@pytest.mark.parametrize("hadamard", [0, 128])
def test_fakes_have_one_sum_a_token_as_the_definition(hadamard):
    packed = pack(random_weight(70, 384, torch.full((70,), 4)), "cuda64.v1")
    x = torch.randn(2, 3, 384)
    real = expand_quantize_activation(x, "token", 128, hadamard, KERNEL)
    assert real[2].shape == (2, 3, 1)
    assert torch.equal(real[2], real[0].sum(-1, keepdim=True, dtype=torch.int32))
    layout = str(packed.layout)
    y = expand_linear(*real, packed.blob, None, layout, torch.bfloat16, KERNEL)
    with FakeTensorMode() as fakes:
        fake = LOWERED_QUANTIZE(fakes.from_tensor(x), "token", 128, hadamard, KERNEL)
        blob = fakes.from_tensor(packed.blob)
        fake_y = LOWERED_LINEAR(*fake, blob, None, layout, torch.bfloat16, KERNEL)
    for one, other in zip((*fake, fake_y), (*real, y), strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
