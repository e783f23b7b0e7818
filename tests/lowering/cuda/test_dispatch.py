"""The dispatcher: every problem gets a variant that its GPU can run, timed ones the fastest."""

from __future__ import annotations

import pytest

from mixllm_compiler.formats.layout import Layout
from mixllm_compiler.lowering.cuda import dispatch
from mixllm_compiler.lowering.cuda.cost import MICROSECONDS, Problem, predict_seconds, terms
from mixllm_compiler.lowering.cuda.variants import Variant
from mixllm_compiler.lowering.target import Target

H200 = Target.parse("cuda sm_90 NVIDIA H200")
H100 = Target.parse("cuda sm_90 NVIDIA H100 80GB HBM3")
SHARED = 227 << 10  # bytes that a CTA of sm_90 may have
MULTIPROCESSORS = 132


def layout(n: int, k: int, widths=(3, 4, 8)) -> Layout:
    rows = tuple((b, n // len(widths) or 1) for b in widths)
    return Layout(k, rows, 128, "two-level", "cuda64.v1")


@pytest.mark.parametrize("m", [1, 8, 9, 16, 17, 32, 33, 64, 128, 129, 256, 257, 1024, 8192, 10**6])
@pytest.mark.parametrize("n, k", [(1, 1), (4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336)])
@pytest.mark.parametrize("target", ["cuda sm_80", str(H200), str(H100), "cuda sm_120"])
def test_every_problem_gets_a_variant_that_its_gpu_runs(m, n, k, target):
    target, packed = Target.parse(target), layout(n, k)
    variant = dispatch.choose(m, packed, target, MULTIPROCESSORS)
    assert target.capability >= variant.architecture
    assert not variant.reads_tiles or target.capability == (9, 0)
    if variant.regime in ("decode", "staged"):
        assert m <= variant.tokens
    launch = variant.launch(m, Problem.of(packed).tiles, MULTIPROCESSORS)
    assert launch.grid > 0 and launch.grid % launch.cluster == 0
    assert launch.shared <= SHARED and launch.block <= 1024
    assert variant in dispatch.shipped(target)


def test_all_candidates_fit_a_multiprocessor_as_often_as_they_say():
    for m in (1, 16, 32, 64, 128, 256, 1024):
        for variant in dispatch.candidates(m, H200):
            launch = variant.launch(m, 64, MULTIPROCESSORS)
            assert launch.shared <= SHARED, variant
            if variant.regime == "middle":
                tokens, stages, ranks, _, resident, _, sets = variant.sizes
                assert resident * (launch.shared + 1024) <= 228 << 10, variant
                assert stages % sets == 0 and tokens // (ranks * sets) % 8 == 0, variant


def test_timed_shapes_get_the_tables_variant():
    entries = dispatch.table(H200)
    assert {entry.tokens for entry in entries} >= {1, 16, 256, 4096}
    for entry in entries:
        rows = ((4, 64 * entry.tiles),)
        timed = Layout(128 * entry.groups, rows, 128, "two-level", "cuda64.v1")
        assert dispatch.choose(entry.tokens, timed, H200, MULTIPROCESSORS) == entry.variant


def test_between_the_tables_tokens_the_next_larger_one_decides():
    by_tokens = {
        e.tokens: e.variant for e in dispatch.table(H200) if (e.tiles, e.groups) == (64, 32)
    }
    o = Layout(4096, ((4, 4096),), 128, "two-level", "cuda64.v1")
    assert dispatch.choose(100, o, H200, MULTIPROCESSORS) == by_tokens[128]
    assert dispatch.choose(50_000, o, H200, MULTIPROCESSORS) == by_tokens[4096]


def test_gpus_and_shapes_without_a_table_ask_the_cost_model():
    odd = layout(5000, 3000)
    assert not dispatch.table(H100)
    for m in (1, 50, 3000):
        chosen = dispatch.choose(m, odd, H200, MULTIPROCESSORS)
        assert chosen == dispatch.by_cost(m, Problem.of(odd), H200, MULTIPROCESSORS)
        others = [
            predict_seconds(v, m, Problem.of(odd), MULTIPROCESSORS)
            for v in dispatch.candidates(m, H200)
        ]
        mine = predict_seconds(chosen, m, Problem.of(odd), MULTIPROCESSORS)
        assert mine == min(seconds for seconds in others if seconds is not None)


@pytest.mark.parametrize("regime", MICROSECONDS)
def test_every_term_has_its_price(regime):
    text = {"decode": "1,2,8,2", "middle": "64,6,2,0,2,1,2", "prefill": "256,3,4"}[regime]
    found = terms(
        Variant.parse(f"{regime}:{text}"), 8, Problem(64, 32, 10.0, 90.0), MULTIPROCESSORS
    )
    assert len(found) == len(MICROSECONDS[regime])


def test_cost_follows_bytes_in_decode_and_instructions_in_prefill():
    narrow, wide = layout(4096, 4096, (2,)), layout(4096, 4096, (8,))
    decode, prefill = Variant.parse("decode:1,2,8,2"), Variant.parse("prefill:256,3,4")

    def seconds(variant, m, of):
        return predict_seconds(variant, m, Problem.of(of), MULTIPROCESSORS)

    assert seconds(decode, 1, narrow) < seconds(decode, 1, wide)
    assert seconds(prefill, 4096, narrow) > seconds(prefill, 4096, wide)  # 8 bits need no unpacking
