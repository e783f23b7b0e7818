"""Segments of graphs that write in place, and of graphs with a no_grad region."""

from __future__ import annotations

import operator

import pytest
import torch
from torch import Tensor, fx, nn

from mixllm_compiler.calibration.segments import SegmentInterpreter, cut
from mixllm_compiler.ir.graph import MixGraph, mutated_inputs
from tests.helpers import activations, captured


class Writer(nn.Module):
    """Adds to its residual stream, to a view of it and to an input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        h = self.first(x)
        h += 1
        memory.add_(h)
        y = self.second(h)
        part = h[:, :4]
        part.mul_(2)
        return y + h + memory


def made() -> tuple[MixGraph, dict]:
    model = Writer().eval()
    graph = captured(model, activations(3, k=8), activations(3, k=8, seed=2))
    return graph, dict(zip(graph.placeholders(), graph.inputs, strict=True))


def copies(values: dict) -> dict:
    return {n: v.detach().clone() for n, v in values.items()}


def test_writes_in_place_reach_later_segments_and_no_stored_value():
    graph, given = made()
    expected = graph.module(*copies(given).values())[0]
    run = SegmentInterpreter(graph.module)
    for node in graph.graph.nodes:
        live: dict = {}
        for segment in cut(graph.graph, [node]):
            inputs = given | live
            before = copies(inputs)
            live = run.run_segment(segment, inputs)
            again = run.run_segment(segment, inputs)
            assert all(torch.equal(inputs[n], before[n]) for n in inputs)
            assert all(torch.equal(live[n], again[n]) for n in live)
        (result,) = (v for n, v in live.items() if any(u.op == "output" for u in n.users))
        assert torch.equal(result, expected), node


@pytest.mark.parametrize(
    "function, writes", [(operator.and_, False), (operator.or_, False), (operator.iand, True)]
)
def test_names_that_only_look_like_writes(function, writes):
    graph = fx.Graph()
    a, b = graph.placeholder("a"), graph.placeholder("b")
    assert mutated_inputs(graph.call_function(function, (a, b))) == ([a] if writes else [])


def test_no_cut_between_a_view_and_what_is_written_through_it():
    graph, _ = made()
    (view,) = (n for n in graph.graph.nodes if n.name == "part")
    assert len(cut(graph.graph, [view])) == 1


def test_given_nodes_are_not_run_and_others_can_be_replaced():
    graph, given = made()
    linears = graph.calls(torch._C._nn.linear)
    run = SegmentInterpreter(graph.module, {linears[1]: lambda x, w, b: torch.zeros_like(x)})
    (segment,) = cut(graph.graph, [])
    (result,) = run.run_segment(segment, given | {linears[0]: torch.ones(3, 8)}).values()
    h = torch.full((3, 8), 2.0)
    h[:, :4] *= 2
    (memory,) = (v for n, v in given.items() if "memory" in n.name)
    assert torch.equal(result, h + (memory + 2))


class Frozen(nn.Module):
    """A region without gradients in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        with torch.no_grad():
            x = self.second(x)
        return x.sum(-1)


def test_a_region_without_gradients_does_not_cut_them():
    graph = captured(Frozen().eval(), activations(3, k=8))
    given = dict(zip(graph.placeholders(), graph.inputs, strict=True))
    first = graph.calls(torch._C._nn.linear)[0]
    start, end = cut(graph.graph, [first])
    run = SegmentInterpreter(graph.module)
    with torch.enable_grad():
        live = run.run_segment(start, given)
        leaf = live[first].detach().requires_grad_()
        (result,) = run.run_segment(end, given | {first: leaf}).values()
        result.sum().backward()
    assert leaf.grad is not None and leaf.grad.abs().sum() > 0
