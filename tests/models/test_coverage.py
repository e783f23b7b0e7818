"""Every Linear and Conv1D of a decoder is quantized, counted by a walk over the modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mixllm_compiler
from mixllm_compiler.ir.graph import MixGraph
from tests.helpers import EAGER, token_ids
from tests.models.support import (
    ARCHITECTURES,
    LAYERS,
    LINEARS_PER_LAYER,
    build,
    float_linears,
    handed_over,
    linear_modules,
    mixed_ops,
    storages,
)

IDS = token_ids(2, 24)


def by_backend(model: Any) -> Any:
    return torch.compile(model, backend="mixllm", options={"bits": 4.6, **EAGER})


def by_function(model: Any) -> Any:
    return mixllm_compiler.compile(model, bits=4.6, data=IDS, **EAGER)


def assert_all_quantized(model: Any, graph: MixGraph) -> None:
    linears, found, readable = linear_modules(model), mixed_ops(graph), storages(graph)
    assert found.keys() == linears.keys()
    for name, (module, n, k) in linears.items():
        assert (found[name].n, found[name].k) == (n, k), name
        assert module.weight.untyped_storage().data_ptr() not in readable, name


@pytest.mark.parametrize("door", [by_backend, by_function])
@pytest.mark.parametrize("kind", ARCHITECTURES)
@torch.no_grad()
def test_all_linears_of_the_decoder_are_quantized(kind, door):
    model = build(kind)
    exact = model(IDS).logits
    assert len(linear_modules(model)) == LINEARS_PER_LAYER[kind] * LAYERS  # the walk sees them
    with handed_over() as graphs:
        logits = door(model)(IDS).logits
    (graph,) = graphs
    assert_all_quantized(model, graph)
    assert float_linears(graph) == 1  # the head
    assert (logits - exact).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@torch.no_grad()
def test_half_precision_models_are_quantized_and_keep_their_dtype(kind, dtype):
    model = build(kind, dtype=dtype)
    exact = model(IDS).logits
    with handed_over() as graphs:
        logits = by_backend(model)(IDS).logits
    assert_all_quantized(model, graphs[0])
    assert logits.dtype == dtype
    assert not torch.equal(logits, exact)
    assert logits.isfinite().all()


@pytest.mark.parametrize("kind", ["llama", "untied"])
@torch.no_grad()
def test_lm_head_is_quantized_when_asked_and_a_tied_embedding_stays_float(kind):
    model = build(kind)
    exact = model(IDS).logits
    options = {"bits": 4.6, "lm_head": True, **EAGER}
    with handed_over() as graphs:
        logits = torch.compile(model, backend="mixllm", options=options)(IDS).logits
    (graph,) = graphs
    assert mixed_ops(graph).keys() == {*linear_modules(model), "lm_head"}
    assert float_linears(graph) == 0
    table = model.get_input_embeddings().weight.untyped_storage().data_ptr()
    assert table in storages(graph)
    assert not torch.equal(logits, exact)
