"""Segments run one after the other give what the whole graph gives, wherever it is cut."""

from __future__ import annotations

import functools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mixllm_compiler.calibration.segments import SegmentInterpreter, cut
from mixllm_compiler.ir.graph import MixGraph
from tests.helpers import captured, token_ids
from tests.models.support import build

IDS = token_ids(2, 7)
KINDS = ("llama", "gpt2", "opt", "qwen2")


@functools.cache
def whole(kind: str) -> tuple[MixGraph, torch.Tensor]:
    graph = captured(build(kind), IDS, use_cache=False)
    with torch.no_grad():
        return graph, graph.module(*graph.inputs)[0]


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_segments_give_what_the_graph_gives(kind, data):
    graph, expected = whole(kind)
    nodes = list(graph.graph.nodes)
    after = data.draw(st.lists(st.sampled_from(nodes), max_size=6))
    segments = cut(graph.graph, after)
    placeholders = dict(zip(graph.placeholders(), graph.inputs, strict=True))
    run, live = SegmentInterpreter(graph.module), {}
    with torch.no_grad():
        for segment in segments:
            assert set(segment.inputs) <= live.keys()
            live = run.run_segment(segment, placeholders | live)
            assert live.keys() == set(segment.outputs)
    (output,) = (n for n in nodes if n.op == "output")
    assert torch.equal(live[output.args[0][0]], expected)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_every_node_is_in_one_segment_and_cuts_are_where_they_were_asked(kind, data):
    graph, _ = whole(kind)
    computed = [n for n in graph.graph.nodes if n.op in ("call_function", "call_method")]
    after = data.draw(st.lists(st.sampled_from(computed), max_size=6, unique=True))
    segments = cut(graph.graph, after)
    assert [n for s in segments for n in s.nodes] == computed
    ends = {s.nodes[-1] for s in segments}
    assert ends == {*after, computed[-1]}
