"""The text of a pipeline parses back into the same passes with the same arguments."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from mixllm_compiler.errors import OptionError
from mixllm_compiler.passes.annotate_salience import PASS_KINDS, AnnotateSalience
from mixllm_compiler.passes.base import Pass, parse_value
from mixllm_compiler.passes.pipeline import OWN_PASSES, Pipeline, default_pipeline, parse
from mixllm_compiler.passes.registry import register_pass, unregister_pass
from mixllm_compiler.passes.rotate_inputs import RotateInputs

PLAIN = st.sampled_from([p for p in OWN_PASSES if p not in (RotateInputs, AnnotateSalience)])
PASSES = st.one_of(
    PLAIN.map(lambda make: make()),
    st.sampled_from((0, 32, 64, 128, 256)).map(RotateInputs),
    st.sampled_from(PASS_KINDS).map(AnnotateSalience),
)
WORDS = st.from_regex(r"[a-zA-Z][\w.:-]{0,10}", fullmatch=True).filter(
    lambda w: w.lower() not in ("true", "false", "nan", "inf", "infinity")
)


class Adjustable(Pass):
    """Takes an argument of every kind that text can hold."""

    name = "adjust-everything"

    def __init__(self, count=0, share=0.5, fast=False, mode="auto"):
        self.count, self.share, self.fast, self.mode = count, share, fast, mode


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register_pass()(Adjustable)
    yield
    unregister_pass("adjust-everything")


def same(a, b):
    return (type(a), a.arguments()) == (type(b), b.arguments())


@given(st.lists(PASSES, max_size=8))
def test_round_trip(passes):
    pipeline = Pipeline(passes)
    again = parse(pipeline.spec())
    assert again.spec() == pipeline.spec()
    assert all(map(same, again.passes, pipeline.passes))
    assert len(again.passes) == len(passes)


@given(
    count=st.integers(),
    share=st.floats(allow_nan=False, allow_infinity=False),
    fast=st.booleans(),
    mode=WORDS,
)
def test_arguments_of_every_kind(count, share, fast, mode):
    step = Adjustable(count, share, fast, mode)
    (again,) = parse(step.spec()).passes
    assert same(step, again)
    for value in (again.count, again.share, again.fast, again.mode):
        assert type(value) in (int, float, bool, str)


@given(st.lists(st.sampled_from((" ", "  ", "\n", "\t", "")), min_size=4, max_size=4))
def test_white_space_does_not_matter(gaps):
    a, b, c, d = gaps
    text = f"{a}rotate-inputs{b}{{block=64}}{c},{d}allocate-bits{a}"
    assert parse(text).spec() == "rotate-inputs{block=64},allocate-bits"


@given(st.lists(st.sampled_from([p.name for p in OWN_PASSES]), unique=True))
def test_leaving_out_passes_keeps_the_order_of_the_others(names):
    left = default_pipeline().without(names).names()
    assert left == [n for n in default_pipeline().names() if n not in names]


@given(st.text(max_size=40))
def test_other_text_is_refused_or_empty(text):
    """Never another error, and never a pass that was not named."""
    try:
        pipeline = parse(text)
    except OptionError:
        return
    assert all(name in text for name in pipeline.names())


@given(st.one_of(st.integers(), st.booleans(), WORDS))
def test_values(value):
    assert parse_value(str(value)) == value
