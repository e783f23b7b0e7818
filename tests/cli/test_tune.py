"""`mixllm tune` with a GPU and a timer that only pretend to be there."""

from __future__ import annotations

import pytest
import torch

from mixllm_compiler.cli import tune as verb
from mixllm_compiler.lowering.cuda import dispatch, timing
from mixllm_compiler.lowering.target import Target

GPU = Target.parse("cuda sm_90 NVIDIA H999")


class Timer:
    """The first candidate is the fastest by far."""

    def __call__(self, matrix, m, variants):
        return {v: 1.0 + 10 * (i > 0) for i, v in enumerate(variants)}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU nobody has timed; its table goes into the test's folder."""
    monkeypatch.setenv("MIXLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(verb, "_gpu", lambda: (GPU, 132))
    monkeypatch.setattr(timing, "GpuTimer", Timer)
    dispatch.forget()
    yield tmp_path / "tables" / "nvidia-h999.json"
    dispatch.forget()


def test_it_tunes_llamas_shapes_once(answer, gpu):
    found = answer("tune", "--tokens", "64,1")
    assert found["file"] == str(gpu) and gpu.is_file()
    assert found["timed"] == len(found["problems"]) == 16
    assert {row["tokens"] for row in found["problems"]} == {1, 64}
    row = next(r for r in found["problems"] if (r["n"], r["k"], r["tokens"]) == (4096, 4096, 1))
    assert row["us"] == 1.0 and row["variant"] == str(dispatch.candidates(1, GPU)[0])
    assert answer("tune", "--tokens", "1,64")["timed"] == 0
    assert answer("tune", "--tokens", "1,64", "--again")["timed"] == 16


def test_it_tunes_the_linears_of_a_model(answer, gpu, tiny_model):
    found = answer("tune", "--model", tiny_model, "--tokens", "1")
    shapes = {(row["n"], row["k"]) for row in found["problems"]}
    assert shapes == {(64, 128), (128, 128), (256, 128), (128, 256)}


def test_it_tunes_the_matrices_of_a_plan(answer, mixllm, gpu, tiny_model, tmp_path):
    scores, plan = tmp_path / "scores.safetensors", tmp_path / "plan.safetensors"
    text = ("--sequences", 1, "--length", 32)
    for family, code in (("two-level", 0), ("asym", 1)):
        assert mixllm("score", tiny_model, "-o", scores, "--family", family, *text).exit_code == 0
        assert mixllm("plan", scores, "-o", plan, "--bits", "4.6").exit_code == 0
        result = mixllm("tune", "--plan", plan, "--tokens", "1,4096")
        assert result.exit_code == code
    assert "two-level rows in groups of 128" in " ".join(result.stderr.split())


def test_a_person_sees_what_is_fastest(mixllm, gpu):
    shown = mixllm("tune", "--tokens", "16").stdout
    assert "4096×4096" in shown and str(gpu) in shown.replace("\n", "")


@pytest.mark.parametrize("tokens", ["", "0", "1,x", "-3"])
def test_tokens_are_numbers(mixllm, gpu, tokens):
    result = mixllm("tune", f"--tokens={tokens}")
    assert result.exit_code == 1 and "no list of numbers" in result.stderr


def test_a_model_and_a_plan_are_too_much(mixllm, gpu):
    result = mixllm("tune", "--model", "demo", "--plan", "plan.safetensors")
    assert result.exit_code == 1 and "not both" in result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks what happens without a GPU")
def test_without_a_gpu_it_says_so(mixllm):
    result = mixllm("tune")
    assert result.exit_code == 1
    assert "there is no CUDA device; see `mixllm doctor`" in result.stderr


def test_without_a_compiler_it_says_so(mixllm, monkeypatch):
    from mixllm_compiler.lowering.cuda import compiling

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(Target, "of", lambda device: GPU)
    monkeypatch.setattr(compiling, "available", lambda: None)
    result = mixllm("tune")
    assert result.exit_code == 1
    assert "no CUDA compiler: install the extra 'cuda'" in " ".join(result.stderr.split())
