"""Prefill, decode, other batch sizes and resets share one packed copy of every weight."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

import mixllm_compiler
from mixllm_compiler.passes import pack_weights, quantize_weights
from mixllm_compiler.runtime import records
from tests.helpers import EAGER, token_ids
from tests.models.support import build, handed_over, linear_modules, mixed_ops

SHAPES = ((2, 9), (3, 17), (5, 12), (2, 33), (4, 7))


@pytest.fixture
def packings(monkeypatch):
    """Shape of the matrix → how often one of that shape was quantized and packed."""
    counts = Counter()
    quantize, pack = quantize_weights.quantize_rtn, quantize_weights.pack

    def counting_quantize(w, *args, **settings):
        counts["quantized"] += 1
        return quantize(w, *args, **settings)

    def counting_pack(weight, name):
        counts[name] += 1
        return pack(weight, name)

    monkeypatch.setattr(quantize_weights, "quantize_rtn", counting_quantize)
    monkeypatch.setattr(quantize_weights, "pack", counting_pack)
    monkeypatch.setattr(pack_weights, "pack", counting_pack)
    return counts


@torch.no_grad()
def test_every_weight_is_packed_exactly_once(packings):
    model = build("gpt2")
    once = len(linear_modules(model))
    mixllm_compiler.compile(model, bits=4.6, data=token_ids(2, 40), **EAGER)
    with records.collect() as graphs:
        for batch in (2, 1, 3):  # prefill and decode, each
            ids = token_ids(batch, 9)
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4)
        before = len(graphs)
        torch._dynamo.reset()
        model(token_ids(2, 9))
    assert before >= 3 and len(graphs) == before + 1  # they really were compiled
    assert packings == {"quantized": once, "plain.v1": once, "panels64.v1": once}
    assert {len(graph.quantized) for graph in graphs} == {once}


@torch.no_grad()
def test_all_graphs_read_the_same_blobs():
    model = build("llama")
    compiled = torch.compile(model, backend="mixllm", options={"bits": 4.6, **EAGER})
    with handed_over() as graphs:
        compiled(token_ids(2, 9))
        compiled(token_ids(2, 1), use_cache=True)
    assert len(graphs) == 2
    first, second = (
        {name: b.data_ptr() for name, b in g.module.named_buffers() if name.startswith("mixllm_")}
        for g in graphs
    )
    assert first == second and len(first) == len(linear_modules(model))


@torch.no_grad()
def test_dynamic_shapes_take_one_graph_for_five_shapes(packings):
    model, exact = build("llama"), build("llama")
    options = {"bits": 4.6, **EAGER}
    compiled = torch.compile(model, backend="mixllm", options=options, dynamic=True)
    with handed_over() as graphs:
        for shape in SHAPES:
            logits = compiled(token_ids(*shape), use_cache=False).logits
            assert (logits - exact(token_ids(*shape)).logits).abs().max() > 1e-3  # quantized
    (graph,) = graphs
    assert mixed_ops(graph).keys() == linear_modules(model).keys()
    assert packings["plain.v1"] == packings["panels64.v1"] == len(linear_modules(model))


@torch.no_grad()
def test_gradient_scores_do_not_specialise_dynamic_shapes():
    model = build("llama")
    options = {"bits": 4.6, **EAGER}
    compiled = torch.compile(model, backend="mixllm", options=options, dynamic=True)
    with records.collect() as graphs:
        for shape in ((3, 200), *SHAPES):  # the first is long enough to be profiled
            compiled(token_ids(*shape), use_cache=False)
    (graph,) = graphs
    assert graph.score == "fisher-sequence"
