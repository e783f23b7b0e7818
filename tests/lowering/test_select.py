"""Selection: the best lowering that supports a linear, with the reasons of those passed over."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mixllm_compiler.runtime  # noqa: F401  installs the build cache
from mixllm_compiler.errors import LoweringError, OptionError
from mixllm_compiler.formats.layout import Layout, packing
from mixllm_compiler.lowering import select as selection
from mixllm_compiler.lowering.cost import predict_seconds
from mixllm_compiler.lowering.cpp import compiler as cpp_compiler
from mixllm_compiler.lowering.cpp import isa, launch
from mixllm_compiler.lowering.cuda import compiling
from mixllm_compiler.lowering.select import LOWERINGS, select
from mixllm_compiler.lowering.target import Target

LAYOUT = Layout(4096, ((4, 3712), (8, 384)), 128)
TWO_LEVEL = Layout(4096, ((3, 64), (4, 3648), (8, 384)), 128, "two-level")
H200 = Target.parse("cuda sm_90 NVIDIA H200")
CPU = Target("cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def no_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("target", ["cuda sm_80", "cuda sm_89", "cuda sm_90", "cuda sm_120"])
def test_gpus_from_sm_80_get_triton(mode, target):
    choice = select(LAYOUT, mode, BF16, Target.parse(target))
    assert (choice.lowering, choice.kernel) == ("triton", "triton.v1")
    assert (choice.packing, choice.quantizer) == ("tiles64.v1", "kernel")
    assert choice.reasons == ("cuda: it knows the family 'two-level', not 'asym'",)


@pytest.fixture
def compiler(monkeypatch):
    """A CUDA compiler is here."""
    monkeypatch.setattr(compiling, "available", lambda: "nvrtc 13.0")


@pytest.mark.parametrize("target", ["cuda sm_80", "cuda sm_90 NVIDIA H200", "cuda sm_120"])
def test_two_level_rows_get_cuda(target, compiler):
    choice = select(TWO_LEVEL, "token", BF16, Target.parse(target))
    assert (choice.lowering, choice.kernel) == ("cuda", "cuda.v1")
    assert (choice.packing, choice.quantizer) == ("cuda64.v1", "kernel")
    assert choice.reasons == ()


@pytest.mark.parametrize(
    "layout, mode, dtype, target, why",
    [
        (TWO_LEVEL, "group", BF16, "cuda sm_90", "one activation scale a token"),
        (TWO_LEVEL, "token", torch.float64, "cuda sm_90", "not torch.float64"),
        (TWO_LEVEL, "token", BF16, "cuda sm_75", "sm_80 or newer"),
        (TWO_LEVEL, "token", BF16, "cuda sm_103", "more slowly than bf16"),
        (TWO_LEVEL, "token", BF16, "cpu", "needs a CUDA device"),
        (Layout(4096, ((4, 64),), 64, "two-level"), "token", BF16, "cuda sm_90", "not 64"),
        (Layout(70_000, ((4, 64),), 128, "two-level"), "token", BF16, "cuda sm_90", "not 70000"),
    ],
)
def test_what_cuda_cannot_do_it_declines_with_a_reason(layout, mode, dtype, target, why, compiler):
    choice = select(layout, mode, dtype, Target.parse(target))
    assert choice.lowering != "cuda"
    assert choice.reasons[0].startswith("cuda: ") and why in choice.reasons[0]


def test_without_a_compiler_cuda_says_what_to_install(monkeypatch):
    monkeypatch.setattr(compiling, "available", lambda: None)
    choice = select(TWO_LEVEL, "token", BF16, H200)
    assert "install the extra 'cuda'" in choice.reasons[0]


@pytest.mark.parametrize("mode", ["token", "group"])
@pytest.mark.parametrize("family", ["asym", "two-level"])
def test_cpus_get_generated_cpp(mode, family):
    choice = select(replace(LAYOUT, family=family), mode, BF16, CPU)
    assert (choice.lowering, choice.kernel) == ("cpp", "cpp.v1")
    assert (choice.packing, choice.quantizer) == ("panels64.v1", "kernel")
    assert choice.name == f"cpp.v1 {isa.current().name}"
    assert [reason.split(":")[0] for reason in choice.reasons] == ["cuda", "triton"]


@pytest.mark.parametrize(
    "layout, dtype, why",
    [
        (LAYOUT, torch.float64, "not torch.float64"),
        (Layout(4096, ((4, 64),), 48), BF16, "not 48"),
        (Layout(4096, ((4, 64),), 0), BF16, "not 0"),
        (Layout(4096, ((4, 64),), 512), BF16, "not 512"),
        (Layout(66_048, ((4, 64),), 128, "two-level"), BF16, "may not fit 32 bits"),
    ],
)
def test_what_cpp_cannot_do_goes_to_the_reference_with_a_reason(layout, dtype, why):
    choice = select(layout, "token", dtype, CPU)
    assert choice.lowering == "reference"
    assert choice.reasons[-1].startswith("cpp: ") and why in choice.reasons[-1]


@pytest.fixture
def fresh_libraries(monkeypatch):
    """As in a new process, with an empty build cache."""
    caches = (
        cpp_compiler.find,
        launch.linear_library,
        launch.quantizer_library,
        selection._announce,
    )

    def clear():
        for cache in caches:
            cache.cache_clear()

    clear()
    yield
    monkeypatch.undo()
    clear()


def test_without_a_compiler_cpus_get_the_reference_and_hear_of_it_once(
    fresh_libraries, monkeypatch, caplog
):
    monkeypatch.setattr(cpp_compiler.shutil, "which", lambda name: None)
    for _ in range(2):
        choice = select(LAYOUT, "token", BF16, CPU)
        assert choice.lowering == "reference"
        assert "no C++ compiler: install g++ or clang++" in choice.reasons[-1]
    assert caplog.text.count("linears run in plain torch, slowly: cpp: no C++ compiler") == 1


def test_where_building_is_forbidden_cpus_get_the_reference(fresh_libraries, monkeypatch, tmp_path):
    monkeypatch.setenv("MIXLLM_NO_BUILD", "1")
    monkeypatch.setenv("MIXLLM_CACHE_DIR", str(tmp_path))
    assert "MIXLLM_NO_BUILD forbids" in select(LAYOUT, "token", BF16, CPU).reasons[-1]


def test_a_compiler_that_fails_is_quoted(fresh_libraries, monkeypatch, tmp_path):
    broken = tmp_path / "c++"
    broken.write_text("#!/bin/sh\necho it is broken >&2; exit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("MIXLLM_CACHE_DIR", str(tmp_path))
    assert "it is broken" in select(LAYOUT, "token", BF16, CPU).reasons[-1]


def test_with_the_interpreter_cpus_get_triton(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select(LAYOUT, "token", BF16, CPU).lowering == "triton"


@pytest.mark.parametrize(
    "layout, dtype, target, why",
    [
        (LAYOUT, BF16, "cuda sm_75", "sm_80 or newer"),
        (LAYOUT, torch.float64, "cuda sm_90", "not torch.float64"),
        (Layout(4096, ((4, 64),), 48), BF16, "cuda sm_90", "not 48"),
        (Layout(4096, ((4, 64),), 256), BF16, "cuda sm_90", "not 256"),
        (Layout(4096, ((4, 64),), 64, "two-level"), BF16, "cuda sm_90", "'two-level'"),
    ],
)
def test_what_triton_cannot_do_goes_to_the_reference_with_a_reason(layout, dtype, target, why):
    choice = select(layout, "token", dtype, Target.parse(target))
    assert choice.lowering == "reference"
    assert why in choice.reasons[1]


def test_one_lowering_can_be_demanded():
    assert select(LAYOUT, "token", BF16, H200, only="reference").lowering == "reference"
    with pytest.raises(LoweringError, match="needs a CUDA device"):
        select(LAYOUT, "token", BF16, CPU, only="triton")


def test_an_unknown_lowering_names_the_nearest():
    with pytest.raises(OptionError, match="Did you mean 'triton'"):
        select(LAYOUT, "token", BF16, CPU, only="tritn")


def test_every_lowering_reads_a_known_packing():
    for lowering in LOWERINGS.values():
        assert packing(lowering.packing).name == lowering.packing


def test_cost_is_none_where_nothing_is_known():
    assert predict_seconds(1, LAYOUT, CPU) is None
    assert predict_seconds(1, LAYOUT, Target.parse("cuda sm_90 NVIDIA H2000")) is None


def test_the_cost_of_two_level_rows_is_that_of_the_cuda_kernels():
    few, many = (predict_seconds(m, TWO_LEVEL, H200) for m in (1, 4096))
    assert 2e-6 < few < 8e-6 and 80e-6 < many < 160e-6
    assert predict_seconds(1, TWO_LEVEL, Target.parse("cuda sm_90")) is None


def test_few_tokens_cost_bytes_and_many_cost_arithmetic():
    wide = Layout(4096, ((8, 4096),), 128)
    few = [predict_seconds(1, layout, H200) for layout in (LAYOUT, wide)]
    many = [predict_seconds(8192, layout, H200) for layout in (LAYOUT, wide)]
    assert few[0] < few[1]
    assert many[0] == many[1]
    assert 2e-6 < few[0] < 6e-6
    assert predict_seconds(4096, LAYOUT, H200) < many[0]
