"""Kernels compile ahead of time without a GPU, and int8 codes reach the matrix instructions."""

from __future__ import annotations

import re

import pytest

from mixllm_compiler.errors import LoweringError
from mixllm_compiler.lowering.spec import parse
from mixllm_compiler.lowering.target import Target
from mixllm_compiler.lowering.triton.schedule import schedule

pytest.importorskip("triton")

BUCKETS = schedule(Target("cuda", (9, 0)))
TABLE = " ".join(str(bucket) for bucket in BUCKETS)
# A byte matrix instruction whose operands are both 8 bits wide.
MMA = re.compile(r"mma\.sync\.aligned\.m16n8k32\.\S*\.s32\.[su]8\.[su]8\.s32")
WGMMA = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.[su]8\.[su]8")


@pytest.fixture(autouse=True)
def compiler(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


def ptx(text, capability, **options):
    from mixllm_compiler.lowering.triton.aot import compile_ptx

    return compile_ptx(parse(text), capability, **options)


@pytest.mark.parametrize("mode, bias", [("token", ""), ("group", " bias")])
def test_on_sm_80_codes_go_into_mma(mode, bias):
    found = ptx(f"linear | tiles64.v1 asym g128 w4 w8 | {mode} bfloat16{bias} | {TABLE}", 80)
    assert MMA.search(found)
    assert "sm_80" in found


@pytest.mark.parametrize("block_m", [bucket.block_m for bucket in BUCKETS])
def test_on_sm_90_codes_go_into_mma_or_wgmma(block_m):
    text = f"linear | tiles64.v1 asym g128 w4 w8 | token bfloat16 | {TABLE}"
    found = ptx(text, 90, block_m=block_m)
    tall = next(b for b in BUCKETS if b.block_m == block_m).split == 1
    assert (WGMMA if tall else MMA).search(found)


def test_weights_are_loaded_ahead():
    text = f"linear | tiles64.v1 asym g128 w4 w8 | token bfloat16 | {TABLE}"
    found = ptx(text, 90, block_m=16)
    assert "cp.async.cg.shared.global" in found
    # What is left of ordinary loads lies outside of the loop: row order, scales of the tokens.
    assert len(re.findall(r"ld\.global", found)) < 10


def test_all_widths_compile():
    text = f"linear | tiles64.v1 asym g64 w2 w3 w4 w5 w6 w8 | group float16 | {TABLE}"
    assert MMA.search(ptx(text, 80, block_m=16))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("mode", ["token", "group"])
def test_the_quantizer_divides_and_rounds_exactly(capability, mode):
    found = ptx(f"quantize | g128 | {mode} bfloat16 | 2048,512", capability)
    assert "div.rn.f32" in found
    assert "div.full" not in found and "div.approx" not in found and ".ftz" not in found
    # 1.5 · 2²³ is added and taken away again.
    assert "0f4B400000" in found and "0fCB400000" in found


def test_a_bucket_that_is_not_there_is_refused():
    with pytest.raises(LoweringError, match="no bucket of 5 tokens"):
        ptx("linear | tiles64.v1 asym g128 w4 | token bfloat16 | m16:16x8,8,3", 90, block_m=5)


def test_an_interpreting_process_cannot_compile(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(LoweringError, match="TRITON_INTERPRET"):
        ptx("quantize | g128 | token bfloat16 | 2048,512", 90)
