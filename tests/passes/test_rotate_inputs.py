"""A Hadamard transform of a linear's input and weight leaves the float function as it is."""

from __future__ import annotations

import torch
from torch import nn

from mixllm_compiler.ir import ops
from mixllm_compiler.options import Options
from mixllm_compiler.passes.annotate_linears import AnnotateLinears
from mixllm_compiler.passes.canonicalize_linears import CanonicalizeLinears
from mixllm_compiler.passes.context import Context
from mixllm_compiler.passes.pipeline import Pipeline
from mixllm_compiler.passes.rotate_inputs import RotateInputs
from tests.helpers import (
    HIDDEN,
    LlamaBlock,
    activations,
    assert_quantized,
    captured,
    causal_lm,
    compiled,
    oracle,
    outputs,
    passed,
    token_ids,
)

X = activations(2, 5)


def transforms(graph):
    """How many activations and how many weights are transformed."""
    calls = graph.calls(ops.HADAMARD)
    weights = [n for n in calls if graph.weight_binding(n) is not None]
    return len(calls) - len(weights), len(weights)


def rotated(graph, block=128):
    ctx = Context(Options.parse({"rotate": block}))
    Pipeline([CanonicalizeLinears(), AnnotateLinears(), RotateInputs()]).run(graph, ctx)
    return graph


def test_the_float_function_stays_equal():
    """Run in float64, so that what differs is the transform and not rounding."""
    graph = captured(LlamaBlock(), X)
    values = [v.double() for v in graph.inputs]
    with torch.no_grad():
        (before,) = graph.module(*values)
        rotated(graph)
        (after,) = graph.module(*values)
    assert before.dtype == torch.float64
    assert not torch.equal(after, before)
    assert (after - before).abs().max() < 1e-5 * before.abs().max()


def test_siblings_share_one_transform():
    graph = rotated(captured(LlamaBlock(), X))
    assert transforms(graph) == (4, 7)  # qkv, o, gate and up, down
    assert {m.transform for m in graph.matrices.values()} == {"hadamard:128"}


def test_an_inplace_write_between_siblings_keeps_them_apart():
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x):
            x = x * 1
            y = self.a(x)
            x.add_(1)
            return y + self.b(x)

    model = Writes().eval()
    graph = captured(model, X)
    before = outputs(graph)
    rotated(graph)
    assert transforms(graph) == (2, 2)
    assert (outputs(graph) - before).abs().max() < 1e-4


def test_without_a_block_nothing_happens():
    graph = captured(LlamaBlock(), X)
    text = str(graph.graph)
    rotated(graph, 0)
    assert str(graph.graph) == text
    assert {m.transform for m in graph.matrices.values()} == {""}


def test_the_block_divides_k_or_there_is_none():
    model = nn.Sequential(nn.Linear(160, 144), nn.Linear(144, 192), nn.Linear(192, 64)).eval()
    graph = captured(model, activations(2, k=160))
    changes = Pipeline([CanonicalizeLinears(), AnnotateLinears(), RotateInputs()]).run(
        graph, Context(Options.parse({"rotate": 128}))
    )
    assert [m.transform for m in graph.matrices.values()] == ["hadamard:32", "", "hadamard:64"]
    assert ("1", "not rotated: no power of two ≥ 32 divides K = 144") in changes.lines


def test_a_pass_argument_overrides_the_option():
    graph = captured(LlamaBlock(), X)
    Pipeline([CanonicalizeLinears(), AnnotateLinears(), RotateInputs(block=64)]).run(
        graph, Context(Options())
    )
    assert {m.transform for m in graph.matrices.values()} == {"hadamard:64"}


def test_floats_that_stay_are_not_rotated():
    graph = captured(LlamaBlock(), X)
    passed(graph, "rotate-inputs", rotate=128, exclude=("mlp.*",))
    assert transforms(graph) == (2, 4)


def test_conv1d_is_rotated_along_its_inputs():
    graph = captured(causal_lm("gpt2", layers=1), token_ids(1, 5), use_cache=False)
    before = outputs(graph)
    rotated(graph)
    assert (outputs(graph) - before).abs().max() < 1e-3 * before.abs().max()
    assert transforms(graph) == (4, 4)


def test_a_rotated_model_is_quantized_in_the_rotated_space_per_token():
    model = LlamaBlock()
    with torch.no_grad():
        expected = oracle(model, mode="token", block=128)(X)
        assert_quantized(compiled(model, rotate=128)(X), model(X), expected)
