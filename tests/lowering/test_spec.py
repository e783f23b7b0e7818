"""Specs: three kinds of options, a text that round-trips, and no shapes in it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixllm_compiler.errors import OptionError
from mixllm_compiler.formats.layout import Layout
from mixllm_compiler.lowering.spec import (
    DTYPES,
    BlobLayout,
    Bucket,
    KernelSpec,
    Numerics,
    QuantizerSpec,
    parse,
)
from mixllm_compiler.lowering.target import Target
from tests.lowering.cases import ALL_WIDTHS

modes = st.sampled_from(["token", "group"])
dtypes = st.sampled_from(list(DTYPES.values()))
groups = st.sampled_from([16, 32, 64, 128, 256])
buckets = st.lists(
    st.builds(Bucket, *(st.integers(1, 512) for _ in range(5))),
    min_size=1,
    max_size=5,
    unique_by=lambda b: b.block_m,
).map(lambda found: tuple(sorted(found, key=lambda b: b.block_m)))
widths = st.sets(st.sampled_from(ALL_WIDTHS), min_size=1).map(lambda s: tuple(sorted(s)))
linears = st.builds(
    KernelSpec,
    st.builds(BlobLayout, st.just("tiles64.v1"), st.just("asym"), groups, widths),
    st.builds(Numerics, modes, dtypes, st.booleans()),
    buckets,
)
quantizers = st.builds(
    QuantizerSpec, groups, modes, dtypes, st.integers(1, 1 << 16), st.integers(1, 1 << 12)
)


@given(linears | quantizers)
def test_the_text_of_a_spec_round_trips(spec):
    assert parse(str(spec)) == spec
    assert type(spec).parse(str(spec)) == spec


def test_the_text_reads_well():
    text = "linear | tiles64.v1 asym g128 w4 w8 | token bfloat16 bias | m16:16x8,8,3 m64:64x1,4,4"
    spec = KernelSpec.parse(text)
    assert spec.layout == BlobLayout("tiles64.v1", "asym", 128, (4, 8))
    assert spec.numerics == Numerics("token", torch.bfloat16, bias=True)
    assert spec.schedule[0] == Bucket(16, rows=16, split=8, warps=8, stages=3)
    assert str(spec) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "linaer | tiles64.v1 asym g128 w4 | token bfloat16 | m16:16x8,8,3",
        "linear | tiles64.v1 asym g128 | token bfloat16 | m16:16x8,8,3",
        "linear | tiles64.v1 asym g128 w8 w4 | token bfloat16 | m16:16x8,8,3",
        "linear | tiles64.v1 asym g128 w7 | token bfloat16 | m16:16x8,8,3",
        "linear | tiles64.v1 asym g128 w4 | tokens bfloat16 | m16:16x8,8,3",
        "linear | tiles64.v1 asym g128 w4 | token int4 | m16:16x8,8,3",
        "linear | tiles64.v1 asym g128 w4 | token bfloat16 | 16",
        "linear | tiles64.v1 asym g128 w4 | token bfloat16 | m32:16x8,8,3 m16:16x8,8,3",
        "quantize | g128 | token bfloat16",
        "quantize | g128 | row bfloat16 | 2048,512",
    ],
)
def test_text_that_is_no_spec_is_refused(text):
    with pytest.raises(OptionError):
        parse(text)


def test_a_spec_holds_no_shape():
    small = Layout(128, ((4, 64), (8, 64)), 128, packing="tiles64.v1")
    large = Layout(14336, ((4, 3700), (8, 396)), 128, packing="tiles64.v1")
    assert BlobLayout.of(small) == BlobLayout.of(large)


def test_the_smallest_bucket_that_holds_all_tokens_serves_them():
    spec = KernelSpec.parse(
        "linear | tiles64.v1 asym g128 w4 | token bfloat16 | m16:16x8,8,3 m64:64x1,4,4"
    )
    assert [spec.bucket(m).block_m for m in (1, 16, 17, 64, 65, 9999)] == [16, 16, 64, 64, 64, 64]


@pytest.mark.parametrize("text", ["cpu", "cuda sm_80", "cuda sm_90 NVIDIA H200", "cuda sm_120"])
def test_the_text_of_a_target_round_trips(text):
    assert str(Target.parse(text)) == text


def test_targets_compare_capabilities():
    assert Target.parse("cuda sm_120").capability == (12, 0)
    assert Target.parse("cuda sm_90").at_least(8)
    assert not Target.parse("cuda sm_75").at_least(8)
    assert not Target.of("cpu").at_least(8)
    with pytest.raises(OptionError):
        Target.parse("cuda:0")
