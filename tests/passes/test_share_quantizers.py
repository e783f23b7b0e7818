"""Linears that read the same value share one activation quantizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mixllm_compiler.ir import ops
from mixllm_compiler.options import Options
from mixllm_compiler.passes.context import Context
from mixllm_compiler.passes.share_quantizers import ShareQuantizers
from tests.helpers import HIDDEN, LlamaBlock, activations, captured, outputs, passed

X = activations(2, 5)


def shared(graph):
    return ShareQuantizers()(graph, Context(Options()))


def quantizers(graph):
    return len(graph.calls(ops.QUANTIZE_ACTIVATION))


def test_q_k_v_and_gate_up_share_and_not_a_bit_changes():
    graph = captured(LlamaBlock(), X)
    passed(graph, "rewrite-linears")
    assert quantizers(graph) == 7
    before = outputs(graph)
    changes = shared(graph)
    assert quantizers(graph) == 4  # qkv, o, gate and up, down
    assert torch.equal(outputs(graph), before)
    assert [why for _, why in changes.lines] == [
        "3 readers share one group/128 quantizer",
        "2 readers share one group/128 quantizer",
    ]


def in_place(write):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

        def forward(self, x):
            x = x * 1
            y = self.a(x)
            write(x)
            return y + self.b(x) * self.c(x)

    return Writes().eval()


def into_an_out_argument(x):
    torch.add(x, 1, out=x)


def into_a_slice(x):
    x[..., :3] = 0


def augmented(x):
    x += 1


WRITES = {
    "method": lambda x: x.add_(1),
    "view": lambda x: x.view(-1).mul_(2),
    "transposed view": lambda x: x.transpose(0, 1).mul_(2),
    "slice": into_a_slice,
    "copy": lambda x: x.copy_(x * 3),
    "index_copy": lambda x: x.index_copy_(0, torch.tensor([0]), torch.zeros(1, 5, HIDDEN)),
    "functional": lambda x: torch.relu_(x),
    "inplace=True": lambda x: torch.nn.functional.relu(x, inplace=True),
    "aten": lambda x: torch.ops.aten.mul_.Tensor(x, x),
    "out=": into_an_out_argument,
    "augmented": augmented,
    "__iadd__": lambda x: x.__iadd__(1),
}


@pytest.mark.parametrize("name", WRITES)
def test_an_inplace_write_between_readers_keeps_them_apart(name):
    graph = captured(in_place(WRITES[name]), X)
    passed(graph, "rewrite-linears")
    before = outputs(graph)
    shared(graph)
    assert torch.equal(outputs(graph), before)


def test_readers_on_one_side_of_a_write_do_share():
    """b and c read the same new value; only a reads the old one."""
    graph = captured(in_place(lambda x: x.add_(1)), X)
    passed(graph, "share-quantizers")
    assert quantizers(graph) == 2


def test_a_write_to_something_else_does_not_matter():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x):
            y = self.a(x)
            y.add_(1)
            return y + self.b(x)

    graph = captured(Model().eval(), X)
    passed(graph, "share-quantizers")
    assert quantizers(graph) == 1


def test_different_values_are_quantized_apart():
    graph = captured(nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)).eval(), X)
    passed(graph, "share-quantizers")
    assert quantizers(graph) == 2


def test_different_modes_are_not_merged():
    graph = captured(LlamaBlock(), X)
    passed(graph, "rewrite-linears")
    second = graph.calls(ops.QUANTIZE_ACTIVATION)[1]
    second.args = (second.args[0], "token", 128)
    before = outputs(graph)
    shared(graph)
    assert quantizers(graph) == 5
    assert torch.equal(outputs(graph), before)
