"""What every pass makes of a decoder block: before and after, for review by eye.

A line that starts with "-" was there before the pass, one with "+" is there after it.
"""

from __future__ import annotations

import difflib

import pytest

from mixllm_compiler.ir.text import render
from mixllm_compiler.options import Options
from mixllm_compiler.passes.context import Context
from mixllm_compiler.passes.instruments import Instrument, Verifier
from mixllm_compiler.passes.pipeline import OWN_PASSES, default_pipeline
from tests.helpers import W4, LlamaBlock, activations, captured, causal_lm, token_ids

SETTINGS = {"bits": 5, "kernels": "reference"}  # which are in every torch
PASSES = [p.name for p in OWN_PASSES]


class Recorder(Instrument):
    """The graph as text before and after every pass."""

    def __init__(self):
        self.seen = {}
        self._before = ""

    def before(self, step, graph, ctx):
        self._before = body(graph)

    def after(self, step, graph, ctx, changes):
        self.seen[step.name] = self._before, body(graph), changes.lines


def body(graph):
    return render(graph, "graph").splitlines()


def recorded(model, *args, **options):
    graph, recorder = captured(model, *args), Recorder()
    ctx = Context(Options.parse(options))
    default_pipeline().run(graph, ctx, [recorder, Verifier()])
    return recorder.seen


@pytest.fixture(scope="module")
def block():
    return recorded(LlamaBlock(), activations(1, 6), **SETTINGS)


def text(name, before, after, changes):
    lines = list(difflib.unified_diff(before, after, lineterm="", n=len(before)))[3:]
    # Scores are floats whose last digit shown may depend on the processor.
    reasons = [f"# {what}: {why}" for what, why in changes if name != "annotate-salience"]
    return "\n".join([f"# {name}", *reasons, "", *(lines or ["# the graph stays as it is"])])


@pytest.mark.parametrize("name", PASSES)
def test_a_decoder_block(golden, block, name):
    golden.check(name, text(name, *block[name]))


def test_conv1d(golden):
    """GPT-2's spelling of a linear: addmm with a weight stored [K, N]."""
    from transformers.pytorch_utils import Conv1D

    seen = recorded(Conv1D(192, 128).eval(), activations(2, 6))
    name = "canonicalize-linears"
    golden.check(f"{name}-conv1d", text(name, *seen[name]))


def test_the_block_is_the_same_in_every_process(block):
    again = recorded(LlamaBlock(), activations(1, 6), **SETTINGS)
    assert again == block


def test_every_pass_changes_the_block_or_only_annotates_it(block):
    unchanged = {name for name, (before, after, _) in block.items() if before == after}
    # It is canonical already; the reference kernels are the semantic ops, in plain packing, and
    # know no fused ones.
    assert unchanged == {
        "canonicalize-linears",
        "select-kernels",
        "fuse-quantizers",
        "pack-weights",
    }


def test_a_whole_llama_verifies_after_every_pass():
    graph = captured(causal_lm("llama", layers=1), token_ids(1, 6), use_cache=False)
    ctx = Context(Options.parse(W4))
    default_pipeline().run(graph, ctx, [Verifier()])
    assert {m.name for m in graph.matrices.values() if m.widths is None} == {"lm_head"}
